"""What every drafter in training is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from drafter_service.training.batch import PackedBatch
from drafter_service.training.features import SequenceFeatures
from specdec.contract.errors import InvalidArgumentError


class Trainee(nn.Module, ABC):
    """A drafter in training. Its parameters are what is trained."""

    @property
    def max_draft_depth(self) -> int | None:
        """Most tokens it can draft in a round; None: any number."""
        return None

    @abstractmethod
    def loss(self, features: Sequence[SequenceFeatures], generator: torch.Generator) -> Tensor:
        """Return the loss of a batch, a scalar."""

    @torch.no_grad()
    def accepted(self, features: Sequence[SequenceFeatures], draft_depth: int) -> list[list[int]]:
        """Count the draft tokens that a greedy target accepts, for each sequence and anchor in it.

        The anchors of a sequence are the tokens of its answer but the last.
        """
        batch = PackedBatch.of(features)
        counts = torch.bincount(batch.anchors.sequence, minlength=len(features)).tolist()
        return [part.tolist() for part in self.num_accepted(batch, draft_depth).split(counts)]

    @abstractmethod
    def num_accepted(self, batch: PackedBatch, draft_depth: int) -> Tensor:
        """Count, for the anchors of a batch [num_anchors], the drafts before the first wrong one."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Describe the drafter without its weights in plain values: a run is resumed only with the same."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the drafter's checkpoint, without a card."""

    @abstractmethod
    def load(self, folder: Path) -> None:
        """Start from a drafter that was saved.

        Raises:
            InvalidArgumentError: it has another shape.
        """


def unlike(folder: Path, reason: object) -> InvalidArgumentError:
    """Return the error that says why a run cannot start from the drafter in a folder."""
    return InvalidArgumentError(f"{folder} is not a drafter like this one: {reason}", field="init")
