"""The links of DFlash 2: every place has a few candidates, and neighbouring candidates are scored as pairs.

The score of token b after token a is b's logit plus <A[a] * W h, B[b]>, where h is the state of b's place, A
and B are tables of the vocabulary, and W is a projection. Tokens that are not candidates of a place are not
drafted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from drafter_service.drafters.dflash.links import LinkedPlaces, Places
from drafter_service.drafters.head import DraftHead
from drafter_service.drafters.weights import check_rows
from specdec.runtime.decoder.layers import Linear
from specdec.runtime.prepack import multiplier
from specdec.state.weights import TargetWeights


@dataclass(frozen=True, slots=True, eq=False)
class Selector:
    """The tables that score pairs."""

    predecessors: Tensor  # [vocab_size, rank]
    successors: Tensor  # [vocab_size, rank]
    project: Linear
    """From states [rows, hidden_size] to [rows, rank]."""
    num_candidates: int
    """Of each place."""

    @classmethod
    def of(
        cls, weights: Mapping[str, Tensor], num_candidates: int, rank: int, sizes: tuple[int, int]
    ) -> Selector:
        """Make it of a checkpoint's weights.

        Args:
            sizes: of the vocabulary, 0 being unknown, and of a state.

        Raises:
            KeyError, ValueError: weights are missing or do not fit each other.
        """
        tables = weights["predecessor_codebook"], weights["successor_codebook"]
        projection = weights["hidden_projection.weight"]
        vocab_size, hidden_size = sizes
        widths = {(table.ndim, *table.shape[1:]) for table in tables}
        if widths != {(2, rank)} or projection.shape != (rank, hidden_size):
            shapes = [[*tensor.shape] for tensor in (*tables, projection)]
            raise ValueError(f"the selector's tables and projection are {shapes}, and its rank is {rank}")
        for table in tables:
            check_rows("a codebook", table, vocab_size)
        if num_candidates < 1:
            raise ValueError(f"selector_top_k is {num_candidates}")
        return cls(*tables, multiplier(projection), num_candidates)

    def walk(self, places: Places, head: DraftHead, weights: TargetWeights) -> SelectorWalk:
        """Choose every place's candidates; see `Links`."""
        logits = head.logits(places.states, weights)
        values, token_ids = logits.topk(min(self.num_candidates, logits.shape[-1]))
        successors = embedding(token_ids, self.successors)
        return SelectorWalk(
            self, logits.shape[-1], values, token_ids, self.project(places.states), successors
        )


@dataclass(frozen=True, slots=True, eq=False)
class SelectorWalk:
    """A walk over candidates."""

    selector: Selector
    vocab_size: int
    values: Tensor  # [num_places, num_candidates]
    """The candidates' logits."""
    token_ids: Tensor  # [num_places, num_candidates]
    projected: Tensor  # [num_places, rank]
    successors: Tensor  # [num_places, num_candidates, rank]

    def begin(self) -> None:
        """Return nothing: a pair is two tokens."""

    def scores(self, rows: Tensor, before: Tensor) -> Tensor:
        """Return the scores of the candidates of places after tokens [num_rows, num_candidates]."""
        weights = embedding(before, self.selector.predecessors) * self.projected[rows]
        return self.values[rows] + torch.einsum("nr,ncr->nc", weights, self.successors[rows])

    def follow(self, rows: Tensor, before: Tensor, memory: Tensor | None) -> LinkedPlaces:
        """Say what may follow tokens; see `Walk`."""
        logits = self.values.new_full((len(rows), self.vocab_size), -math.inf)
        return LinkedPlaces(logits.scatter_(1, self.token_ids[rows], self.scores(rows, before)))
