"""Tiny random Gemma 4 assistants for the tiny targets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma4AssistantConfig,
    Gemma4TextConfig,
    Gemma4UnifiedAssistantConfig,
    Gemma4UnifiedTextConfig,
)

from tests.tiny_models import VOCAB_SIZE, byte_tokenizer, save_tiny_model

FAMILIES = ("gemma4", "gemma4-shared-kv", "gemma4-moe", "gemma4-unified")
"""Targets as Gemma 4 31B, E2B, 26B-A4B and 12B are built."""
NARROW = (65, 66, 67)
"""The tokens narrow models choose among: random ones then agree now and then."""
_SLIDING_WINDOW = 16
_SEEDS = {"gemma4": 5, "gemma4-shared-kv": 2, "gemma4-moe": 1, "gemma4-unified": 7}
"""Of assistants whose drafts the target accepts now and then."""
_GLOBAL_KV: Mapping[str, Mapping[str, Any]] = {
    "gemma4": {"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
    "gemma4-shared-kv": {"global_head_dim": 16},
    "gemma4-moe": {"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True},
    "gemma4-unified": {"global_head_dim": 16},
    "llama": {"global_head_dim": 8},
}
"""Geometry of the target's full attention, where it is another than that of its sliding one."""


def save_tiny_assistant(
    folder: Path, family: str, *, seed: int = 1, vocab_size: int = VOCAB_SIZE, **config: Any
) -> Path:
    """Write an assistant for a tiny target of a family, and its tokenizer."""
    torch.manual_seed(seed)
    unified = family == "gemma4-unified"
    text = {
        "vocab_size": vocab_size,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "sliding_window": _SLIDING_WINDOW,
        "initializer_range": 0.6,
        "max_position_embeddings": 512,
        **_GLOBAL_KV[family],
    }
    if unified:
        made: Any = Gemma4UnifiedAssistantConfig(
            text_config=Gemma4UnifiedTextConfig(**text, use_bidirectional_attention=None),
            **({"backbone_hidden_size": 32} | config),
        )
    else:
        per_layer = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
        # E2B and E4B: a head over the best clusters of tokens.
        ordered = {"use_ordered_embeddings": True, "num_centroids": 26, "centroid_intermediate_top_k": 8}
        made = Gemma4AssistantConfig(
            text_config=Gemma4TextConfig(**text, **per_layer),
            **({"backbone_hidden_size": 32} | (ordered if family == "gemma4-shared-kv" else {}) | config),
        )
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    if made.use_ordered_embeddings:
        model.masked_embedding.token_ordering.copy_(torch.randperm(VOCAB_SIZE))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_narrow_pair(folder: Path, family: str) -> tuple[Path, Path]:
    """Save a target and an assistant that nearly always choose one of NARROW."""
    target = save_tiny_model(folder / "target", family)
    assistant = save_tiny_assistant(folder / "assistant", family, seed=_SEEDS[family])
    for path in (target, assistant):
        narrow(path)
    return target, assistant


@torch.no_grad()
def narrow(path: Path) -> None:
    """Give a model a head of its own that hardly ever chooses another token.

    Of its own: a tiny model with the embedding for a head repeats its last token.
    """
    torch.manual_seed(2)
    config = AutoConfig.from_pretrained(path)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    model: Any = AutoModelForCausalLM.from_pretrained(path, config=config)
    head = model.lm_head.weight
    head.normal_().mul_(0.02)
    head[list(NARROW)] *= 50
    model.save_pretrained(path)
