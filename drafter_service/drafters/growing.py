"""Draft trees of drafters that know probabilities: the likeliest guesses first.

A node's worth is the probability that its whole path is right, as the drafter sees it: the product along the
path. Drafters that go step by step follow EAGLE-2 (arXiv 2406.16858); where all products are known at once,
as those of a block's marginals are, a heap finds the best.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush, nlargest

from drafter_service.drafters.base import DraftItem
from specdec.contract.draft_tree import ANCHOR, DraftTree

MAX_CHILDREN = 8
"""Most continuations of a node that are considered."""
MAX_STEP_NODES = 8
"""Most nodes of a session that are expanded in one step."""

Candidates = Sequence[tuple[float, int]]
"""(log probability, token id) pairs, best first."""


@dataclass(frozen=True, slots=True)
class _Node:
    parent: int
    token_id: int
    depth: int
    log_prob: float
    """Log probability of the whole path."""


@dataclass(frozen=True, slots=True)
class _Sibling:
    """A candidate to be a child of a node."""

    cost: float
    """Negative log probability of the candidate's path."""
    parent: int
    rank: int
    """Index among the candidates."""
    parent_cost: float
    family: Candidates
    """All candidates to be children of that node."""

    def __lt__(self, other: _Sibling) -> bool:
        return (self.cost, self.parent, self.rank) < (other.cost, other.parent, other.rank)


class GrowingTree:
    """One session's tree in the making.

    Args:
        max_depth: most tokens in a row.
        draft_nodes: most tokens.
        min_confidence: probability, 0 to 1, below which a token does not follow another one.
        min_path_confidence: probability, 0 to 1, below which a path is left out.
    """

    def __init__(
        self,
        *,
        max_depth: int,
        draft_nodes: int,
        min_confidence: float = 0.0,
        min_path_confidence: float = 0.0,
    ) -> None:
        self._max_depth = max_depth
        self._draft_nodes = draft_nodes
        self._threshold = math.log(min_confidence) if min_confidence else -math.inf
        self._least = math.log(min_path_confidence) if min_path_confidence else -math.inf
        self._nodes: list[_Node] = []
        self._expanded: set[int] = set()

    def frontier(self) -> list[int]:
        """Return the nodes to expand next, ANCHOR at first; empty: the tree would not change."""
        if ANCHOR not in self._expanded:
            return [ANCHOR]
        open_nodes = [
            index
            for index in self._best()
            if index not in self._expanded and self._nodes[index].depth < self._max_depth
        ]
        return open_nodes[:MAX_STEP_NODES]

    def expand(self, parent: int, candidates: Candidates, *, are_sure: bool = False) -> None:
        """Add the candidates to follow a node of the frontier.

        Args:
            are_sure: whether it is known that they are likely enough, whatever their probabilities.
        """
        self._expanded.add(parent)
        depth = 1 + (0 if parent == ANCHOR else self._nodes[parent].depth)
        log_prob = 0.0 if parent == ANCHOR else self._nodes[parent].log_prob
        for own, token_id in candidates:
            is_likely = (are_sure or own >= self._threshold) and log_prob + own >= self._least
            if is_likely or not self._nodes:  # the first token is proposed in any case
                self._nodes.append(_Node(parent, token_id, depth, log_prob + own))

    def parent(self, index: int) -> int:
        """Return a node's parent."""
        return self._nodes[index].parent

    def path(self, index: int) -> list[int]:
        """Return the tokens from the anchor's child to a node; empty for ANCHOR."""
        token_ids: list[int] = []
        while index != ANCHOR:
            token_ids.append(self._nodes[index].token_id)
            index = self._nodes[index].parent
        return token_ids[::-1]

    def tree(self) -> DraftTree:
        """Return the best nodes, best first: a parent is never worse than its child, and comes before it."""
        best = self._best()
        places = {index: place for place, index in enumerate(best)} | {ANCHOR: ANCHOR}
        nodes = [self._nodes[index] for index in best]
        return DraftTree.of([node.token_id for node in nodes], [places[node.parent] for node in nodes])

    def _best(self) -> list[int]:
        """Return the nodes that would be the tree now, best first."""
        indices = range(len(self._nodes))
        return nlargest(self._draft_nodes, indices, key=lambda index: (self._nodes[index].log_prob, -index))

    def best_paths(self, candidates: Callable[[list[int]], Candidates]) -> DraftTree:
        """Return the tree of the likeliest paths, where what may follow is known for all paths at once.

        Args:
            candidates: returns what may follow a path of tokens after the anchor, at first the empty path.
        """
        waiting: list[_Sibling] = []

        def enter(parent: int, rank: int, parent_cost: float, family: Candidates) -> None:
            if rank == len(family):
                return
            own = family[rank][0]
            is_likely = own >= self._threshold and own - parent_cost >= self._least
            if is_likely or not self._nodes:
                heappush(waiting, _Sibling(parent_cost - own, parent, rank, parent_cost, family))

        # Of each family, only the best sibling that is not a node yet waits.
        enter(ANCHOR, 0, 0.0, candidates([]))
        while waiting and len(self._nodes) < self._draft_nodes:
            best = heappop(waiting)
            depth = 1 if best.parent == ANCHOR else self._nodes[best.parent].depth + 1
            self._nodes.append(_Node(best.parent, best.family[best.rank][1], depth, -best.cost))
            enter(best.parent, best.rank + 1, best.parent_cost, best.family)
            if depth < self._max_depth and len(self._nodes) < self._draft_nodes:
                index = len(self._nodes) - 1
                enter(index, 0, best.cost, candidates(self.path(index)))
        return DraftTree.of([node.token_id for node in self._nodes], [node.parent for node in self._nodes])


def growing_tree(item: DraftItem, max_depth: int) -> GrowingTree:
    """Return an empty tree as an item asks for it, of at most `max_depth` tokens in a row."""
    return GrowingTree(
        max_depth=max_depth,
        draft_nodes=item.draft_nodes,
        min_confidence=item.session.min_draft_confidence,
        min_path_confidence=item.session.min_path_confidence,
    )
