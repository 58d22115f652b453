"""EAGLE-3 checkpoints of the authors (arXiv 2503.01840) and of vLLM's `speculators`, in memory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from drafter_service.drafters.eagle3.config import EagleSettings, read_config
from drafter_service.drafters.eagle3.layers import empty_decoder
from drafter_service.drafters.kinds import context_length
from drafter_service.drafters.weights import read_weights, reading_config, take_head, take_weights
from specdec.contract.errors import InvalidArgumentError
from specdec.models.files import model_id, resolve_model, revision
from specdec.runtime.decoder.layers import Norm
from specdec.runtime.loading import usable_device

_IGNORED = ("t2d", "verifier_norm.", "verifier_lm_head.")
"""Weights that repeat what others say, or are the target's."""


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What makes a feature of the target's hidden states: norms, if there are any, and a projection."""

    fc: Tensor | None  # [hidden_size, input_size]
    """None: the states are features as they are."""
    before: Norm | None
    """Norm of all states side by side; None: there is none."""
    each: tuple[Norm, ...]
    """Norms of each layer's states; empty: there are none."""


@dataclass(frozen=True, slots=True, eq=False)
class EagleCheckpoint:
    """An EAGLE-3 checkpoint in memory."""

    model_id: str
    revision: str
    settings: EagleSettings
    decoder: nn.Module
    features: Features
    embedding: Tensor | None
    """The checkpoint's own embedding [vocab_size, hidden_size]; None: the target's is used."""
    lm_head: Tensor | None
    """The checkpoint's own head [draft_vocab_size, hidden_size]; None: the target's is used."""
    draft_vocab: Tensor | None
    """Token ids [draft_vocab_size] the head covers, ascending; None: all."""
    max_length: int = 0
    """Longest text that it was made for, tokens; 0: its config does not say."""

    @classmethod
    def load(
        cls, model: str, *, dtype: str, device: str, threads: int = 0, num_target_layers: int = 0
    ) -> EagleCheckpoint:
        """Load a folder or hub id.

        Args:
            threads: CPU threads of this process's models; 0: as torch chooses.
            num_target_layers: layers of the target, see `num_layers`; 0: unknown.

        Raises:
            NotFoundError: there is no such checkpoint.
            InvalidArgumentError: it is not an EAGLE-3 drafter of a kind that is supported, it is damaged, or
                the device does not exist.
        """
        folder, at = resolve_model(model), usable_device(device)
        if threads:
            torch.set_num_threads(threads)
        with reading_config(folder):
            config = json.loads((folder / "config.json").read_text())
            decoder_config, settings = read_config(config, num_target_layers)
            max_length = context_length(config)
            decoder = empty_decoder(decoder_config).to(at, getattr(torch, dtype)).eval()
        decoder.requires_grad_(False)
        kind, size = getattr(torch, dtype), decoder_config.hidden_size
        weights = {
            name.replace("midlayer.", "layers.0."): weight.to(kind) if weight.is_floating_point() else weight
            for name, weight in read_weights(folder, at).items()
            if not name.startswith(_IGNORED)
        }
        lm_head, draft_vocab, _ = take_head(folder, weights, settings.vocab_size, size)
        try:
            features = _take_features(weights, settings, size, decoder_config.rms_norm_eps)
            embedding = weights.pop("embed_tokens.weight", None)
            if embedding is not None and embedding.shape != (settings.vocab_size, size):
                raise ValueError(f"embed_tokens.weight is {[*embedding.shape]}")
            decoder.load_state_dict(weights)
        except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InvalidArgumentError(
                f"{folder}: its weights are not those of an EAGLE-3 drafter of {size} elements: {error}",
                field="drafter",
            ) from error
        return cls(
            model_id(model),
            revision(folder),
            settings,
            decoder,
            features,
            embedding,
            lm_head,
            draft_vocab,
            max_length,
        )


def num_layers(target: str) -> int:
    """Return the number of layers of a target's checkpoint, a folder or hub id; 0: it is empty.

    Raises:
        NotFoundError: there is no such checkpoint.
        InvalidArgumentError: its config cannot be used.
    """
    if not target:
        return 0
    folder: Path = resolve_model(target)
    try:
        text_config: Any = AutoConfig.from_pretrained(folder).get_text_config()
        return int(text_config.num_hidden_layers)
    except Exception as error:  # a broken config surfaces as many types
        raise InvalidArgumentError(
            f"{folder} does not say how many layers the target has: {type(error).__name__}: {error}",
            field="target",
        ) from error


def _take_features(
    weights: dict[str, Tensor], settings: EagleSettings, size: int, epsilon: float
) -> Features:
    """Take what makes features out of a checkpoint's weights.

    Raises:
        KeyError, ValueError: weights are missing, or do not fit.
    """
    fc, count = weights.pop("fc.weight", None), max(1, len(settings.layer_ids))
    if fc is not None and (fc.ndim != 2 or len(fc) != size or fc.shape[1] % count):
        raise ValueError(f"fc.weight is {[*fc.shape]} for the states of {count} layers")
    if fc is None and count > 1:
        raise KeyError("fc.weight")
    width = size if fc is None else fc.shape[1]
    before = None
    if settings.norm_before_fc:
        before = _norm(weights.pop("input_norm.weight"), width, epsilon)
    each: tuple[Norm, ...] = ()
    if settings.norms_features:
        own = take_weights(weights, "fc_norm.")
        each = tuple(_norm(own[f"{index}.weight"], width // count, epsilon) for index in range(count))
    return Features(fc, before, each)


def _norm(weight: Tensor, size: int, epsilon: float) -> Norm:
    """Return a norm of rows of that size: a kernel that reads it asks for no shape.

    Raises:
        ValueError: the weight is of another shape.
    """
    if weight.shape != (size,):
        raise ValueError(f"a norm of {size} elements has a weight {[*weight.shape]}")
    return Norm(weight, epsilon)
