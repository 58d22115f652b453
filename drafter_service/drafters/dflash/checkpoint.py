"""DFlash checkpoints of three kinds: z-lab's, those of vLLM's `speculators`, and transformers' own.

They hold the same decoder under different names, and differ in what their configs leave unsaid: how layers
are counted, what a sliding window and a block hide, where embedding and head come from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel, Qwen3Config

from drafter_service.drafters.dflash.layers import LayerMask
from drafter_service.drafters.dflash.markov import PREFIX, MarkovHead, split_weights
from drafter_service.drafters.head import read_draft_vocab
from specdec.contract.errors import InvalidArgumentError
from specdec.models.files import model_id, resolve_model, revision
from specdec.runtime.loading import usable_device
from specdec.state.view import Projection

_INDEX = "model.safetensors.index.json"
_SLIDING = "sliding_attention"
TRANSFORMERS_NAMES = {
    "fc.weight": "encoder.fc.weight",
    "hidden_norm.weight": "encoder.output_norm_enc.weight",
}
"""Of weights, as z-lab and `speculators` have them and as transformers has."""
_IGNORED = ("embed_tokens.", "verifier_norm.", "verifier_lm_head.", "t2d")
"""Weights of `speculators` that are the target's, or say what other ones say."""


@dataclass(frozen=True, slots=True)
class DFlashSettings:
    """What a checkpoint's config says besides the shape of its decoder."""

    block_size: int
    """Tokens of a block, the anchor included."""
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    """Target layers, the first is 0, whose hidden states are the context."""
    masks: tuple[LayerMask, ...]
    """Of each decoder layer."""
    sample_from_anchor: bool = False
    """Whether the anchor's place drafts the token after it; else the first mask's does."""
    embedding_scale: float | None = None
    """What the target's embeddings are multiplied with; None: what the target multiplies them with."""
    logit_scale: float = 1.0
    logit_softcap: float | None = 0.0
    """Of the logits, 0 for none; None: the target's."""
    vocab_size: int = 0
    """0: not said."""
    default_draft_depth: int = 0
    """Drafts of a round that does not say how many; 0: a whole block."""
    vocabulary_fingerprint: str = ""

    @property
    def max_draft_depth(self) -> int:
        """Drafts of a whole block."""
        return self.block_size if self.sample_from_anchor else self.block_size - 1


@dataclass(frozen=True, slots=True, eq=False)
class DFlashCheckpoint:
    """A checkpoint in memory."""

    model_id: str
    revision: str
    settings: DFlashSettings
    model: MuseGlimmerAssistantModel
    projection: Projection
    """Of the context."""
    lm_head: Tensor | None
    """[draft_vocab_size, hidden_size]; None: the target's."""
    draft_vocab: Tensor | None
    """Token ids [draft_vocab_size] the head covers, ascending; None: all."""
    markov: MarkovHead | None
    """What makes a draft depend on the one before it; None: nothing does."""

    @classmethod
    def load(cls, model: str, *, dtype: str, device: str, threads: int = 0) -> DFlashCheckpoint:
        """Load a folder or hub id.

        Args:
            threads: CPU threads of this process's models; 0: as torch chooses.

        Raises:
            NotFoundError: there is no such checkpoint.
            InvalidArgumentError: it is no DFlash drafter, one of a kind that is not supported, or damaged; or
                the device is not there.
        """
        folder = resolve_model(model)
        target = usable_device(device)
        if threads:
            torch.set_num_threads(threads)
        try:
            config = json.loads((folder / "config.json").read_text())
            decoder_config, settings = _read_config(config)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{folder}: {error.message}", field="drafter") from error
        except Exception as error:  # a broken config surfaces as many types
            raise InvalidArgumentError(
                f"{folder}/config.json cannot be used: {type(error).__name__}: {error}", field="drafter"
            ) from error
        weights = _read_weights(folder, target)
        decoder = MuseGlimmerAssistantModel(decoder_config).to(target, getattr(torch, dtype)).eval()
        decoder.requires_grad_(False)
        lm_head, draft_vocab = _take_head(folder, weights, settings.vocab_size, decoder_config.hidden_size)
        if lm_head is not None and draft_vocab is None:
            settings = replace(settings, vocab_size=len(lm_head))
        if draft_vocab is None:
            draft_vocab = read_draft_vocab(folder, settings.vocab_size, decoder.device)
        markov = _take_markov(folder, weights, decoder)
        _fill(folder, decoder, weights)
        encoder = decoder.encoder
        return cls(
            model_id(model),
            revision(folder),
            settings,
            decoder,
            Projection(encoder.fc.weight, encoder.output_norm_enc.weight, decoder_config.rms_norm_eps),
            None if lm_head is None else lm_head.to(decoder.dtype),
            draft_vocab,
            markov,
        )


def _read_config(config: Mapping[str, Any]) -> tuple[MuseGlimmerAssistantConfig, DFlashSettings]:
    if config.get("model_type") == "muse_glimmer_assistant":
        return _read_transformers(config)
    if "speculators_model_type" in config:
        return _read_speculators(config)
    if "dflash_config" in config or "DFlashDraftModel" in config.get("architectures", ()):
        return _read_z_lab(config)
    kind = config.get("architectures") or config.get("model_type")
    raise InvalidArgumentError(
        f"it holds {kind}; the dflash drafter runs DFlashDraftModel, speculators' dflash and "
        "muse_glimmer_assistant."
    )


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


def _read_z_lab(config: Mapping[str, Any]) -> tuple[MuseGlimmerAssistantConfig, DFlashSettings]:
    own = {**config, **config.get("dflash_config", {})}
    if any(name.startswith("DFlash2") for name in config.get("architectures", ())):
        raise InvalidArgumentError("it holds a DFlash2DraftModel, of which this drafter knows nothing.")
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
        vocab_size=source.vocab_size,
        default_draft_depth=int(own.get("default_draft_depth", 0)),
        vocabulary_fingerprint=config.get("specdec_vocabulary_fingerprint", ""),
    )


def _read_speculators(config: Mapping[str, Any]) -> tuple[MuseGlimmerAssistantConfig, DFlashSettings]:
    kind, projector = config["speculators_model_type"], config.get("projector_type", "dflash")
    if (kind, projector) != ("dflash", "dflash"):
        raise InvalidArgumentError(f"it holds a speculator of type {kind!r} ({projector}), not dflash.")
    if config.get("shift_label"):
        raise InvalidArgumentError("its labels are shifted (shift_label), which is not supported.")
    layers = config["transformer_layer_config"]
    source = Qwen3Config(**layers)
    # Counted from the embedding on: 1 is the output of layer 0.
    layer_ids = _layer_ids(config.get("aux_hidden_state_layer_ids"), offset=1)
    return _decoder_config(source, layer_ids), DFlashSettings(
        _block_size(config.get("block_size", 8)),
        _mask_token(config.get("mask_token_id")),
        layer_ids,
        _masks(source, layers, False if config.get("sliding_window_non_causal") else None),
        sample_from_anchor=bool(config.get("sample_from_anchor", False)),
        embedding_scale=1.0,
        vocab_size=source.vocab_size,
    )


def _layer_ids(given: Any, offset: int = 0) -> tuple[int, ...]:
    layer_ids = tuple(int(layer_id) - offset for layer_id in given or ())
    if not layer_ids or min(layer_ids) < 0:
        raise InvalidArgumentError(
            f"it must name target layers to read, counted from {offset}; it has {given}."
        )
    return layer_ids


def _mask_token(given: Any) -> int:
    if given is None:
        raise InvalidArgumentError("it names no mask token (mask_token_id).")
    return int(given)


def _block_size(given: Any) -> int:
    if int(given) < 2:
        raise InvalidArgumentError(f"its block_size is {given}; a block has an anchor and at least one mask.")
    return int(given)


def _masks(source: Qwen3Config, config: Mapping[str, Any], is_causal: bool | None) -> tuple[LayerMask, ...]:
    """Of z-lab's and `speculators`' layers: sliding ones are causal unless it is said.

    Args:
        config: what `source` was made of, which drops the window where there is no use_sliding_window;
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
        # A window counts the query's own position.
        masks.append(LayerMask(reach if slides else None, causal))
    return tuple(masks)


def _decoder_config(source: Qwen3Config, layer_ids: tuple[int, ...]) -> MuseGlimmerAssistantConfig:
    """The shape of the decoder, which is Qwen3's but for where keys and values come from."""
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


def _read_weights(folder: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        files = ["model.safetensors"]
        if (folder / _INDEX).is_file():
            files = sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
        weights: dict[str, Tensor] = {}
        for file in files:
            # A name with a folder in it would lead out of the checkpoint.
            with safe_open(folder / Path(file).name, framework="pt", device=str(device)) as tensors:
                weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise InvalidArgumentError(
            f"The weights in {folder} cannot be read: {error}", field="drafter"
        ) from error
    return {TRANSFORMERS_NAMES.get(name, name): weight for name, weight in weights.items()}


def _take_head(
    folder: Path, weights: dict[str, Tensor], vocab_size: int, hidden_size: int
) -> tuple[Tensor | None, Tensor | None]:
    """Take head and draft vocabulary out of the weights; both are in order of token ids.

    Args:
        vocab_size: 0: not known.
    """
    lm_head, offsets = weights.pop("lm_head.weight", None), weights.pop("d2t", None)
    if lm_head is None:
        return None, None
    if lm_head.ndim != 2 or not len(lm_head) or lm_head.shape[1] != hidden_size:
        raise InvalidArgumentError(
            f"{folder}: lm_head.weight is {list(lm_head.shape)}; it must have rows of the drafter's "
            f"{hidden_size} elements.",
            field="drafter",
        )
    if offsets is not None:
        token_ids = _mapped_tokens(folder, offsets, len(lm_head), vocab_size)
        order = token_ids.argsort()
        return lm_head[order], token_ids[order]
    if len(lm_head) < vocab_size:
        raise InvalidArgumentError(
            f"{folder}: its head has {len(lm_head)} rows for a vocabulary of {vocab_size} tokens, and no d2t "
            "that says whose they are.",
            field="drafter",
        )
    # More rows than tokens are padding.
    return lm_head[: vocab_size or None], None


def _mapped_tokens(folder: Path, offsets: Tensor, num_rows: int, vocab_size: int) -> Tensor:
    """The token [num_rows] of each row of a head, from how far it is from the row's index.

    Raises:
        InvalidArgumentError: they are not different tokens of the vocabulary, one for each row.
    """
    right = offsets.shape == (num_rows,)
    if right:
        token_ids = torch.arange(num_rows, device=offsets.device) + offsets.long()
        in_range = token_ids.min() >= 0 and not (vocab_size and token_ids.max() >= vocab_size)
        right = bool(in_range) and len(token_ids.unique()) == num_rows
    if not right:
        raise InvalidArgumentError(
            f"{folder}: d2t does not map the {num_rows} rows of the head to as many tokens.", field="drafter"
        )
    return token_ids


def _take_markov(
    folder: Path, weights: dict[str, Tensor], decoder: MuseGlimmerAssistantModel
) -> MarkovHead | None:
    """Take the weights of a Markov head out of a checkpoint's, where it has one."""
    own = split_weights(weights)
    if not own:
        return None
    try:
        return MarkovHead.of(own, decoder.config.hidden_size).to(decoder.dtype)
    except (KeyError, RuntimeError, TypeError) as error:
        raise InvalidArgumentError(
            f"{folder}: its {PREFIX}* weights are no head for {decoder.config.hidden_size} elements: {error}",
            field="drafter",
        ) from error


def _fill(folder: Path, decoder: MuseGlimmerAssistantModel, weights: dict[str, Tensor]) -> None:
    kept = {name: weight for name, weight in weights.items() if not name.startswith(_IGNORED)}
    try:
        missing, unexpected = decoder.load_state_dict(kept, strict=False)
    except RuntimeError as error:  # a wrong size
        raise InvalidArgumentError(f"{folder}: {error}", field="drafter") from error
    for what, names in (("lacks", missing), ("has the unknown", unexpected)):
        if names:
            raise InvalidArgumentError(
                f"The checkpoint in {folder} {what} {names[0]}: it is damaged, or of another kind.",
                field="drafter",
            )
