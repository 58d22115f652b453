"""Draft trees: several guesses at what follows, common beginnings once.

Nodes are numbered so that a parent comes before its children; the root, which is no node, is the anchor
token. A chain is the tree with one path. Under the rule that a token is accepted if and only if it equals the
target's own pick, a tree is as exact as a chain: the accepted path leads from the anchor to the child that
equals the pick, as far as there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from specdec.contract.errors import InvalidArgumentError

ANCHOR = -1
"""Parent of a node at depth 1."""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """A draft; made by `of`, which checks it."""

    token_ids: tuple[int, ...] = ()
    parent_indices: tuple[int, ...] = ()
    """Per token the index of its parent, ANCHOR for a child of the anchor. Empty: a chain."""

    @classmethod
    def of(cls, token_ids: Sequence[int], parent_indices: Sequence[int] = ()) -> DraftTree:
        """The tree of these nodes; where every node is the parent of the next, the chain it is.

        Raises:
            InvalidArgumentError: a parent is missing or does not precede its child, or siblings are equal.
        """
        if not parent_indices:
            return cls(tuple(token_ids))
        if len(parent_indices) != len(token_ids):
            raise _no_tree(
                f"There are {len(parent_indices)} parent_indices for {len(token_ids)} tokens; send one for "
                "each, or none for a chain."
            )
        for index, parent in enumerate(parent_indices):
            if not ANCHOR <= parent < index:
                raise _no_tree(
                    f"parent_indices[{index}] is {parent}; it must be -1, for the anchor, or the index of an "
                    "earlier token."
                )
        if len(set(zip(parent_indices, token_ids, strict=True))) < len(token_ids):
            raise _no_tree("Two children of one parent are the same token; send each once.")
        if all(parent == index - 1 for index, parent in enumerate(parent_indices)):
            return cls(tuple(token_ids))
        return cls(tuple(token_ids), tuple(parent_indices))

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_chain(self) -> bool:
        """Whether it has one path, or none."""
        return not self.parent_indices

    @property
    def parents(self) -> Sequence[int]:
        """Per token the index of its parent, of chains, too."""
        return self.parent_indices or range(ANCHOR, len(self) - 1)

    @property
    def depths(self) -> Sequence[int]:
        """Per token how many tokens it is after the anchor, at least 1."""
        return depths_of(self.parent_indices) if self.parent_indices else range(1, len(self) + 1)

    @property
    def depth(self) -> int:
        """Tokens on the longest path."""
        return max(self.depths, default=0)

    def path_to(self, index: int) -> list[int]:
        """Nodes from the anchor's child to `index`."""
        path: list[int] = []
        while index != ANCHOR:
            path.append(index)
            index = self.parents[index]
        return path[::-1]

    def select(self, indices: Sequence[int]) -> DraftTree:
        """The tree of some nodes, in another order perhaps; each node's parent must come before it."""
        if self.is_chain:
            assert all(index == place for place, index in enumerate(indices)), (
                "a chain is cut, not picked from"
            )
            return DraftTree(self.token_ids[: len(indices)])
        places = {index: place for place, index in enumerate(indices)} | {ANCHOR: ANCHOR}
        parents = [places[self.parent_indices[index]] for index in indices]
        return DraftTree.of([self.token_ids[index] for index in indices], parents)

    def fitting(self, *, max_depth: int, max_num_nodes: int) -> list[int]:
        """Nodes that are not too deep, of those the first `max_num_nodes`, depth first.

        Depth first, a path's nodes that no earlier path has follow one another.
        """
        kept = [index for index, depth in enumerate(self.depths) if depth <= max_depth][:max_num_nodes]
        return kept if self.is_chain else sorted(kept, key=self.path_to)


NO_DRAFT = DraftTree()
"""No guess: the anchor alone."""


def depths_of(parent_indices: Sequence[int]) -> list[int]:
    """Per node how many nodes its path has, itself included."""
    depths: list[int] = []
    for parent in parent_indices:
        depths.append(1 if parent == ANCHOR else depths[parent] + 1)
    return depths


def _no_tree(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, field="parent_indices", reason="NO_DRAFT_TREE")


def from_chains(chains: Iterable[Sequence[int]], max_num_nodes: int) -> DraftTree:
    """The tree of several chains, the first ones whole, until it has `max_num_nodes` nodes.

    No more chains are taken than are needed for that.
    """
    nodes: dict[tuple[int, int], int] = {}
    """Index by (parent, token id)."""
    for chain in chains:
        parent = ANCHOR
        for token_id in chain:
            if len(nodes) == max_num_nodes and (parent, token_id) not in nodes:
                break
            parent = nodes.setdefault((parent, token_id), len(nodes))
        if len(nodes) == max_num_nodes:
            break
    return DraftTree.of([token_id for _, token_id in nodes], [parent for parent, _ in nodes])


def merge(trees: Sequence[DraftTree], max_num_nodes: int) -> tuple[DraftTree, list[list[int]]]:
    """One tree of several proposals, of at most `max_num_nodes` nodes.

    Proposers take turns, a node each, in the order in which they sent them: best first, if they do as they
    should. A node that is there already takes no room; one that finds none goes without its descendants.

    Returns:
        The tree, and per proposal which of the tree's nodes it contains, in its own order.
    """
    nodes: dict[tuple[int, int], int] = {}
    """Index by (parent, token id)."""

    def place(parent: int | None, token_id: int) -> int | None:
        if parent is None:
            return None
        if (parent, token_id) not in nodes and len(nodes) < max_num_nodes:
            nodes[parent, token_id] = len(nodes)
        return nodes.get((parent, token_id))

    places: list[list[int | None]] = [[] for _ in trees]
    """Per proposal, where each of its nodes is in the merged tree; None: it found no room."""
    for index in range(max(map(len, trees), default=0)):
        for tree, mine in zip(trees, places, strict=True):
            if index < len(tree):
                parent = tree.parents[index]
                mine.append(place(ANCHOR if parent == ANCHOR else mine[parent], tree.token_ids[index]))
    tree = DraftTree.of([token_id for _, token_id in nodes], [parent for parent, _ in nodes])
    return tree, [[node for node in mine if node is not None] for mine in places]
