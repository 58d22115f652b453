"""Drafter families by name. A new family is entered here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import Drafter
from drafter_service.drafters.kinds import kind_of, why_other
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.methods import is_drafter_name

if TYPE_CHECKING:
    from drafter_service.drafters.dflash.checkpoint import Kind

_SPEC = re.compile(r"(?:(?P<name>[\w.-]+)=)?(?P<family>[\w-]+)(?::(?P<model>.+))?")


@dataclass(frozen=True, slots=True)
class DrafterSpec:
    """What the command line says of a drafter."""

    name: str
    family: str
    model: str

    @classmethod
    def parse(cls, text: str) -> DrafterSpec:
        """Read [NAME=]FAMILY[:MODEL].

        Raises:
            InvalidArgumentError: the text is not of that form, or the name has a meaning of its own.
        """
        match = _SPEC.fullmatch(text)
        if not match:
            raise InvalidArgumentError(
                f"--drafter {text!r} is not of the form [NAME=]FAMILY[:MODEL].", field="drafter"
            )
        name = match["name"] or match["family"]
        if not is_drafter_name(name):
            raise InvalidArgumentError(f"A drafter cannot be named {name!r}; choose another name.")
        return cls(name, match["family"], match["model"] or "")


DrafterFactory = Callable[[DrafterSpec, DrafterConfig], Drafter]


def _make_ngram(spec: DrafterSpec, config: DrafterConfig) -> Drafter:
    from drafter_service.drafters.ngram.drafter import NgramDrafter

    if spec.model:
        raise InvalidArgumentError("The ngram drafter has no model; write --drafter ngram.", field="drafter")
    return NgramDrafter(
        spec.name,
        min_size=config.ngram_min,
        max_size=config.ngram_max,
        max_draft_depth=config.max_draft_depth,
        max_draft_nodes=config.max_draft_nodes,
        memory_tokens=config.ngram_memory,
    )


def _make_ngram_lm(spec: DrafterSpec, config: DrafterConfig) -> Drafter:
    from drafter_service.drafters.ngram_lm.drafter import NgramLmDrafter
    from drafter_service.drafters.ngram_lm.table import NgramTable
    from specdec.models.files import resolve_model

    return NgramLmDrafter(
        spec.name,
        NgramTable.load(resolve_model(spec.model or pretrained("ngram-lm"))),
        min_size=config.ngram_min,
        max_size=config.ngram_max,
        max_draft_depth=config.max_draft_depth,
        max_draft_nodes=config.max_draft_nodes,
        memory_tokens=config.ngram_memory,
    )


def _make_causal_lm(spec: DrafterSpec, config: DrafterConfig) -> Drafter:
    # Imported here: a process with the ngram drafter alone starts without torch.
    from drafter_service.drafters.causal_lm.drafter import CausalLmDrafter
    from specdec.runtime.loading import load_causal_lm

    _refuse_other_kinds(_named_model(spec))
    return CausalLmDrafter(
        spec.name,
        load_causal_lm(_named_model(spec), dtype=config.dtype, device=config.device, threads=config.threads),
        kv_budget_bytes=int(config.kv_cache_mib * 2**20),
        max_draft_depth=config.max_draft_depth,
    )


def _make_mtp(spec: DrafterSpec, config: DrafterConfig) -> Drafter:
    from drafter_service.drafters.mtp.checkpoint import Assistant
    from drafter_service.drafters.mtp.drafter import MtpDrafter

    assistant = Assistant.load(
        spec.model or pretrained("mtp"), dtype=config.dtype, device=config.device, threads=config.threads
    )
    return MtpDrafter(
        spec.name,
        assistant,
        max_draft_depth=config.max_draft_depth,
        max_draft_nodes=config.max_draft_nodes,
        position=config.mtp_position,
    )


def _make_dflash(spec: DrafterSpec, config: DrafterConfig) -> Drafter:
    from drafter_service.drafters.dflash.checkpoint import DFLASH

    return _make_block_drafter(spec, config, spec.model or pretrained("dflash"), DFLASH)


def _make_dflash2(spec: DrafterSpec, config: DrafterConfig) -> Drafter:
    from drafter_service.drafters.dflash2.checkpoint import DFLASH2

    return _make_block_drafter(spec, config, _named_model(spec), DFLASH2)


def _make_dspark(spec: DrafterSpec, config: DrafterConfig) -> Drafter:
    from drafter_service.drafters.dspark.checkpoint import DSPARK

    return _make_block_drafter(spec, config, _named_model(spec), DSPARK)


def _make_eagle3(spec: DrafterSpec, config: DrafterConfig) -> Drafter:
    from drafter_service.drafters.eagle3.checkpoint import EagleCheckpoint, num_layers
    from drafter_service.drafters.eagle3.drafter import EagleDrafter

    return EagleDrafter(
        spec.name,
        EagleCheckpoint.load(
            _named_model(spec),
            dtype=config.dtype,
            device=config.device,
            threads=config.threads,
            num_target_layers=num_layers(config.target),
        ),
        kv_budget_bytes=int(config.kv_cache_mib * 2**20),
        max_draft_depth=config.max_draft_depth,
        max_draft_nodes=config.max_draft_nodes,
    )


def _refuse_other_kinds(model: str) -> None:
    """Refuse what transformers would take for a causal LM with missing weights.

    Raises:
        InvalidArgumentError: the checkpoint is a drafter that needs a target.
    """
    from specdec.models.files import resolve_model

    folder = resolve_model(model)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, RecursionError):
        return  # whoever loads it says what is wrong
    if isinstance(config, dict) and kind_of(config)[1] not in ("causal-lm", ""):
        raise InvalidArgumentError(f"{folder}: {why_other(config, 'causal-lm')}", field="drafter")


def _named_model(spec: DrafterSpec) -> str:
    """Return the checkpoint of a family that has none bundled.

    Raises:
        InvalidArgumentError: none is named.
    """
    if not spec.model:
        raise InvalidArgumentError(
            f"The {spec.family} drafter needs a model; write --drafter {spec.family}:FOLDER-OR-HUB-ID.",
            field="drafter",
        )
    return spec.model


def _make_block_drafter(spec: DrafterSpec, config: DrafterConfig, model: str, kind: Kind) -> Drafter:
    from drafter_service.drafters.dflash.checkpoint import DFlashCheckpoint
    from drafter_service.drafters.dflash.drafter import DFlashDrafter

    return DFlashDrafter(
        spec.name,
        DFlashCheckpoint.load(
            model, dtype=config.dtype, device=config.device, threads=config.threads, kind=kind
        ),
        kv_budget_bytes=int(config.kv_cache_mib * 2**20),
        max_draft_depth=config.max_draft_depth,
        max_draft_nodes=config.max_draft_nodes,
    )


def pretrained(family: str) -> str:
    """Return the folder of the bundled drafter of a family, which was made for the embedded target."""
    return str(Path(__file__).parent / "pretrained" / f"smollm2-135m-instruct-{family}")


FAMILIES: Mapping[str, DrafterFactory] = {
    "ngram": _make_ngram,
    "ngram-lm": _make_ngram_lm,
    "causal-lm": _make_causal_lm,
    "mtp": _make_mtp,
    "dflash": _make_dflash,
    "dflash2": _make_dflash2,
    "dspark": _make_dspark,
    "eagle3": _make_eagle3,
}


def load_drafters(
    config: DrafterConfig, families: Mapping[str, DrafterFactory] = FAMILIES
) -> dict[str, Drafter]:
    """Load every drafter of a configuration, by name.

    Raises:
        InvalidArgumentError: an unknown family or a name used twice.
        SpecdecError: a model cannot be loaded.
    """
    specs = [DrafterSpec.parse(text) for text in config.drafter]
    _check(specs, families)
    return {spec.name: families[spec.family](spec, config) for spec in specs}


def _check(specs: Sequence[DrafterSpec], families: Mapping[str, DrafterFactory]) -> None:
    names = [spec.name for spec in specs]
    for spec in specs:
        if spec.family not in families:
            raise InvalidArgumentError(
                f"Unknown drafter family {spec.family!r}; there are {', '.join(families)}.", field="drafter"
            )
        if names.count(spec.name) > 1:
            raise InvalidArgumentError(
                f"Two drafters are named {spec.name!r}; rename one with --drafter NAME={spec.family}:MODEL.",
                field="drafter",
            )
