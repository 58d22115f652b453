"""Tiny random models with a real tokenizer, saved as Hugging Face folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4Config,
    Gemma4TextConfig,
    Gemma4UnifiedTextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE = 260
"""256 bytes and four special tokens."""
BOS, EOS = 256, 257
CHAT_TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": 258,
    # Large weights make the tiny model opinionated: its logits differ by far more than rounding.
    "initializer_range": 0.6,
}
_LAYER_TYPES = ["sliding_attention", "full_attention"] * 2


def tiny_config(family: str) -> PreTrainedConfig:
    """Return the configuration of a tiny model of a family, with sliding windows if the family has them."""
    if family == "llama":
        return LlamaConfig(**_COMMON)
    if family == "mistral":
        return MistralConfig(**_COMMON, sliding_window=16)
    if family == "qwen2":
        return Qwen2Config(**_COMMON)
    if family == "gemma2":
        # Caps small enough to bend the scores and logits of a tiny model.
        return Gemma2Config(
            **_COMMON,
            layer_types=_LAYER_TYPES,
            sliding_window=16,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=4.0,
        )
    if family == "qwen3":
        return Qwen3Config(**_COMMON)
    if family == "phi3":
        return Phi3Config(**_COMMON)
    if family == "olmo2":
        return Olmo2Config(**_COMMON)
    if family == "gemma3":
        return Gemma3TextConfig(
            **_COMMON, layer_types=_LAYER_TYPES, sliding_window=16, query_pre_attn_scalar=8
        )
    if family == "gemma4":
        return Gemma4TextConfig(
            **_COMMON,
            layer_types=_LAYER_TYPES,
            sliding_window=16,
            global_head_dim=16,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            num_kv_shared_layers=0,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=VOCAB_SIZE,
            enable_moe_block=False,
        )
    if family == "gemma4-shared-kv":
        return Gemma4TextConfig(
            **_COMMON,
            layer_types=_LAYER_TYPES,
            sliding_window=16,
            global_head_dim=16,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCAB_SIZE,
            enable_moe_block=False,
        )
    if family == "gemma4-moe":
        return Gemma4TextConfig(
            **_COMMON,
            layer_types=_LAYER_TYPES,
            sliding_window=16,
            global_head_dim=16,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            num_kv_shared_layers=0,
            hidden_size_per_layer_input=0,
            vocab_size_per_layer_input=VOCAB_SIZE,
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=16,
        )
    if family == "gemma4-unified":
        return Gemma4UnifiedTextConfig(
            **_COMMON,
            layer_types=_LAYER_TYPES,
            sliding_window=16,
            global_head_dim=16,
            use_bidirectional_attention=None,
        )
    if family == "gemma4-conditional":
        tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
        return Gemma4Config(
            text_config=tiny_config("gemma4").to_dict(), vision_config=tiny | heads, audio_config=None
        )
    raise ValueError(family)


PUBLISHED = "gemma4-conditional"
"""The class of the real Gemma 4 checkpoints, Gemma4ForConditionalGeneration, with a vision tower that no text
uses."""
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "gemma4",
    "gemma4-shared-kv",
    "gemma4-moe",
    "gemma4-unified",
)


QUICK_FAMILIES = ("llama", "gemma4")
"""Without and with sliding windows, K for V, heads of two sizes: what the engine treats differently."""


def save_tiny_model(
    folder: Path, family: str = "llama", *, seed: int = 0, noise: float = 0.0, **sizes: int
) -> Path:
    """Write a tiny model and its tokenizer to `folder`.

    Args:
        seed: of the weights; one seed always gives the same weights.
        noise: standard deviation of noise added to every weight, relative to the weight's own: a noisy copy
            agrees with the original often, not always.
        sizes: fields of the configuration that are other than usual, "head_dim" for example.
    """
    torch.manual_seed(seed)
    config = tiny_config(family)
    for name, value in sizes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if noise:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.std(correction=0) * noise)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, so that every text has ids and most ids are half a
    character.
    """
    vocabulary = {
        character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
