"""Tiny random DFlash drafters for the tiny targets, in every format there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

from tests.tiny_models import VOCAB_SIZE

BLOCK_SIZE = 6
MASK_TOKEN_ID = 259
SLIDING_WINDOW = 12
TARGET_LAYER_IDS = (0, 2)
_Z_LAB_NAMES = {"encoder.fc.weight": "fc.weight", "encoder.output_norm_enc.weight": "hidden_norm.weight"}


def save_tiny_dflash(folder: Path, *, seed: int = 1, **config: Any) -> Path:
    """Write a drafter as transformers does: one layer with a sliding window, one without."""
    torch.manual_seed(seed)
    model = MuseGlimmerAssistantModel(
        MuseGlimmerAssistantConfig(
            **{
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
                "sliding_window": SLIDING_WINDOW,
                "layer_types": ["sliding_attention", "full_attention"],
                "block_size": BLOCK_SIZE,
                "mask_token_id": MASK_TOKEN_ID,
                "target_layer_ids": list(TARGET_LAYER_IDS),
                **config,
            }
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                # Large weights: the drafter's opinion depends on what it reads.
                parameter.normal_(std=0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def qwen3_config(muse: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the same decoder as z-lab and speculators write it."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    names += (
        "num_key_value_heads",
        "rms_norm_eps",
        "layer_types",
        "sliding_window",
        "max_position_embeddings",
    )
    return {
        "model_type": "qwen3",
        "vocab_size": VOCAB_SIZE,
        "use_sliding_window": True,
        "rope_theta": muse["rope_parameters"]["rope_theta"],
        **{name: muse[name] for name in names},
    }


def save_as_z_lab(source: Path, folder: Path, *, nested: bool = True, **config: Any) -> Path:
    """Write the drafter in `source` as z-lab does.

    Args:
        nested: whether block_size stands within dflash_config, as in newer ones.
    """
    muse, weights = _read(source)
    dflash = {"target_layer_ids": muse["target_layer_ids"], "mask_token_id": muse["mask_token_id"]}
    block_size = {"block_size": muse["block_size"]}
    made = {
        "architectures": ["DFlashDraftModel"],
        **qwen3_config(muse),
        "dflash_config": dflash | (block_size if nested else {}),
        **({} if nested else block_size),
        **config,
    }
    return _write(folder, made, {_Z_LAB_NAMES.get(name, name): weight for name, weight in weights.items()})


def save_as_speculators(
    source: Path, folder: Path, extra: dict[str, torch.Tensor] | None = None, **config: Any
) -> Path:
    """Write the drafter in `source` as vLLM's speculators does, with `extra` weights."""
    muse, weights = _read(source)
    made = {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "transformer_layer_config": qwen3_config(muse),
        "aux_hidden_state_layer_ids": [layer_id + 1 for layer_id in muse["target_layer_ids"]],
        "mask_token_id": muse["mask_token_id"],
        "block_size": muse["block_size"],
        "draft_vocab_size": VOCAB_SIZE,
        **config,
    }
    named = {_Z_LAB_NAMES.get(name, name): weight for name, weight in weights.items()}
    return _write(folder, made, named | (extra or {}))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def _write(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_as_dflash2(source: Path, folder: Path, *, seed: int = 3) -> Path:
    """Write the drafter in `source` as z-lab writes DFlash 2, with random convolutions and selector."""
    muse = json.loads((source / "config.json").read_text())
    size, taps, group, rank = muse["hidden_size"], 2, 8, 6
    random = torch.Generator().manual_seed(seed)
    weights = {
        "candidate_selector.predecessor_codebook": torch.randn(VOCAB_SIZE, rank, generator=random),
        "candidate_selector.successor_codebook": torch.randn(VOCAB_SIZE, rank, generator=random),
        "candidate_selector.hidden_projection.weight": torch.randn(rank, size, generator=random),
    }
    for layer in range(muse["num_hidden_layers"]):
        for name in ("attention_conv", "mlp_conv"):
            prefix = f"layers.{layer}.{name}"
            made = 2 * taps * size // group
            weights[f"{prefix}.base_kernel"] = torch.randn(2, taps, size, generator=random) * 0.5
            weights[f"{prefix}.kernel_projection.weight"] = torch.randn(made, size, generator=random) * 0.1
    own = {"conv_kernel_size": taps, "conv_group_size": group, "selector_rank": rank, "selector_top_k": 8}
    names = ("block_size", "mask_token_id", "target_layer_ids")
    save_as_z_lab(
        source,
        folder,
        architectures=["DFlash2DraftModel"],
        is_causal=False,
        dflash_config={**{name: muse[name] for name in names}, **own},
    )
    return _add(folder, weights)


def save_as_dspark(source: Path, folder: Path, *, kind: str = "vanilla", seed: int = 4) -> Path:
    """Write the drafter in `source` as speculators writes DSpark, with a random bias and confidence head."""
    size, rank = json.loads((source / "config.json").read_text())["hidden_size"], 6
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "markov_head.markov_w1.weight": (VOCAB_SIZE, rank),
        "markov_head.markov_w2.weight": (VOCAB_SIZE, rank),
        "confidence_head.proj.weight": (1, size + rank),
        "confidence_head.proj.bias": (1,),
    }
    if kind == "gated":
        shapes |= {"markov_head.gate_proj.weight": (rank, size + rank), "markov_head.gate_proj.bias": (rank,)}
    if kind == "rnn":
        shapes["markov_head.joint_proj.weight"] = (3 * rank, 2 * rank + size)
        shapes["markov_head.joint_proj.bias"] = (3 * rank,)
    weights = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    save_as_speculators(
        source, folder, speculators_model_type="dspark", markov_rank=rank, markov_head_type=kind
    )
    return _add(folder, weights)


def _add(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Add weights to a checkpoint."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | weights, path, metadata={"format": "pt"})
    return folder
