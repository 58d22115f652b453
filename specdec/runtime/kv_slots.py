"""Where the positions of a session are in a pool: its table of blocks, and the slots that they consist of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy
import numpy.typing
import torch
from torch import Tensor

BLOCK_TOKENS = 64
"""Tokens per block: the pool's unit of allocation, and of the keys that attention reads."""

GONE = -1
"""Stands in a table of blocks for a block that the session has given back."""

Indices = numpy.typing.NDArray[numpy.int64]
"""Indices in the host's memory, where plans are made."""


@dataclass(frozen=True, slots=True, eq=False)
class KvAllocation:
    """Slots of one session, in position order. A contiguous run is kept as an offset: reading is a view.

    It never changes: a session that grows gets another allocation, which begins with the same blocks.
    """

    blocks: tuple[int, ...]
    slot_ids: Tensor | None  # [length] int64 on the pool's device, only where the blocks are not contiguous
    host_slot_ids: Indices | None = None
    """The same in the host's memory."""
    generation: int = 0
    """Tells this owner of the blocks from earlier and later ones."""
    num_shared: int = 0
    """How many of the blocks, the first, were full before: others may use them, and nobody writes to them."""
    num_before: int = 0
    """How many of the blocks, the first, are not new with this allocation: those that are shared, or those
    that the session had before it grew."""
    num_gone: int = 0
    """How many of the blocks, the first, were given back: GONE stands for them. The session reads none of
    their positions any more."""
    sliding: KvAllocation | None = None
    """Where layers with a sliding window have blocks of their own: their slots."""

    @classmethod
    def of(
        cls,
        blocks: Sequence[int],
        device: torch.device,
        *,
        generation: int = 0,
        num_shared: int = 0,
        num_before: int = 0,
        num_gone: int = 0,
        sliding: KvAllocation | None = None,
    ) -> KvAllocation:
        """The allocation that consists of `blocks`, at least one that is not gone."""
        numbers = (generation, num_shared, num_before, num_gone)
        is_run = all(after == before + 1 for before, after in pairwise(blocks[num_gone:]))
        if is_run:
            return cls(tuple(blocks), None, None, *numbers, sliding)
        slot_ids = _slot_ids(blocks)
        return cls(tuple(blocks), torch.from_numpy(slot_ids).to(device), slot_ids, *numbers, sliding)

    def table(self, is_sliding: bool) -> KvAllocation:
        """Return the slots of layers that have a sliding window, or of those that have none."""
        return self.sliding if is_sliding and self.sliding else self

    @property
    def tables(self) -> tuple[KvAllocation, ...]:
        """The slots of each kind of layers that has blocks of its own."""
        return (self, self.sliding) if self.sliding else (self,)

    @property
    def own_blocks(self) -> tuple[int, ...]:
        """The blocks that only this session writes to."""
        return self.blocks[self.num_shared :]

    @property
    def held_blocks(self) -> tuple[int, ...]:
        """The blocks that the session has not given back."""
        return self.blocks[self.num_gone :]

    @property
    def shared_length(self) -> int:
        """Positions whose state was there before."""
        return self.num_shared * BLOCK_TOKENS

    @property
    def new_from(self) -> int:
        """The first position that no earlier allocation of the session has room for."""
        return self.num_before * BLOCK_TOKENS

    @property
    def first(self) -> int:
        """The first position that was not given back."""
        return self.num_gone * BLOCK_TOKENS

    @property
    def length(self) -> int:
        """Position after the last slot, of these layers."""
        return len(self.blocks) * BLOCK_TOKENS

    @property
    def capacity(self) -> int:
        """Positions that fit, in all layers."""
        return min(table.length for table in self.tables)

    def slots(self, start: int, stop: int) -> slice | Tensor:
        """Index of positions start to stop into a layer's pool: a slice where contiguous, else slot ids."""
        return self._run(start, stop) if self.slot_ids is None else self.slot_ids[self._here(start) : stop]

    def host_slots(self, start: int, stop: int) -> slice | Indices:
        """The same as `slots`, for plans that are made on the host."""
        if self.host_slot_ids is None:
            return self._run(start, stop)
        return self.host_slot_ids[self._here(start) : stop]

    def _here(self, position: int) -> int:
        assert position >= self.first, "its block was given back"
        return position

    @property
    def _offset(self) -> int:
        """What makes a position a slot, where all blocks are one run."""
        return (self.blocks[-1] - len(self.blocks) + 1) * BLOCK_TOKENS

    def _run(self, start: int, stop: int) -> slice:
        """The slots of positions start to stop, where all blocks are one run."""
        return slice(self._offset + self._here(start), self._offset + stop)

    def host_slots_at(self, positions: Indices) -> Indices:
        """Slot ids of positions [num_positions] in any order, in the host's memory."""
        assert not self.num_gone or positions.min() >= self.first, "its block was given back"
        return positions + self._offset if self.host_slot_ids is None else self.host_slot_ids[positions]

    def slots_at(self, positions: Tensor) -> Tensor:
        """Slot ids of positions [num_positions] in any order, on the pool's device."""
        return positions + self._offset if self.slot_ids is None else self.slot_ids[positions]

    def runs(self, start: int, stop: int) -> Iterator[slice]:
        """Positions start to stop as slices into a layer's pool, in order."""
        if self.slot_ids is None:
            yield self._run(start, stop)
            return
        start = self._here(start)
        while start < stop:
            index, offset = divmod(start, BLOCK_TOKENS)
            size = min(BLOCK_TOKENS - offset, stop - start)
            first = self.blocks[index] * BLOCK_TOKENS + offset
            yield slice(first, first + size)
            start += size


def num_blocks_of(num_tokens: int) -> int:
    """Return how many blocks hold so many positions."""
    return -(-num_tokens // BLOCK_TOKENS)


def join_slots(slots: Sequence[slice | Indices]) -> slice | Indices:
    """Indices of several runs of slots, one after the other, as one index in the host's memory."""
    if len(slots) == 1:
        return slots[0]
    return numpy.concatenate([as_indices(part) for part in slots])


def as_indices(slots: slice | Indices) -> Indices:
    """Return slots as indices, where they are a run as well."""
    return numpy.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots


def device_slots(slots: slice | Indices, device: torch.device) -> slice | Tensor:
    """An index of the host's memory as one for tensors of a device."""
    return slots if isinstance(slots, slice) else torch.from_numpy(slots).to(device)


def write_rows(tensor: Tensor, slots: slice | Tensor, rows: Tensor) -> None:
    """Store rows [num_slots, ...] at their slots of a pool's tensor."""
    if isinstance(slots, slice):
        tensor.narrow(0, slots.start, rows.shape[0]).copy_(rows)
    else:
        tensor.index_copy_(0, slots, rows)


def _slot_ids(blocks: Sequence[int]) -> Indices:
    # By way of numpy: allocations are made on the event loop, which must not run torch operations.
    starts = numpy.asarray(blocks, dtype=numpy.int64) * BLOCK_TOKENS
    return (starts[:, None] + numpy.arange(BLOCK_TOKENS)).ravel()
