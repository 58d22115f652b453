"""Blocks of a KV pool that some of its layers have in common: which are free, who uses them, what they hold.

A layer's keys and values of block b are at the same place in each layer of the group.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy
import numpy.typing

from specdec.runtime.prefix_cache import PrefixCache

_RUNS = re.compile(b"\1+")
"""Blocks next to each other in a table of blocks that are free."""


class BlockGroup:
    """Hands out blocks from a free list. Used from one thread.

    Args:
        generations: what readers see of each block: a number that tells its owner, or what it holds, from
            earlier and later ones; 0 while it is free [num_blocks].
    """

    def __init__(self, generations: numpy.typing.NDArray[numpy.int64]) -> None:
        self.num_blocks = len(generations)
        self.generations = generations
        self.prefixes = PrefixCache()
        """Full blocks by their text; those that nobody uses give way when there are no others."""
        self._free = bytearray(b"\1" * self.num_blocks)
        self._num_users = [0] * self.num_blocks

    @property
    def num_available(self) -> int:
        """Blocks that are free, or only kept."""
        return self._free.count(1) + self.prefixes.num_idle

    def take(
        self, num_blocks: int, generation: int, *, after: int = -1, leaves_gaps: bool = False
    ) -> tuple[int, ...]:
        """Take so many of the blocks that are available, at the expense of those that are only kept.

        Args:
            after: the block that they follow if there they are free; -1: they follow none.
            leaves_gaps: whether to leave room behind them and before them.

        Returns:
            The blocks, contiguous if there are such.
        """
        following = range(after + 1, after + 1 + num_blocks)
        goes_on = after >= 0 and following.stop <= self.num_blocks
        if goes_on and all(self._free[following.start : following.stop]):
            blocks = tuple(following)
        else:
            blocks = self._find(num_blocks, leaves_gaps)
        for block in blocks:
            self._free[block] = 0
        self.hold(blocks)
        self.generations[list(blocks)] = generation
        return blocks

    def hold(self, blocks: Iterable[int]) -> None:
        """Count another user of blocks that somebody has or that are kept."""
        self.prefixes.use(blocks)
        for block in blocks:
            self._num_users[block] += 1

    def leave(self, blocks: Sequence[int]) -> None:
        """Count a user less. What nobody uses is free, unless it is kept for texts that begin alike."""
        # The last block of a text becomes the oldest: without those before it, it is of no use.
        for block in reversed(blocks):
            assert self._num_users[block], f"block {block} freed twice"
            self._num_users[block] -= 1
            if not self._num_users[block] and not self.prefixes.leave(block):
                self._release(block)

    def keep(self, key: bytes, block: int, hidden_names: frozenset[str]) -> None:
        """Note what a block holds from now on, for as long as it is in use or kept."""
        freed = self.prefixes.put(key, block, hidden_names)
        if freed is not None:
            self._release(freed)

    def _release(self, block: int) -> None:
        self._free[block] = 1
        self.generations[block] = 0

    def _find(self, num_blocks: int, leaves_gaps: bool) -> tuple[int, ...]:
        while self._free.count(1) < num_blocks:
            self._release(self.prefixes.evict())
        first = self._gap(num_blocks) if leaves_gaps else self._free.find(b"\1" * num_blocks)
        if first >= 0:
            return tuple(range(first, first + num_blocks))
        return tuple([block for block, is_free in enumerate(self._free) if is_free][:num_blocks])

    def _gap(self, num_blocks: int) -> int:
        """Return where a session that grows begins: amid the longest run of free blocks, so that it and the
        one before it can go on; -1: there is no run that is long enough."""
        runs = [(match.end() - match.start(), -match.start()) for match in _RUNS.finditer(self._free)]
        length, start = max(runs, default=(0, 0))
        if length < num_blocks:
            return -1
        return -start + (length - num_blocks) // 2 if start else 0
