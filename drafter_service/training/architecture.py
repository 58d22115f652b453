"""The configs of the drafters that are trained: as wide as their target, and what they read of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from transformers import Gemma4AssistantConfig, Gemma4TextConfig, MuseGlimmerAssistantConfig, PreTrainedModel

from drafter_service.training.data import TokenData
from drafter_service.training.trainee import unlike
from drafter_service.training.warm_start import BlockScales
from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.kv_pool import KvShape
from specdec.state.weights import TargetWeights


def assistant_config(target: PreTrainedModel, num_layers: int, kv: KvShape) -> Gemma4AssistantConfig:
    """Return the config of an MTP assistant as wide as the target, with full attention over one layer's
    KV."""
    config = target.config.get_text_config()
    rope = dict(config.rope_parameters)
    rope = rope.get("full_attention", rope)
    text = Gemma4TextConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=num_layers,
        num_kv_shared_layers=num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=kv.num_heads,
        head_dim=kv.key_dim,
        global_head_dim=kv.key_dim,
        hidden_activation=getattr(config, "hidden_activation", None) or config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"full_attention": rope, "sliding_attention": rope},
        layer_types=["full_attention"] * num_layers,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
        enable_moe_block=False,
        use_double_wide_mlp=False,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
        bos_token_id=config.bos_token_id,
    )
    return Gemma4AssistantConfig(
        text_config=text,
        backbone_hidden_size=config.hidden_size,
        specdec_target_head=True,
        dtype=torch.bfloat16,
    )


def dflash_config(
    target: PreTrainedModel,
    kv: KvShape,
    *,
    num_layers: int,
    layer_ids: Sequence[int],
    block_size: int,
    mask_token_id: int,
) -> MuseGlimmerAssistantConfig:
    """Return the config of a DFlash drafter as wide as the target, with attention over the whole context.

    Args:
        kv: KV geometry of the target's last layer.
    """
    config = target.config.get_text_config()
    rope = dict(config.rope_parameters)
    return MuseGlimmerAssistantConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=kv.num_heads,
        head_dim=kv.key_dim,
        hidden_act=getattr(config, "hidden_activation", None) or config.hidden_act,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=_plain_rope(rope.get("full_attention", rope)),
        max_position_embeddings=config.max_position_embeddings,
        layer_types=["full_attention"] * num_layers,
        block_size=block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=list(layer_ids),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Keep the base of the target's positions, without its scaling for long contexts."""
    return {"rope_type": "default", "rope_theta": rope["rope_theta"]}


def z_lab_config(
    config: MuseGlimmerAssistantConfig, weights: TargetWeights, scales: BlockScales, fingerprint: str
) -> dict[str, Any]:
    """Return the config.json of a trained DFlash drafter in z-lab's format.

    Args:
        fingerprint: checksum of the target's vocabulary.
    """
    shape = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "hidden_act", "rms_norm_eps", "rope_parameters"),
        *("max_position_embeddings", "layer_types"),
    )
    assert config.target_layer_ids is not None
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": len(weights.embedding),
        "attention_bias": False,
        "tie_word_embeddings": False,
        **{name: getattr(config, name) for name in shape},
        "dflash_config": {
            "block_size": config.block_size,
            "mask_token_id": config.mask_token_id,
            "target_layer_ids": list(config.target_layer_ids),
            "input_embedding_scale": scales.embedding * weights.embedding_scale,
            "final_logit_softcapping": weights.final_logit_softcap,
        },
        "specdec_vocabulary_fingerprint": fingerprint,
    }


def context_layers(num_layers: int, count: int) -> list[int]:
    """Spread `count` layers to read from the target's second to its last but one; at most all of these."""
    spread = numpy.linspace(1, num_layers - 2, count) if count > 1 else numpy.array([num_layers - 2])
    return sorted({round(layer_id) for layer_id in spread.tolist()})


def mask_token(data: TokenData, vocab_size: int, init: Path | None = None) -> int:
    """Choose the mask token: that of the drafter a run starts from, or the highest that no sequence has.

    Raises:
        InvalidArgumentError: every token occurs, or the drafter's config cannot be read.
    """
    if init:
        try:
            return int(json.loads((init / "config.json").read_text())["dflash_config"]["mask_token_id"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise unlike(init, repr(error)) from error
    unused = numpy.flatnonzero(numpy.bincount(data.token_ids, minlength=vocab_size) == 0)
    if not len(unused):
        raise InvalidArgumentError("Every token occurs in the data; none is left to be the mask.")
    return int(unused[-1])
