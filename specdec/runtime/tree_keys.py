"""Where the keys of a draft tree go, so that branches share an attention call and each rounds as if alone.

Kernels sum over keys in an order that depends on where each key is. In bf16 on a CPU they sum up groups of 32
keys before they add them to the rest, in vectors that divide 32, and start afresh every 512 keys; a key that
is hidden adds exactly nothing. So a branch gets the bits it would get as a chain if each of its groups is
whole, begins at a multiple of 32 and comes after the ones before, whatever lies between. Groups that end
before the root are shared; the others are copied for every branch that continues them otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

_GROUP_KEYS = 32
_KERNEL_KEYS = 512


class Branches(Enum):
    """How the branches of a tree are computed."""

    APART = "apart"
    """Each in a call of its own."""
    EXACT = "exact"
    """Side by side, laid out so that none rounds otherwise."""
    MASKED = "masked"
    """Side by side, every key in its slot: where a pass of another size rounds otherwise in any case."""


class TreeKeys:
    """Places of the keys of some branches of a tree.

    Args:
        start: the root's position; all before have the same place as position.
        parents: of each token the index of its parent, which comes before it; -1 of the root, the first.
        is_exact: whether each branch must round as if alone.
    """

    def __init__(self, start: int, parents: Sequence[int], *, is_exact: bool = True) -> None:
        self._start = start
        self._parents = parents
        self._is_exact = is_exact
        self._stop = (start // _KERNEL_KEYS + 1) * _KERNEL_KEYS if is_exact else math.inf
        self.num_shared = start // _GROUP_KEYS * _GROUP_KEYS if is_exact else start
        """Keys before the first group that some branch has a copy of: each query attends to them."""
        self.tokens: dict[int, int] = {}
        """Whose key is at a place, as its distance from the root's slot: a token's index, or, of a copied key
        from before the root, a negative number."""
        self.paths: dict[int, tuple[int, ...]] = {}
        """The places from `num_shared` on that each token attends to, in order, its own last."""

    @property
    def num_places(self) -> int:
        """Places up to the last one used."""
        return max(self.tokens) + 1

    @property
    def has_room(self) -> bool:
        """Whether a second branch could fit beside the first."""
        return self.num_shared + 2 * _GROUP_KEYS <= self._stop

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
            path, place = tuple(range(self.num_shared, self._start)), self._start
        elif self._is_exact:
            path, place = self._follow(self.paths[self._parents[token]])
        else:
            path, place = self.paths[self._parents[token]], self._start + token
        self.tokens[place] = token
        self.paths[token] = (*path, place)

    def _follow(self, path: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
        """The path, whose last group may be another copy now, and where the key after it goes."""
        place = path[-1] + 1
        num_begun = len(path) % _GROUP_KEYS  # keys of the group that this one is in
        if num_begun and place not in self.tokens:
            return path, place
        group = -(-self.num_places // _GROUP_KEYS) * _GROUP_KEYS
        kept, copied = path[: len(path) - num_begun], path[len(path) - num_begun :]
        for new, old in enumerate(copied, group):
            self.tokens[new] = self.tokens.get(old, old - self._start)
        return (*kept, *range(group, group + num_begun)), group + num_begun
