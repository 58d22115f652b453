"""An EAGLE-3 draft in the making."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from drafter_service.drafters.base import CachedSession, Confidence
from drafter_service.drafters.growing import GrowingTree
from specdec.runtime.picks import PickContext


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """A token of a draft, from which a step may go on."""

    feature: Tensor  # [hidden_size]
    """What the step before returned, or that of the last pair."""
    path: tuple[int, ...]
    """Places of the steps that led here, none of which read this token yet."""


@dataclass(slots=True, eq=False)
class EagleRound:
    """One session's draft in the making."""

    session: CachedSession
    num_pairs: int
    num_wanted: int
    most_steps: int
    """Places for steps behind the pairs."""
    tree: GrowingTree | None = None
    """The draft where a tree is wanted."""
    draft: list[int] = field(default_factory=list)
    confidence: Confidence = field(init=False)
    """Decides where a chain ends."""
    num_steps: int = 0
    """Places for steps that are taken."""

    def __post_init__(self) -> None:
        self.confidence = self.session.confidence()

    def next_place(self) -> int:
        """Take the next place for a step's keys and values."""
        self.num_steps += 1
        return self.num_pairs + self.num_steps - 1

    def context(self, path: Sequence[int]) -> PickContext:
        """Return what the pick after a path of draft tokens depends on."""
        return PickContext(
            self.session.sampling, [*self.session.token_ids, *path], self.session.prompt_length
        )
