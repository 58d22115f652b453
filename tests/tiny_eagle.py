"""Tiny random EAGLE-3 drafters for the tiny targets, as vLLM's `speculators` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny_models import VOCAB_SIZE

SIZE = 32
_LAYERS = {
    "model_type": "llama",
    "hidden_size": SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCAB_SIZE,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def save_tiny_eagle(
    folder: Path, *, layer_ids: tuple[int, ...] = (1, 2, 3), seed: int = 2, **config: Any
) -> Path:
    """Write a drafter without a head of its own.

    Args:
        layer_ids: layers of the target, what enters them is read; the first is 0.
    """
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "fc.weight": (SIZE, len(layer_ids) * SIZE),
        "norm.weight": (SIZE,),
        "layers.0.input_layernorm.weight": (SIZE,),
        "layers.0.hidden_norm.weight": (SIZE,),
        "layers.0.post_attention_layernorm.weight": (SIZE,),
        "layers.0.self_attn.q_proj.weight": (32, 2 * SIZE),
        "layers.0.self_attn.k_proj.weight": (16, 2 * SIZE),
        "layers.0.self_attn.v_proj.weight": (16, 2 * SIZE),
        "layers.0.self_attn.o_proj.weight": (SIZE, 32),
        "layers.0.mlp.gate_proj.weight": (48, SIZE),
        "layers.0.mlp.up_proj.weight": (48, SIZE),
        "layers.0.mlp.down_proj.weight": (SIZE, 48),
    }
    weights = {
        name: torch.randn(shape, generator=random) * (0.5 if len(shape) > 1 else 0.2) + (len(shape) == 1)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    made = {
        "speculators_model_type": "eagle3",
        "draft_vocab_size": VOCAB_SIZE,
        "eagle_aux_hidden_state_layer_ids": list(layer_ids),
        "transformer_layer_config": _LAYERS,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(made))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
