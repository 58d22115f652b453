"""The checkpoint of a training run. A run that goes on from it must be the same run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from specdec.contract.errors import InvalidArgumentError

_PARTS = ("identity", "trainee", "optimizer", "generator", "history")
_TOLERANCE = 0.01
"""Relative tolerance of measured numbers, which other threads and devices round otherwise."""


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a run's state; an earlier file is replaced in one move."""
    scratch = path.with_suffix(".tmp")
    torch.save(dict(state), scratch)
    scratch.replace(path)


def read_checkpoint(path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Read the state that was written.

    Args:
        identity: what describes the run that goes on.

    Raises:
        InvalidArgumentError: the file is damaged, or belongs to another run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file surfaces as many types
        raise InvalidArgumentError(
            f"{path} cannot be read ({type(error).__name__}): it is damaged; delete it to begin anew, or "
            "choose another --out.",
            field="resume",
        ) from error
    missing = [name for name in _PARTS if not isinstance(state, dict) or name not in state]
    if missing:
        raise InvalidArgumentError(
            f"{path} lacks {', '.join(missing)}: it is damaged or from another version; delete it to begin "
            "anew, or choose another --out.",
            field="resume",
        )
    if others := _differences(state["identity"], identity):
        raise InvalidArgumentError(
            f"{path} belongs to a run with other settings ({'; '.join(others)}); give the same ones, --init "
            "included, or another --out.",
            field="resume",
        )
    return dict(state)


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {found.get(name)}, not {wanted.get(name)}"
        for name in dict.fromkeys([*found, *wanted])
        if not _is_same(found.get(name), wanted.get(name))
    ]


def _is_same(found: Any, wanted: Any) -> bool:
    if isinstance(found, float) and isinstance(wanted, float):
        return math.isclose(found, wanted, rel_tol=_TOLERANCE)
    if isinstance(found, list) and isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(_is_same, found, wanted))
    return bool(found == wanted)
