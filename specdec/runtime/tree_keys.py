"""Where the keys of a draft tree go, so that branches share an attention call and each rounds as if alone.

Kernels sum over keys in an order that depends on where each key is. In bf16 on a CPU they sum up groups of 32
keys before they add them to the rest, in vectors that divide 32, and start afresh every 512 keys; a key that
is hidden adds exactly nothing. So a branch gets the bits it would get as a chain if each of its groups is
whole, begins at a multiple of 32 and comes after the ones before, whatever lies between. Groups that end
before the root are shared; the others are copied for every branch that continues them otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

_GROUP_KEYS = 32
_KERNEL_KEYS = 512


class TreeKeys:
    """Places of the keys of some branches of a tree.

    Args:
        start: the root's position; all before have the same place as position.
        parents: of each token the index of its parent, which comes before it; -1 of the root, the first.
    """

    def __init__(self, start: int, parents: Sequence[int]) -> None:
        self._start = start
        self._parents = parents
        self._stop = (start // _KERNEL_KEYS + 1) * _KERNEL_KEYS
        self.num_shared = start // _GROUP_KEYS * _GROUP_KEYS
        """Keys before the first group that some branch has a copy of: each query attends to them."""
        self.tokens: dict[int, int] = {}
        """Whose key is at a place, as its distance from the root's slot: a token's index, or, of a copied key
        from before the root, a negative number."""
        self.paths: dict[int, tuple[int, ...]] = {}
        """By token, the places from `num_shared` on that it attends to, in order, its own last."""

    @property
    def num_places(self) -> int:
        """Places up to the last one used."""
        return max(self.tokens) + 1

    def add(self, path: Sequence[int]) -> bool:
        """Find places for the tokens of a path from the root; False if they do not fit beside the others."""
        tokens, paths = dict(self.tokens), dict(self.paths)
        for token in path:
            if token not in self.paths:
                self._place(token)
        if self.num_places <= self._stop:
            return True
        self.tokens, self.paths = tokens, paths
        return False

    def _place(self, token: int) -> None:
        if not token:
            self.tokens[self._start] = token
            self.paths[token] = tuple(range(self.num_shared, self._start + 1))
            return
        path = self.paths[self._parents[token]]
        place = path[-1] + 1
        num_begun = len(path) % _GROUP_KEYS  # keys of the group that this one is in
        if not num_begun or place in self.tokens:
            group = -(-self.num_places // _GROUP_KEYS) * _GROUP_KEYS
            copied = path[len(path) - num_begun :]
            path = (*path[: len(path) - num_begun], *range(group, group + num_begun))
            place = group + num_begun
            for old, new in zip(copied, path[len(path) - num_begun :], strict=True):
                self.tokens[new] = self.tokens.get(old, old - self._start)
        self.tokens[place] = token
        self.paths[token] = (*path, place)
