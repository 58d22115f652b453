"""Memory of all sessions: one tensor per layer, handed out in blocks from a free list.

Blocks whose text is known outlive their session while there is room; sessions that begin alike share them.

KV is allocated at start; hidden states of a layer once the first drafter asks for them. Both live in the
pool's StateMemory from the start, so that exporting them copies nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy
import numpy.typing
import torch
from torch import Tensor

from specdec.contract.errors import InvalidArgumentError, ResourceExhaustedError
from specdec.contract.retry import SOONEST_S
from specdec.contract.target_state import GENERATIONS, TensorRef, key_name, value_name
from specdec.runtime.kernels import rows as kernels
from specdec.runtime.memory import PrivateMemory, Region, StateMemory, dtype_name
from specdec.runtime.prefix_cache import PrefixCache

BLOCK_TOKENS = 64
"""Tokens per block: the pool's unit of allocation, and of the keys that attention reads."""

_RUNS = re.compile(b"\1+")
"""Blocks next to each other in a table of blocks that are free."""

Indices = numpy.typing.NDArray[numpy.int64]
"""Indices in the host's memory, where plans are made."""


@dataclass(frozen=True, slots=True)
class KvShape:
    """Geometry of one layer's KV for one token."""

    num_heads: int
    key_dim: int
    value_dim: int

    @property
    def num_elements(self) -> int:
        """Elements of K and V of one token."""
        return self.num_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, eq=False)
class KvAllocation:
    """Slots of one session, in position order. A contiguous run is kept as an offset: reading is a view.

    It never changes: a session that grows gets another allocation, which begins with the same blocks.
    """

    blocks: tuple[int, ...]
    slot_ids: Tensor | None  # [capacity] int64 on the pool's device, only where the blocks are not contiguous
    host_slot_ids: Indices | None = None
    """The same in the host's memory."""
    generation: int = 0
    """Tells this owner of the blocks from earlier and later ones."""
    num_shared: int = 0
    """How many of the blocks, the first, were full before: others may use them, and nobody writes to them."""
    num_before: int = 0
    """How many of the blocks, the first, are not new with this allocation: those that are shared, or those
    that the session had before it grew."""

    @classmethod
    def of(
        cls,
        blocks: Sequence[int],
        device: torch.device,
        *,
        generation: int = 0,
        num_shared: int = 0,
        num_before: int = 0,
    ) -> KvAllocation:
        """The allocation that consists of `blocks`, at least one."""
        numbers = (generation, num_shared, num_before)
        is_run = all(after == before + 1 for before, after in pairwise(blocks))
        if is_run:
            return cls(tuple(blocks), None, None, *numbers)
        slot_ids = _slot_ids(blocks)
        return cls(tuple(blocks), torch.from_numpy(slot_ids).to(device), slot_ids, *numbers)

    @property
    def own_blocks(self) -> tuple[int, ...]:
        """The blocks that only this session writes to."""
        return self.blocks[self.num_shared :]

    @property
    def shared_length(self) -> int:
        """Positions whose state was there before."""
        return self.num_shared * BLOCK_TOKENS

    @property
    def new_from(self) -> int:
        """The first position that no earlier allocation of the session has room for."""
        return self.num_before * BLOCK_TOKENS

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return len(self.blocks) * BLOCK_TOKENS

    def slots(self, start: int, stop: int) -> slice | Tensor:
        """Index of positions start to stop into a layer's pool: a slice where contiguous, else slot ids."""
        return self._run(start, stop) if self.slot_ids is None else self.slot_ids[start:stop]

    def host_slots(self, start: int, stop: int) -> slice | Indices:
        """The same as `slots`, for plans that are made on the host."""
        return self._run(start, stop) if self.host_slot_ids is None else self.host_slot_ids[start:stop]

    def _run(self, start: int, stop: int) -> slice:
        """The slots of positions start to stop, where all blocks are one run."""
        first = self.blocks[0] * BLOCK_TOKENS
        return slice(first + start, first + stop)

    def host_slots_at(self, positions: Indices) -> Indices:
        """Slot ids of positions [num_positions] in any order, in the host's memory."""
        if self.host_slot_ids is not None:
            return self.host_slot_ids[positions]
        return positions + self.blocks[0] * BLOCK_TOKENS

    def slots_at(self, positions: Tensor) -> Tensor:
        """Slot ids of positions [num_positions] in any order, on the pool's device."""
        if self.slot_ids is not None:
            return self.slot_ids[positions]
        return positions + self.blocks[0] * BLOCK_TOKENS

    def runs(self, start: int, stop: int) -> Iterator[slice]:
        """Positions start to stop as slices into a layer's pool, in order."""
        if self.slot_ids is None:
            yield self._run(start, stop)
            return
        while start < stop:
            index, offset = divmod(start, BLOCK_TOKENS)
            size = min(BLOCK_TOKENS - offset, stop - start)
            first = self.blocks[index] * BLOCK_TOKENS + offset
            yield slice(first, first + size)
            start += size


class KvPool:
    """Fixed memory for the KV of all sessions.

    Allocation and release belong to one thread (the event loop); the engine thread only reads and writes
    the slots of sessions it is given. Memory freed while a pass that uses it runs is safe: passes run one
    after the other, so a new owner writes its slots before it reads them.
    """

    def __init__(
        self,
        shapes: Mapping[int, KvShape],
        *,
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: StateMemory | None = None,
    ) -> None:
        self.memory = memory or PrivateMemory(device)
        self.retry_after_s: Callable[[int], float] = lambda num_missing_tokens: SOONEST_S
        """Says after how many seconds so many more tokens should be free; set by whoever has the sessions."""
        block_bytes = sum(shape.num_elements for shape in shapes.values()) * dtype.itemsize * BLOCK_TOKENS
        num_blocks = budget_bytes // block_bytes
        if num_blocks < 1:
            raise InvalidArgumentError(
                f"The KV budget of {budget_bytes / 2**20:.1f} MiB is less than one block of this model "
                f"({block_bytes / 2**20:.2f} MiB); raise --kv-cache-mib.",
                field="kv_cache_mib",
            )
        self._num_slots = num_blocks * BLOCK_TOKENS
        self._dtype = dtype
        self.device = device
        self._free = bytearray(b"\1" * num_blocks)
        self._num_users = [0] * num_blocks
        self.prefixes = PrefixCache()
        """Full blocks by their text; those that nobody uses give way when there are no others."""
        self._refs: dict[str, TensorRef] = {}
        # Zeros, not empty: attention reads whole blocks under a mask, which a NaN would survive.
        region = self.memory.allocate(num_blocks * block_bytes)
        offset = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        """Keys and values of each layer, [slots, num_heads, head_dim]."""
        for layer, shape in shapes.items():
            self.keys[layer] = self._carve(region, offset, key_name(layer), shape.num_heads, shape.key_dim)
            offset += self.keys[layer].nbytes
            self.values[layer] = self._carve(
                region, offset, value_name(layer), shape.num_heads, shape.value_dim
            )
            offset += self.values[layer].nbytes
        self.by_head = {
            layer: (self.keys[layer].transpose(0, 1)[None], self.values[layer].transpose(0, 1)[None])
            for layer in shapes
        }
        """The same as attention reads it: K and V of each layer, [1, num_heads, slots, head_dim]."""
        self.hidden: dict[str, Tensor] = {}
        """Hidden states that some session exports or has exported, by name: [slots, hidden_size]."""
        self._hidden_regions: dict[str, Region] = {}
        self._num_generations = 0
        self._generations = self._make_generations(num_blocks)

    def _carve(self, region: Region, offset: int, name: str, *row_shape: int) -> Tensor:
        """A tensor [slots, *row_shape] of the region, known by `name` from now on."""
        shape = (self._num_slots, *row_shape)
        num_bytes = math.prod(shape) * self._dtype.itemsize
        self._refs[name] = TensorRef(name, dtype_name(self._dtype), shape, region.locate(offset))
        return region.tensor[offset : offset + num_bytes].view(self._dtype).view(shape)

    def _make_generations(self, num_blocks: int) -> numpy.typing.NDArray[numpy.int64]:
        """The table [num_blocks] int64 in which readers see whether a session still holds its blocks."""
        dtype = torch.int64
        region = self.memory.allocate_host(num_blocks * dtype.itemsize)
        self._refs[GENERATIONS] = TensorRef(GENERATIONS, "int64", (num_blocks,), region.locate(0))
        return region.tensor.view(dtype).numpy()

    def add_hidden(self, name: str, size: int) -> None:
        """Make room for hidden states [slots, size] under `name`; nothing if it is there.

        Raises:
            ResourceExhaustedError: there is no memory for them.
        """
        if name not in self.hidden:
            region = self.memory.allocate(self._num_slots * size * self._dtype.itemsize)
            self.hidden[name] = self._carve(region, 0, name, size)
            self._hidden_regions[name] = region

    def remove_hidden(self, name: str) -> None:
        """Give up hidden states that no session exports; between passes."""
        if name in self.hidden:
            del self.hidden[name], self._refs[name]
            self.memory.release(self._hidden_regions.pop(name))

    def ref(self, name: str) -> TensorRef:
        """Where a tensor of the pool is."""
        return self._refs[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor of the pool, one row per slot."""
        if name in self.hidden:
            return self.hidden[name]
        _, layer, part = name.split(".")
        return (self.keys if part == "key" else self.values)[int(layer)]

    @property
    def capacity_tokens(self) -> int:
        """Tokens the pool holds."""
        return len(self._free) * BLOCK_TOKENS

    @property
    def _num_available(self) -> int:
        """Blocks that are free, or only kept."""
        return self._free.count(1) + self.prefixes.num_idle

    @property
    def free_tokens(self) -> int:
        """Tokens no session holds."""
        return self._num_available * BLOCK_TOKENS

    @property
    def kept_tokens(self) -> int:
        """Tokens that no session holds, and whose state is kept for sessions that begin alike."""
        return self.prefixes.num_idle * BLOCK_TOKENS

    def require_possible(self, num_tokens: int) -> None:
        """Refuse a session that would never fit, whatever else ends.

        Raises:
            InvalidArgumentError: `num_tokens` are more than the whole pool.
        """
        if num_tokens > self.capacity_tokens:
            raise InvalidArgumentError(
                f"The request needs KV for {num_tokens} tokens (prompt and max_new_tokens), the whole "
                f"pool holds {self.capacity_tokens}; shorten the prompt, lower max_new_tokens, or start the "
                "service with a larger --kv-cache-mib.",
                field="max_new_tokens",
                reason="EXCEEDS_KV_POOL",
            )

    def allocate(
        self, num_tokens: int, shared: Sequence[int] = (), *, num_spared: int = 0, will_grow: bool = False
    ) -> KvAllocation:
        """Reserve room for `num_tokens` positions, as one contiguous run if there is one.

        Args:
            shared: blocks that hold the first positions already, as `prefixes` finds them.
            num_spared: how many blocks must stay free besides.
            will_grow: whether the session takes more later: room is left behind it and before it.

        Raises:
            InvalidArgumentError: more than the whole pool.
            ResourceExhaustedError: more than is free now.
        """
        self.require_possible(num_tokens)
        num_own = num_blocks_of(num_tokens) - len(shared)
        self._hold(shared)
        own = (
            self._take(num_own, leaves_gaps=will_grow)
            if self._num_available >= num_own + num_spared
            else None
        )
        if own is None:
            self._leave(shared)
            spared = f" and {num_spared * BLOCK_TOKENS} are kept for those who run" if num_spared else ""
            raise ResourceExhaustedError(
                f"The request needs KV for {num_tokens} tokens, {self.free_tokens} of "
                f"{self.capacity_tokens} are free now{spared}; try again when a session has ended.",
                reason="KV_POOL_FULL",
                retry_after_s=self.retry_after_s(num_tokens + num_spared * BLOCK_TOKENS - self.free_tokens),
            )
        self._num_generations += 1
        self._own(own, self._num_generations)
        return KvAllocation.of(
            (*shared, *own),
            self.device,
            generation=self._num_generations,
            num_shared=len(shared),
            num_before=len(shared),
        )

    def grow(self, allocation: KvAllocation, num_tokens: int) -> KvAllocation | None:
        """Return an allocation that takes the place of this one and has room for `num_tokens` positions.

        The run goes on where the next blocks are free. None: there are not so many blocks; nothing changed.
        """
        held = allocation.blocks
        num_more = num_blocks_of(num_tokens) - len(held)
        assert num_more > 0, "there is room already"
        if num_more > self._num_available:
            return None
        after = range(held[-1] + 1, held[-1] + 1 + num_more)
        is_free = after.stop <= len(self._free) and all(self._free[after.start : after.stop])
        more = tuple(after) if is_free else self._take(num_more)
        self._own(more, allocation.generation)
        return KvAllocation.of(
            (*held, *more),
            self.device,
            generation=allocation.generation,
            num_shared=allocation.num_shared,
            num_before=len(held),
        )

    def _own(self, blocks: Sequence[int], generation: int) -> None:
        """Give free blocks to an owner, whom readers know by that generation."""
        for block in blocks:
            self._free[block] = 0
        self._hold(blocks)
        self._generations[list(blocks)] = generation

    def keep(self, keys: Sequence[bytes], allocation: KvAllocation, hidden_names: frozenset[str]) -> None:
        """Note what the first blocks of an allocation hold, one key each: what they hold stays as it is."""
        for key, block in zip(keys, allocation.blocks, strict=False):
            freed = self.prefixes.put(key, block, hidden_names)
            if freed is not None:
                self._free[freed] = 1

    def _hold(self, blocks: Iterable[int]) -> None:
        self.prefixes.use(blocks)
        for block in blocks:
            self._num_users[block] += 1

    def _leave(self, blocks: Sequence[int]) -> None:
        # The last block of a text becomes the oldest: without those before it, it is of no use.
        for block in reversed(blocks):
            assert self._num_users[block], f"block {block} freed twice"
            self._num_users[block] -= 1
            if not self._num_users[block] and not self.prefixes.leave(block):
                self._free[block] = 1

    def clear(self, allocation: KvAllocation) -> None:
        """Zero an allocation's new slots, on the engine thread: an infinity left by another session would
        come through the mask as NaN."""
        slots = allocation.slots(allocation.new_from, allocation.capacity)
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[slots] = 0

    def move(self, sources: Tensor, targets: Tensor, hidden_names: Iterable[str]) -> None:
        """Copy KV, and hidden states of those names, of slots [num_slots] to others, on the engine thread.

        A slot may be both a source and a target: all are read before one is written.
        """
        hidden = (self.hidden[name] for name in hidden_names)
        tensors = [*self.keys.values(), *self.values.values(), *hidden]
        if kernels.can_move(self.device):
            kernels.move(tensors, sources, targets)
            return
        for tensor in tensors:
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    def free(self, allocation: KvAllocation) -> None:
        """Give the blocks back."""
        self._leave(allocation.blocks)
        self._generations[list(allocation.own_blocks)] = 0

    def _take(self, num_blocks: int, *, leaves_gaps: bool = False) -> tuple[int, ...]:
        """Return so many of the blocks that are available, contiguous if there are such, at the expense of
        those that are only kept."""
        while self._free.count(1) < num_blocks:
            self._free[self.prefixes.evict()] = 1
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
