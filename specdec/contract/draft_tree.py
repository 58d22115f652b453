"""Draft trees: several guesses at what follows, in which common beginnings are stored once.

Nodes are numbered so that a parent comes before its children. The root is the anchor token, which does not
count as a node. A chain is the tree with one path. A token is accepted if and only if it equals the target's
own pick, and that makes a tree as exact as a chain: the accepted path leads from the anchor to the child that
equals the pick, and ends at the first node without such a child.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from specdec.contract.errors import InvalidArgumentError

ANCHOR = -1
"""The parent index of a node at depth 1."""


@dataclass(frozen=True, slots=True)
class DraftTree:
    """A checked draft. Make one with `of`, which does the checking."""

    token_ids: tuple[int, ...] = ()
    parent_indices: tuple[int, ...] = ()
    """The parent index of each token; ANCHOR stands for the anchor token. Empty: the draft is a chain."""

    @classmethod
    def of(cls, token_ids: Sequence[int], parent_indices: Sequence[int] = ()) -> DraftTree:
        """Build the tree of the given nodes; a chain if every node is the parent of the next.

        Raises:
            InvalidArgumentError: a parent is missing or comes after its child, or two siblings are equal.
        """
        if not parent_indices:
            return cls(tuple(token_ids))
        if len(parent_indices) != len(token_ids):
            raise _no_tree(
                f"There are {len(parent_indices)} parent_indices for {len(token_ids)} tokens; send one index "
                "for each token, or leave parent_indices empty for a chain."
            )
        for index, parent in enumerate(parent_indices):
            if not ANCHOR <= parent < index:
                raise _no_tree(
                    f"parent_indices[{index}] is {parent}; send the index of an earlier token, or -1 for the "
                    "anchor."
                )
        if len(set(zip(parent_indices, token_ids, strict=True))) < len(token_ids):
            raise _no_tree("Two children of one parent are the same token; send each child once.")
        if all(parent == index - 1 for index, parent in enumerate(parent_indices)):
            return cls(tuple(token_ids))
        return cls(tuple(token_ids), tuple(parent_indices))

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_chain(self) -> bool:
        """Whether the draft has at most one path."""
        return not self.parent_indices

    @property
    def parents(self) -> Sequence[int]:
        """The parent index of each token; chains have them as well."""
        return self.parent_indices or range(ANCHOR, len(self) - 1)

    @property
    def depths(self) -> Sequence[int]:
        """The depth of each token: how many steps it is away from the anchor, at least 1."""
        return depths_of(self.parent_indices) if self.parent_indices else range(1, len(self) + 1)

    @property
    def depth(self) -> int:
        """The number of tokens on the longest path."""
        return max(self.depths, default=0)

    def path_to(self, index: int) -> list[int]:
        """Return the nodes of the path that leads from the anchor to node `index`, that node included."""
        path: list[int] = []
        while index != ANCHOR:
            path.append(index)
            index = self.parents[index]
        return path[::-1]

    def select(self, indices: Sequence[int]) -> DraftTree:
        """Build the tree of the nodes at `indices`, in that order. A parent must come before its children."""
        if self.is_chain:
            assert all(index == place for place, index in enumerate(indices)), (
                "a chain is cut short; nodes are never picked out of it"
            )
            return DraftTree(self.token_ids[: len(indices)])
        places = {index: place for place, index in enumerate(indices)} | {ANCHOR: ANCHOR}
        parents = [places[self.parent_indices[index]] for index in indices]
        return DraftTree.of([self.token_ids[index] for index in indices], parents)

    def fitting(self, *, max_depth: int, draft_nodes: int) -> list[int]:
        """Return the first `draft_nodes` of the nodes within `max_depth`, listed depth first.

        In that order, the nodes that a path does not share with an earlier path follow one another.
        """
        kept = [index for index, depth in enumerate(self.depths) if depth <= max_depth][:draft_nodes]
        return kept if self.is_chain else sorted(kept, key=self.path_to)


NO_DRAFT = DraftTree()
"""The empty draft, which leaves the anchor alone."""


def depths_of(parent_indices: Sequence[int]) -> list[int]:
    """Return the depth of each node: how many nodes its path has, the node itself included."""
    depths: list[int] = []
    for parent in parent_indices:
        depths.append(1 if parent == ANCHOR else depths[parent] + 1)
    return depths


def _no_tree(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, field="parent_indices", reason="NO_DRAFT_TREE")


def from_chains(chains: Iterable[Sequence[int]], draft_nodes: int) -> DraftTree:
    """Build a tree from chains, in their order, until the tree has `draft_nodes` nodes.

    Only the last chain that is used can be cut short; the chains after it are never read.
    """
    nodes: dict[tuple[int, int], int] = {}
    """Index of each node by (parent, token id)."""
    for chain in chains:
        parent = ANCHOR
        for token_id in chain:
            if len(nodes) == draft_nodes and (parent, token_id) not in nodes:
                break
            parent = nodes.setdefault((parent, token_id), len(nodes))
        if len(nodes) == draft_nodes:
            break
    return DraftTree.of([token_id for _, token_id in nodes], [parent for parent, _ in nodes])


def merge(trees: Sequence[DraftTree], draft_nodes: int) -> tuple[DraftTree, list[list[int]]]:
    """Merge several proposals into one tree of at most `draft_nodes` nodes.

    The proposers take turns, one node each, in the order in which they sent their nodes, which should be
    best first. A node that the tree already has takes no room. A node that does not find room is left out,
    together with its descendants.

    Returns:
        The tree, and for each proposal the nodes of the tree that it contains, in the proposal's own order.
    """
    nodes: dict[tuple[int, int], int] = {}
    """Index of each node by (parent, token id)."""

    def place(parent: int | None, token_id: int) -> int | None:
        if parent is None:
            return None
        if (parent, token_id) not in nodes and len(nodes) < draft_nodes:
            nodes[parent, token_id] = len(nodes)
        return nodes.get((parent, token_id))

    places: list[list[int | None]] = [[] for _ in trees]
    """For each proposal, the index of each of its nodes in the merged tree; None: the node found no room."""
    for index in range(max(map(len, trees), default=0)):
        for tree, placed in zip(trees, places, strict=True):
            if index < len(tree):
                parent = tree.parents[index]
                placed.append(place(ANCHOR if parent == ANCHOR else placed[parent], tree.token_ids[index]))
    tree = DraftTree.of([token_id for _, token_id in nodes], [parent for parent, _ in nodes])
    return tree, [[node for node in placed if node is not None] for placed in places]
