"""What output formats allow in the rows of a pass, in buffers that stay where they are."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.contract.draft_tree import DraftTree
from specdec.contract.errors import InternalError, SpecdecError, log_defect
from verifier_service.session import Session

logger = logging.getLogger(__name__)

_FEWEST_ROWS = 64


@dataclass(frozen=True, slots=True)
class RowMasks:
    """What the rows of one session may pick."""

    mask: Tensor | None = None
    """See PickContext; None: the session's answer has no format."""
    unknown_nodes: frozenset[int] = frozenset()
    """Nodes of the draft that cannot be accepted, see `Guide.fill`."""
    error: SpecdecError | None = None
    """Why the answer cannot go on; None: it can."""


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
        on_host, on_device = self._host[: sum(num_rows)], self._on_device[: sum(num_rows)]
        masks = [
            _masks(session, draft, rows, mask)
            for (session, draft), rows, mask in zip(
                rounds, on_host.split(num_rows), on_device.split(num_rows), strict=True
            )
        ]
        if self._on_device is not self._host:
            on_device.copy_(on_host, non_blocking=True)
        return masks

    def _reserve(self, num_rows: int, num_words: int) -> None:
        if num_rows <= len(self._host):
            return
        shape = (max(_FEWEST_ROWS, 2 * num_rows), num_words)
        is_elsewhere = self._device.type != "cpu"
        self._host = torch.empty(shape, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        self._on_device = torch.empty_like(self._host, device=self._device) if is_elsewhere else self._host


def _masks(session: Session, draft: DraftTree, rows: Tensor, mask: Tensor) -> RowMasks:
    """Make the masks of a session's round.

    Args:
        rows: where they are made, in the host's memory [num_rows, num_words].
        mask: where they will be on the device, the same shape.
    """
    if session.guide is None:
        return RowMasks()
    try:
        output_token_ids = session.token_ids[session.prompt_length :]
        return RowMasks(mask, session.guide.fill(rows.numpy(), output_token_ids, draft))
    except SpecdecError as error:
        return RowMasks(mask, error=error)
    # A library that panics raises a BaseException. The other answers of the pass have no part in it.
    except BaseException as error:
        log_defect(logger, "an output format could not be followed", error)
        return RowMasks(
            mask, error=InternalError(f"The output format failed: {type(error).__name__}: {error}")
        )
