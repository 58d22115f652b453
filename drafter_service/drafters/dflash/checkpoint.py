"""DFlash checkpoints of three kinds: z-lab's, those of vLLM's `speculators`, and transformers' own.

They hold the same decoder under different names; some bring a head of their own, all others use the target's.
Families that grew out of DFlash say by a `Kind` what is different.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

from drafter_service.drafters.dflash.config import DFlashSettings, read_config
from drafter_service.drafters.dflash.links import Links
from drafter_service.drafters.dflash.markov import PREFIX, MarkovHead
from drafter_service.drafters.head import read_draft_vocab
from drafter_service.drafters.kinds import context_length
from drafter_service.drafters.weights import read_weights, reading_config, take_head, take_weights
from specdec.contract.errors import InvalidArgumentError
from specdec.models.files import model_id, resolve_model, revision
from specdec.runtime.decoder.layers import Layer
from specdec.runtime.loading import usable_device
from specdec.state.view import Projection

TRANSFORMERS_NAMES = {
    "fc.weight": "encoder.fc.weight",
    "hidden_norm.weight": "encoder.output_norm_enc.weight",
}
"""Names of weights: as z-lab and `speculators` have them, and as transformers has."""
_IGNORED = ("embed_tokens.", "verifier_norm.", "verifier_lm_head.", "t2d")
"""Weights of `speculators` that are the target's, or repeat what other weights say."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a family has beside the decoder and the LM head."""

    links: Links | None = None
    """What makes a draft depend on the one before it; None: drafts of a block do not depend on each other."""
    changes: Sequence[Callable[[Layer], Layer]] = ()
    """What is made of each decoder layer; empty: they stay as they are."""
    begin: Callable[[Sequence[int], torch.device], None] = lambda lengths, device: None
    """Is told the lengths of a pass's blocks before it runs."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint that is being read; parts are taken out of its weights."""

    folder: Path
    config: Mapping[str, Any]
    weights: dict[str, Tensor]
    settings: DFlashSettings
    hidden_size: int
    draft_order: Tensor | None
    """Rows [draft_vocab_size] of what a checkpoint has for each token that it drafts, in order of their ids;
    None: they are in that order, or there is no draft vocabulary."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A family of block drafters: how its config is read, and its parts."""

    family: str
    read_config: Callable[[Mapping[str, Any]], tuple[MuseGlimmerAssistantConfig, DFlashSettings]]
    take_parts: Callable[[Source], Parts]
    """Raises KeyError, RuntimeError, TypeError or ValueError where weights are missing or do not fit."""


@dataclass(frozen=True, slots=True, eq=False)
class DFlashCheckpoint:
    """A checkpoint of a block drafter in memory."""

    family: str
    model_id: str
    revision: str
    settings: DFlashSettings
    model: MuseGlimmerAssistantModel
    projection: Projection
    """What makes the context of the target's hidden states."""
    lm_head: Tensor | None
    """The checkpoint's own head [draft_vocab_size, hidden_size]; None: the target's is used."""
    draft_vocab: Tensor | None
    """Token ids [draft_vocab_size] the head covers, ascending; None: all."""
    parts: Parts
    max_length: int = 0
    """Longest text that it was made for, tokens; 0: its config does not say."""

    @classmethod
    def load(
        cls, model: str, *, dtype: str, device: str, threads: int = 0, kind: Kind | None = None
    ) -> DFlashCheckpoint:
        """Load a folder or hub id.

        Args:
            threads: CPU threads of this process's models; 0: as torch chooses.
            kind: the family that it is to be of; None: DFlash.

        Raises:
            NotFoundError: there is no such checkpoint.
            InvalidArgumentError: it is not a drafter of a kind that is supported, it is damaged, or the
                device does not exist.
        """
        kind = kind or DFLASH
        folder = resolve_model(model)
        target = usable_device(device)
        if threads:
            torch.set_num_threads(threads)
        with reading_config(folder):
            config = json.loads((folder / "config.json").read_text())
            decoder_config, settings = kind.read_config(config)
            max_length = context_length(config)
            decoder = MuseGlimmerAssistantModel(decoder_config).to(target, getattr(torch, dtype)).eval()
        read = read_weights(folder, target)
        weights = {TRANSFORMERS_NAMES.get(name, name): weight for name, weight in read.items()}
        decoder.requires_grad_(False)
        hidden_size = decoder_config.hidden_size
        lm_head, draft_vocab, order = take_head(folder, weights, settings.vocab_size, hidden_size)
        if lm_head is not None and draft_vocab is None:
            settings = replace(settings, vocab_size=len(lm_head))
        if draft_vocab is None:
            draft_vocab = read_draft_vocab(folder, settings.vocab_size, decoder.device)
        parts = _take_parts(kind, Source(folder, config, weights, settings, hidden_size, order), decoder)
        _fill(folder, decoder, weights)
        encoder = decoder.encoder
        return cls(
            kind.family,
            model_id(model),
            revision(folder),
            settings,
            decoder,
            Projection(encoder.fc.weight, encoder.output_norm_enc.weight, decoder_config.rms_norm_eps),
            None if lm_head is None else lm_head.to(decoder.dtype),
            draft_vocab,
            parts,
            max_length,
        )


def _take_parts(kind: Kind, source: Source, decoder: MuseGlimmerAssistantModel) -> Parts:
    """Take what a family has beside the decoder out of a checkpoint's weights, in the decoder's data type."""
    names = [name for name, weight in source.weights.items() if weight.is_floating_point()]
    source.weights.update({name: source.weights[name].to(decoder.dtype) for name in names})
    try:
        return kind.take_parts(source)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"{source.folder}: the weights that it has as a {kind.family} drafter do not fit its "
            f"{source.hidden_size} elements: {error}",
            field="drafter",
        ) from error


def _take_markov(source: Source) -> Parts:
    """Take the weights of a Markov head, where a checkpoint has one."""
    own = take_weights(source.weights, PREFIX)
    try:
        return Parts(MarkovHead.of(own, source.hidden_size) if own else None)
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{PREFIX}*: {error}") from error


DFLASH = Kind("dflash", read_config, _take_markov)


def _fill(folder: Path, decoder: MuseGlimmerAssistantModel, weights: dict[str, Tensor]) -> None:
    """Load the weights into the decoder; refuse missing and unknown ones."""
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
