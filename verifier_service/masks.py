"""What output formats allow in the rows of a pass, in buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from specdec.contract.draft_tree import DraftTree
from specdec.contract.errors import SpecdecError
from verifier_service.session import Session

_FEWEST_ROWS = 64


@dataclass(frozen=True, slots=True)
class RowMasks:
    """What the rows of one session may pick."""

    mask: Tensor | None = None
    """See PickContext; None: the session's answer has no format."""
    errors: dict[int, SpecdecError] = field(default_factory=dict)
    """Rows of which it is not known, and why. The session fails if its answer gets to one of them."""

    def error_on(self, path: Sequence[int]) -> SpecdecError | None:
        """Return the error that an answer along a path of the draft gets to; None: it gets to none."""
        rows = (0, *(node + 1 for node in path)) if self.errors else ()
        return next((self.errors[row] for row in rows if row in self.errors), None)


class MaskBuffers:
    """Makes masks in memory of the host and copies them to the device, all masks of a pass at once.

    The buffers are allocated for the first answers with a format, and anew only for more rows than ever
    before.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._host = self._on_device = torch.empty((0, 0), dtype=torch.int32)

    def masks(self, rounds: Sequence[tuple[Session, DraftTree]]) -> list[RowMasks]:
        """Return what the rows of each session's round may pick. It holds until the next call."""
        num_rows = [len(draft) + 1 if session.guide else 0 for session, draft in rounds]
        if not any(num_rows):
            return [RowMasks()] * len(rounds)
        self._reserve(sum(num_rows), max(each.guide.num_words for each, _ in rounds if each.guide))
        parts = self._host[: sum(num_rows)].split(num_rows)
        errors = [
            session.guide.fill(part.numpy(), session.token_ids[session.prompt_length :], draft)
            if session.guide
            else {}
            for (session, draft), part in zip(rounds, parts, strict=True)
        ]
        on_device = self._on_device[: sum(num_rows)]
        if self._on_device is not self._host:
            on_device.copy_(self._host[: sum(num_rows)], non_blocking=True)
        return [
            RowMasks(part, failed) if session.guide else RowMasks()
            for (session, _), part, failed in zip(rounds, on_device.split(num_rows), errors, strict=True)
        ]

    def _reserve(self, num_rows: int, num_words: int) -> None:
        if num_rows <= len(self._host):
            return
        shape = (max(_FEWEST_ROWS, 2 * num_rows), num_words)
        is_elsewhere = self._device.type != "cpu"
        self._host = torch.empty(shape, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        self._on_device = torch.empty_like(self._host, device=self._device) if is_elsewhere else self._host
