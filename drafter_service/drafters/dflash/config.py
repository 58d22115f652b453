"""What the configs of DFlash checkpoints say, whichever of three kinds wrote them.

z-lab, vLLM's `speculators` and transformers count layers differently, and leave different things unsaid: what
a sliding window and a block hide, and how embeddings and logits are scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import MuseGlimmerAssistantConfig, Qwen3Config

from drafter_service.drafters.dflash.layers import LayerMask
from drafter_service.drafters.kinds import MOST_LAYERS, kind_of, why_other
from specdec.contract.errors import InvalidArgumentError

_SLIDING = "sliding_attention"
_MOST_BLOCK_SIZE = 4096


@dataclass(frozen=True, slots=True)
class DFlashSettings:
    """What a checkpoint's config says besides the shape of its decoder."""

    block_size: int
    """Tokens of a block, the anchor included."""
    mask_token_id: int
    """Token that stands for a draft in a block."""
    target_layer_ids: tuple[int, ...]
    """Target layers, the first is 0, whose hidden states are the context."""
    masks: tuple[LayerMask, ...]
    """What a query sees, for each decoder layer."""
    sample_from_anchor: bool = False
    """Whether the anchor's place drafts the token after it; else the first mask's does."""
    embedding_scale: float | None = None
    """Factor of the target's embeddings; None: the target's own factor."""
    logit_scale: float = 1.0
    """Factor of the logits of the target's head."""
    logit_softcap: float | None = 0.0
    """Softcap of the logits, 0 for none; None: the target's own."""
    vocab_size: int = 0
    """Tokens the drafter knows; 0: the config does not say."""
    default_draft_depth: int = 0
    """Drafts of a round that does not say how many; 0: a whole block."""
    vocabulary_fingerprint: str = ""
    """Checksum of the target's vocabulary; empty: the config does not say."""

    @property
    def max_draft_depth(self) -> int:
        """Number of drafts that a whole block makes."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1


def read_config(config: Mapping[str, Any]) -> tuple[MuseGlimmerAssistantConfig, DFlashSettings]:
    """Return the decoder's shape and the other settings of a config.json.

    Raises:
        InvalidArgumentError: the checkpoint is of a kind that is not supported, or a value is missing.
    """
    if config.get("model_type") == "muse_glimmer_assistant":
        return _read_transformers(config)
    if config.get("speculators_model_type") == "dflash":
        return read_speculators(config)
    if kind_of(config)[1] == "dflash":
        return read_z_lab(config)
    raise InvalidArgumentError(why_other(config, "dflash"))


def _read_transformers(config: Mapping[str, Any]) -> tuple[MuseGlimmerAssistantConfig, DFlashSettings]:
    decoder = MuseGlimmerAssistantConfig(**config)
    # Its mask lets a query see a whole window back, and its block both ways.
    reach = decoder.sliding_window
    assert decoder.layer_types is not None
    assert decoder.target_layer_ids is not None
    masks = tuple(LayerMask(reach if kind == _SLIDING else None) for kind in decoder.layer_types)
    return decoder, DFlashSettings(
        _block_size(decoder.block_size),
        _mask_token(decoder.mask_token_id),
        _layer_ids(decoder.target_layer_ids),
        masks,
    )


def read_z_lab(config: Mapping[str, Any]) -> tuple[MuseGlimmerAssistantConfig, DFlashSettings]:
    """Read a config as z-lab writes it.

    Raises:
        InvalidArgumentError: a value is missing, or of no use.
    """
    own = {**config, **config.get("dflash_config", {})}
    layer_ids = _layer_ids(own.get("target_layer_ids"))
    source = Qwen3Config(**config)
    return _decoder_config(source, layer_ids), DFlashSettings(
        _block_size(own.get("block_size", 16)),
        _mask_token(own.get("mask_token_id")),
        layer_ids,
        _masks(source, config, own.get("is_causal")),
        embedding_scale=float(own.get("input_embedding_scale", 1.0)),
        logit_scale=float(own.get("output_multiplier", 1.0)),
        logit_softcap=float(own.get("final_logit_softcapping") or 0.0),
        vocab_size=_not_negative(source.vocab_size, "vocab_size"),
        # Checkpoints that were trained before the key was renamed have the second one.
        default_draft_depth=_not_negative(
            own.get("default_draft_depth", own.get("default_num_draft_tokens", 0)), "default_draft_depth"
        ),
        vocabulary_fingerprint=str(config.get("specdec_vocabulary_fingerprint", "")),
    )


def read_speculators(config: Mapping[str, Any]) -> tuple[MuseGlimmerAssistantConfig, DFlashSettings]:
    """Read a config as vLLM's `speculators` writes it.

    Raises:
        InvalidArgumentError: a value is missing, or of no use.
    """
    if (projector := config.get("projector_type", "dflash")) != "dflash":
        raise InvalidArgumentError(f"its projector_type is {projector!r}, which is not supported.")
    if config.get("shift_label"):
        raise InvalidArgumentError("its labels are shifted (shift_label), which is not supported.")
    layers = config["transformer_layer_config"]
    source = Qwen3Config(**layers)
    # These count from the embedding on: 1 is the output of layer 0.
    layer_ids = _layer_ids(config.get("aux_hidden_state_layer_ids"), offset=1)
    return _decoder_config(source, layer_ids), DFlashSettings(
        _block_size(config.get("block_size", 8)),
        _mask_token(config.get("mask_token_id")),
        layer_ids,
        _masks(source, layers, False if config.get("sliding_window_non_causal") else None),
        sample_from_anchor=bool(config.get("sample_from_anchor", False)),
        embedding_scale=1.0,
        vocab_size=_not_negative(source.vocab_size, "vocab_size"),
    )


def _layer_ids(given: Any, offset: int = 0) -> tuple[int, ...]:
    layer_ids = tuple(int(layer_id) - offset for layer_id in given or ())
    if not layer_ids or min(layer_ids) < 0 or max(layer_ids) > MOST_LAYERS:
        raise InvalidArgumentError(
            f"it must name target layers to read, counted from {offset}; it has {given}. (The output of the "
            "embedding, layer -1, is not supported.)"
        )
    return layer_ids


def _not_negative(given: Any, name: str) -> int:
    if int(given) < 0:
        raise InvalidArgumentError(f"its {name} is {given}; it must not be negative.")
    return int(given)


def _mask_token(given: Any) -> int:
    if given is None:
        raise InvalidArgumentError("it names no mask token (mask_token_id).")
    return _not_negative(given, "mask_token_id")


def _block_size(given: Any) -> int:
    if not 2 <= int(given) <= _MOST_BLOCK_SIZE:
        raise InvalidArgumentError(
            f"its block_size is {given}; a block has an anchor and at least one mask, and at most "
            f"{_MOST_BLOCK_SIZE} tokens."
        )
    return int(given)


def _masks(source: Qwen3Config, config: Mapping[str, Any], is_causal: bool | None) -> tuple[LayerMask, ...]:
    """Return the masks of z-lab's and `speculators`' layers: sliding layers are causal unless the config
    says.

    Args:
        config: what `source` was made from. `source` drops the window where use_sliding_window is not set;
            z-lab's sliding layers then see all of the context.
    """
    window = config.get("sliding_window", 1)
    if _SLIDING in source.layer_types and (window is None or window < 1):
        raise InvalidArgumentError(
            f"it has layers of type {_SLIDING}, and its sliding_window is {window}; give them a window of at "
            "least one token, or the type full_attention."
        )
    reach = None if source.sliding_window is None else source.sliding_window - 1
    masks = []
    for kind in source.layer_types:
        slides = kind == _SLIDING
        causal = slides if is_causal is None else is_causal
        # A window counts the query's own position. A short one hides what is as far ahead as well.
        own = reach if slides else None
        masks.append(LayerMask(own, 0 if causal else own))
    return tuple(masks)


def _decoder_config(source: Qwen3Config, layer_ids: tuple[int, ...]) -> MuseGlimmerAssistantConfig:
    """Return the shape of the decoder: Qwen3's, except for where keys and values come from."""
    if source.attention_bias:
        raise InvalidArgumentError("its attention has biases, which the dflash drafter does not have.")
    return MuseGlimmerAssistantConfig(
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=source.head_dim,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters=source.rope_parameters,
        max_position_embeddings=source.max_position_embeddings,
        layer_types=list(source.layer_types),
        hidden_act=source.hidden_act,
        target_layer_ids=list(layer_ids),
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
