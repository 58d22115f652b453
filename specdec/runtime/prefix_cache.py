"""Full blocks of the KV pool by the text that they hold: sessions with the same beginning share them.

A block's key covers all the tokens up to its end, and whom they belong to: two sessions share a block only if
all of that is equal. What a block holds never changes while its key is known.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy


class PrefixKeys:
    """Keys of the full blocks of one session's text, which grows.

    Args:
        block_tokens: tokens of a block.
        owner: what tells apart those who must not share, such as caller and salt.
    """

    def __init__(self, block_tokens: int, *owner: str) -> None:
        self._block_tokens = block_tokens
        parts = "".join(f"{len(part)}:{part}" for part in owner)
        self._last = hashlib.sha256(parts.encode()).digest()
        self._keys: list[bytes] = []

    def of(self, token_ids: Sequence[int]) -> Sequence[bytes]:
        """Return the keys of all full blocks of the text, which begins as it did at the last call."""
        size = self._block_tokens
        while (len(self._keys) + 1) * size <= len(token_ids):
            start = len(self._keys) * size
            tokens = numpy.asarray(token_ids[start : start + size], numpy.uint32).tobytes()
            self._last = hashlib.sha256(self._last + tokens).digest()
            self._keys.append(self._last)
        return self._keys


@dataclass(frozen=True, slots=True)
class _Entry:
    block: int
    hidden_names: frozenset[str]
    """The hidden states that are kept with the block's KV."""


class PrefixCache:
    """Which blocks hold what, and which of them nobody uses, oldest first. Used from one thread."""

    def __init__(self) -> None:
        self._entries: dict[bytes, _Entry] = {}
        self._keys: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        self.num_forgotten = 0
        """How often hidden states were forgotten."""

    @property
    def num_idle(self) -> int:
        """Blocks that nobody uses, and that may be taken for something else."""
        return len(self._idle)

    def find(self, keys: Sequence[bytes], hidden_names: AbstractSet[str]) -> list[int]:
        """Return the blocks of the longest beginning that is here, with at least these hidden states."""
        blocks = []
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or not entry.hidden_names >= hidden_names:
                break
            blocks.append(entry.block)
        return blocks

    def block(self, key: bytes) -> int | None:
        """Return the block of that key; None: there is none."""
        entry = self._entries.get(key)
        return entry.block if entry else None

    def put(self, key: bytes, block: int, hidden_names: frozenset[str]) -> int | None:
        """Note what a block in use holds, unless another one has that and as many hidden states.

        Returns:
            A block that nobody uses and that is known no more; None: there is none.
        """
        known = self._entries.get(key)
        if block in self._keys or (known and known.hidden_names >= hidden_names):
            return None
        freed = None
        if known:
            del self._keys[known.block]
            freed = known.block if known.block in self._idle else None
            self._idle.pop(known.block, None)
        self._entries[key] = _Entry(block, hidden_names)
        self._keys[block] = key
        return freed

    def use(self, blocks: Iterable[int]) -> None:
        """Note that blocks are in use."""
        for block in blocks:
            self._idle.pop(block, None)

    def leave(self, block: int) -> bool:
        """Note that nobody uses a block any more; return whether it is kept."""
        if block not in self._keys:
            return False
        self._idle[block] = None
        return True

    def evict(self) -> int:
        """Forget the block that has been idle for the longest time, and return it."""
        block, _ = self._idle.popitem(last=False)
        del self._entries[self._keys.pop(block)]
        return block

    def forget_hidden(self, name: str) -> None:
        """Note that hidden states of that name are gone, or go now."""
        self.num_forgotten += 1
        for key, entry in self._entries.items():
            self._entries[key] = _Entry(entry.block, entry.hidden_names - {name})
