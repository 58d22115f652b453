"""Where the keys of a draft tree go, so that branches share an attention call and each rounds as if alone.

Kernels sum over keys in an order that depends on where each key is. In bf16 on a CPU they sum up groups of 32
keys before they add them to the rest, in vectors that divide 32, and start afresh every 512 keys; a key that
is hidden adds exactly nothing, nor do 512 of them. So a branch gets the bits it would get as a chain if each
of its groups is whole, begins at a multiple of 32 and comes after the ones before, and if its groups share
512 keys where they would in a chain, whatever lies between. Groups that end before the root are shared; the
others are copied for every branch that continues them otherwise. Where the root's 512 keys have no room for
another branch, further 512 keys begin with copies of what the root's begin with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy

from specdec.runtime.kv_pool import Indices

_GROUP_KEYS = 32
_KERNEL_KEYS = 512
_GROUPS_PER_KERNEL = _KERNEL_KEYS // _GROUP_KEYS


class Branches(Enum):
    """How the branches of a tree are computed."""

    APART = "apart"
    """Each in a call of its own."""
    EXACT = "exact"
    """Side by side, laid out so that none rounds otherwise."""
    MASKED = "masked"
    """Side by side, every key in its slot: where a pass of another size rounds otherwise in any case."""


@dataclass(frozen=True, slots=True)
class Path:
    """Which keys a token attends to, beside all those before the root's 512."""

    common: int
    """The first place of the keys that all tokens have in common: where they are, or a copy of them."""
    own: tuple[int, ...]
    """The places of the others, in order, the token's own last."""


@dataclass(frozen=True, slots=True)
class _Kernel:
    """512 places that kernels sum over before they start afresh."""

    is_next: bool
    """Whether they are for keys that come 512 after the root's."""
    num_groups: int
    """How many of its groups are taken."""


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
        self.num_shared = start // _KERNEL_KEYS * _KERNEL_KEYS if is_exact else start
        """Keys before the root's 512, each at its own place: every query attends to them."""
        self.num_common = start // _GROUP_KEYS * _GROUP_KEYS - self.num_shared if is_exact else 0
        """Keys from there to the first group that some branch has a copy of."""
        self._kernels = [_Kernel(False, self.num_common // _GROUP_KEYS + 1)]
        # With more, calls of their own cost less, for all queries meet the keys of all branches.
        self._most_kernels = max(2, self.num_shared // _KERNEL_KEYS + 1)
        self.tokens: dict[int, int] = {}
        """Whose key is at a place, as its distance from the root's slot: a token's index, or, of a copied key
        from before the root, a negative number. Copies of common keys are not in here."""
        self.paths: dict[int, Path] = {}
        """What each token attends to."""

    @property
    def num_places(self) -> int:
        """Places up to the last one used."""
        return max(self.tokens) + 1

    def positions(self) -> Indices:
        """Return the position whose slot has the key of each place [num_places]."""
        positions = numpy.arange(self.num_places)
        common = positions[self.num_shared : self.num_shared + self.num_common].copy()
        for index, kernel in enumerate(self._kernels[1:], 1):
            if not kernel.is_next:
                first = self._first_place(index)
                positions[first : first + len(common)] = common
        positions[[*self.tokens]] = [self._start + distance for distance in self.tokens.values()]
        return positions

    def add(self, path: Sequence[int]) -> bool:
        """Find places for the tokens of a path from the root; False if they do not fit beside the others."""
        tokens, paths, kernels = dict(self.tokens), dict(self.paths), list(self._kernels)
        for token in path:
            if token not in self.paths and not self._place(token):
                self.tokens, self.paths, self._kernels = tokens, paths, kernels
                return False
        return True

    def _place(self, token: int) -> bool:
        """Find a place for a token whose parent has one; False if there is none."""
        if not token:
            begun = range(self.num_shared + self.num_common, self._start)
            path = Path(self.num_shared, (*begun, self._start))
        elif self._is_exact:
            follow = self._follow(self.paths[self._parents[token]])
            if follow is None:
                return False
            path = follow
        else:
            parent = self.paths[self._parents[token]]
            path = replace(parent, own=(*parent.own, self._start + token))
        self.tokens[path.own[-1]] = token
        self.paths[token] = path
        return True

    def _follow(self, path: Path) -> Path | None:
        """Return the path to a key that comes next, whose last keys may be other copies; None: no room."""
        position = self.num_shared + self.num_common + len(path.own)
        kernel = self._kernel_of(path.own[-1])
        if position % _KERNEL_KEYS == 0:
            return self._moved(path, len(path.own), after=kernel)
        num_begun = position % _GROUP_KEYS
        if num_begun and path.own[-1] + 1 not in self.tokens:
            return replace(path, own=(*path.own, path.own[-1] + 1))
        if self._kernels[kernel].num_groups < _GROUPS_PER_KERNEL:
            return self._extended(path, len(path.own) - num_begun, kernel)
        # The whole path moves, as far as it is in these 512 keys.
        num_before = max(0, len(path.own) - position % _KERNEL_KEYS)
        return self._moved(path, num_before, self._kernel_of(path.own[num_before - 1]) if num_before else -1)

    def _moved(self, path: Path, num_kept: int, after: int) -> Path | None:
        """Return the path with all but its first keys in other 512 places, behind those of index `after`."""
        is_next = after >= 0
        num_groups = -(-(len(path.own) - num_kept + 1) // _GROUP_KEYS)
        for index, kernel in enumerate(self._kernels):
            has_room = kernel.num_groups + num_groups <= _GROUPS_PER_KERNEL
            if index > after and kernel.is_next == is_next and has_room:
                return self._extended(path, num_kept, index)
        if not is_next and not self.num_shared:
            return None  # a branch that has all its keys copied shares none
        num_common = 0 if is_next else self.num_common // _GROUP_KEYS
        if len(self._kernels) == self._most_kernels or num_common + num_groups > _GROUPS_PER_KERNEL:
            return None
        self._kernels.append(_Kernel(is_next, num_common))
        return self._extended(path, num_kept, len(self._kernels) - 1)

    def _extended(self, path: Path, num_kept: int, index: int) -> Path:
        """Return the path with its last keys copied to free groups of 512 places, and one place more."""
        kernel, copied = self._kernels[index], path.own[num_kept:]
        first = self._first_place(index) + kernel.num_groups * _GROUP_KEYS
        num_groups = len(copied) // _GROUP_KEYS + 1
        self._kernels[index] = replace(kernel, num_groups=kernel.num_groups + num_groups)
        for new, old in enumerate(copied, first):
            self.tokens[new] = self.tokens.get(old, old - self._start)
        common = path.common if kernel.is_next else self._first_place(index)
        return Path(common, (*path.own[:num_kept], *range(first, first + len(copied) + 1)))

    def _first_place(self, index: int) -> int:
        return self.num_shared + index * _KERNEL_KEYS

    def _kernel_of(self, place: int) -> int:
        return (place - self.num_shared) // _KERNEL_KEYS
