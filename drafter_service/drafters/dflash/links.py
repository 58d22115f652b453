"""What makes a draft of a block depend on the drafts before it.

The places of a block are computed side by side, so each is a guess that does not know which token was picked
before it. Links correct the guess of a place by that token. Nothing else of the block is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from drafter_service.drafters.head import DraftHead
from specdec.state.weights import TargetWeights


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """The places of a pass's blocks that draft, block after block."""

    states: Tensor  # [num_places, hidden_size]
    """What the head reads."""
    anchors: Tensor  # [num_blocks]
    """Token of each block's anchor."""
    anchor_states: Tensor | None = None  # [num_blocks, hidden_size]
    """States of the anchors' own places; None: these draft, and are among the states."""


@dataclass(frozen=True, slots=True, eq=False)
class LinkedPlaces:
    """What links say of some places, each after a token."""

    logits: Tensor  # [num_rows, draft_vocab_size]
    memory: Tensor | None = None  # [num_rows, size]
    """What the links remember of each path up to there; None: nothing."""
    confidence: Tensor | None = None  # [num_rows]
    """Probability that a draft there is accepted if those before it are; None: the links do not say."""


class Walk(Protocol):
    """A way through the places of a pass, from each token to what may follow it."""

    def begin(self) -> Tensor | None:
        """Return what is remembered at the beginning of each block [num_blocks, size]; None: nothing."""

    def follow(self, rows: Tensor, before: Tensor, memory: Tensor | None) -> LinkedPlaces:
        """Say what may follow tokens.

        Args:
            rows: which of the places each token leads to [num_rows].
            before: the tokens [num_rows].
            memory: what is remembered of each path that leads to its token [num_rows, size].
        """


class Links(Protocol):
    """The part of a checkpoint that corrects places."""

    def walk(self, places: Places, head: DraftHead, weights: TargetWeights) -> Walk:
        """Prepare all that does not depend on the tokens that are picked."""
