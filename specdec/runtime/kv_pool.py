"""Memory of all sessions: one tensor per layer, handed out in blocks from a free list.

Blocks whose text is known outlive their session while there is room; sessions that begin alike share them.

KV is allocated at start; hidden states of a layer once the first drafter asks for them. Both live in the
pool's StateMemory from the start, so that exporting them copies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy
import numpy.typing
import torch
from torch import Tensor

from specdec.contract.errors import InvalidArgumentError, ResourceExhaustedError
from specdec.contract.load import scarcest
from specdec.contract.retry import SOONEST_S
from specdec.contract.target_state import GENERATIONS, TensorRef, WindowBlocks, key_name, value_name
from specdec.runtime.block_group import BlockGroup
from specdec.runtime.kernels import rows as kernels
from specdec.runtime.kv_layout import BlockBytes, SlidingLayers, divide
from specdec.runtime.kv_slots import BLOCK_TOKENS, GONE, KvAllocation, num_blocks_of
from specdec.runtime.memory import PrivateMemory, Region, StateMemory, dtype_name


@dataclass(frozen=True, slots=True)
class KvShape:
    """Geometry of one layer's KV for one token."""

    num_heads: int
    key_dim: int
    value_dim: int
    window: int = 0
    """How many keys a query sees, its own included; 0: all before it."""

    @property
    def num_elements(self) -> int:
        """Elements of K and V of one token."""
        return self.num_heads * (self.key_dim + self.value_dim)


class SharedBlocks(NamedTuple):
    """Blocks that hold the beginning of a text already."""

    blocks: Sequence[int] = ()
    sliding: Sequence[int] = ()
    """Where layers with a sliding window have blocks of their own: the last ones of the beginning, as many as
    what follows sees."""


_NOTHING = SharedBlocks()


class _Part(NamedTuple):
    """What a session is to have of a group of blocks."""

    group: BlockGroup
    num_blocks: int
    """Blocks of the table, those that are gone included."""
    shared: Sequence[int]
    num_gone: int

    @property
    def num_before(self) -> int:
        return self.num_gone + len(self.shared)

    @property
    def num_own(self) -> int:
        return self.num_blocks - self.num_before


class KvPool:
    """Fixed memory for the KV of all sessions.

    Allocation and release belong to one thread (the event loop); the engine thread only reads and writes
    the slots of sessions it is given. Memory freed while a pass that uses it runs is safe: passes run one
    after the other, so a new owner writes its slots before it reads them.

    Args:
        sliding: the layers that give back what no query sees any more; None: all layers have the same blocks.
    """

    def __init__(
        self,
        shapes: Mapping[int, KvShape],
        *,
        budget_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: StateMemory | None = None,
        sliding: SlidingLayers | None = None,
    ) -> None:
        self.memory = memory or PrivateMemory(device)
        self.retry_after_s: Callable[[int], float] = lambda num_missing_tokens: SOONEST_S
        """Says after how many seconds so many more tokens should be free; set by whoever has the sessions."""
        self._dtype = dtype
        self.device = device
        self._sliding_layers = sliding
        block = _block_bytes(shapes, dtype, sliding)
        num_full, num_sliding = _num_blocks(budget_bytes, block, sliding)
        self._refs: dict[str, TensorRef] = {}
        generations = self._make_generations(num_full + num_sliding)
        self.full = BlockGroup(generations[:num_full])
        """Blocks of layers that attend to all of a text, and of hidden states; of all layers, where no layers
        have others."""
        self.sliding = BlockGroup(generations[num_full:]) if sliding else None
        """Blocks of layers with a sliding window, where those are others."""
        # Zeros, not empty: attention reads whole blocks under a mask, which a NaN would survive.
        region = self.memory.allocate(num_full * block.full + num_sliding * block.sliding)
        offset = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        """Keys and values of each layer, [slots, num_heads, head_dim]."""
        for layer, shape in shapes.items():
            slots = (num_sliding if self.is_sliding(layer) else num_full) * BLOCK_TOKENS
            key_shape = (slots, shape.num_heads, shape.key_dim)
            self.keys[layer] = self._carve(region, offset, key_name(layer), key_shape)
            offset += self.keys[layer].nbytes
            value_shape = (slots, shape.num_heads, shape.value_dim)
            self.values[layer] = self._carve(region, offset, value_name(layer), value_shape)
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

    def _carve(self, region: Region, offset: int, name: str, shape: tuple[int, ...]) -> Tensor:
        """A tensor of the region, known by `name` from now on."""
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
            num_slots = self.full.num_blocks * BLOCK_TOKENS
            region = self.memory.allocate(num_slots * size * self._dtype.itemsize)
            self.hidden[name] = self._carve(region, 0, name, (num_slots, size))
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

    def is_sliding(self, layer: int) -> bool:
        """Return whether a layer's slots are those of layers with a sliding window."""
        return self._sliding_layers is not None and layer in self._sliding_layers.layers

    def holds_window(self, name: str) -> bool:
        """Return whether a tensor has rows only of the last positions of a session."""
        return name.startswith("kv.") and self.is_sliding(int(name.split(".")[1]))

    @property
    def groups(self) -> dict[str, BlockGroup]:
        """The blocks of each kind of layers that has some of its own, by a name for whoever looks on."""
        return {"full": self.full, "sliding": self.sliding} if self.sliding else {"all": self.full}

    @property
    def most_tokens(self) -> int:
        """Most tokens that a session can have."""
        if self.sliding and self._sliding_layers:
            most_in_window = self._sliding_layers.most_blocks(BLOCK_TOKENS)
            if self.sliding.num_blocks < most_in_window:
                return self.most_whole_tokens
        return self.full.num_blocks * BLOCK_TOKENS

    @property
    def most_whole_tokens(self) -> int:
        """The same, of a session that gives nothing back."""
        return min(group.num_blocks for group in self.groups.values()) * BLOCK_TOKENS

    @property
    def _scarcest(self) -> tuple[int, int]:
        return scarcest((group.num_blocks, group.num_available) for group in self.groups.values())

    @property
    def capacity_tokens(self) -> int:
        """Tokens the pool holds, in those layers that have least room."""
        return self._scarcest[0] * BLOCK_TOKENS

    @property
    def free_tokens(self) -> int:
        """Tokens no session holds, in those layers that have least room."""
        return self._scarcest[1] * BLOCK_TOKENS

    def require_possible(self, num_tokens: int) -> None:
        """Refuse a session that would never fit, whatever else ends.

        Raises:
            InvalidArgumentError: `num_tokens` are more than the whole pool.
        """
        if num_tokens > self.most_tokens:
            raise self._impossible(num_tokens, self.most_tokens)

    def _impossible(self, num_tokens: int, most: int) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"The request needs KV for {num_tokens} tokens (prompt and max_new_tokens), the whole "
            f"pool holds {most}; shorten the prompt, lower max_new_tokens, or start the "
            "service with a larger --kv-cache-mib.",
            field="max_new_tokens",
            reason="EXCEEDS_KV_POOL",
        )

    def find(self, keys: Sequence[bytes], hidden_names: frozenset[str]) -> SharedBlocks:
        """Return the blocks of the longest beginning of a text that is here, with these hidden states.

        Of layers with a sliding window, what its next token sees must be here.
        """
        blocks = self.full.prefixes.find(keys, hidden_names)
        if self.sliding is None:
            return SharedBlocks(blocks)
        in_window = [self.sliding.prefixes.block(key) for key in keys[: len(blocks)]]
        for stop in range(len(blocks), 0, -1):
            seen = in_window[self._num_unseen(stop * BLOCK_TOKENS) : stop]
            if None not in seen:
                return SharedBlocks(blocks[:stop], [block for block in seen if block is not None])
        return _NOTHING

    def _num_unseen(self, position: int) -> int:
        """Return how many blocks, the first, no token from a position on sees in layers with a window."""
        assert self._sliding_layers
        return max(0, position - self._sliding_layers.num_kept) // BLOCK_TOKENS

    def allocate(
        self,
        num_tokens: int,
        shared: SharedBlocks = _NOTHING,
        *,
        num_spared: int = 0,
        will_grow: bool = False,
    ) -> KvAllocation:
        """Reserve room for `num_tokens` positions, as one contiguous run if there is one.

        Args:
            shared: blocks that hold the first positions already, as `find` returns them.
            num_spared: how many blocks must stay free besides.
            will_grow: whether the session takes more later: room is left behind it and before it, and layers
                with a sliding window get no more blocks than they ever need at a time.

        Raises:
            InvalidArgumentError: more than the whole pool.
            ResourceExhaustedError: more than is free now.
        """
        self.require_possible(num_tokens)
        parts = [_Part(self.full, num_blocks_of(num_tokens), shared.blocks, 0)]
        if self.sliding and self._sliding_layers:
            num_gone, num_blocks = len(shared.blocks) - len(shared.sliding), num_blocks_of(num_tokens)
            if will_grow:
                num_blocks = min(num_blocks, num_gone + self._sliding_layers.most_blocks(BLOCK_TOKENS))
            elif num_blocks > self.sliding.num_blocks:
                raise self._impossible(num_tokens, self.most_whole_tokens)
            parts.append(_Part(self.sliding, num_blocks, shared.sliding, num_gone))
        for part in parts:
            part.group.hold(part.shared)
        for part in parts:
            if part.num_own + num_spared > part.group.num_available:
                error = self._full(part, num_tokens, num_spared)
                for each in parts:
                    each.group.leave(each.shared)
                raise error
        full, *others = [self._take(part, leaves_gaps=will_grow) for part in parts]
        return replace(full, sliding=others[0]) if others else full

    def _full(self, part: _Part, num_tokens: int, num_spared: int) -> ResourceExhaustedError:
        free, capacity = part.group.num_available * BLOCK_TOKENS, part.group.num_blocks * BLOCK_TOKENS
        spared = f" and {num_spared * BLOCK_TOKENS} are kept for those who run" if num_spared else ""
        num_wanted = min(num_tokens, part.num_own * BLOCK_TOKENS)
        return ResourceExhaustedError(
            f"The request needs KV for {num_tokens} tokens, {free} of {capacity} are free now{spared}; try "
            "again when a session has ended.",
            reason="KV_POOL_FULL",
            retry_after_s=self.retry_after_s(num_wanted + num_spared * BLOCK_TOKENS - free),
        )

    def _take(self, part: _Part, *, leaves_gaps: bool) -> KvAllocation:
        """Take what a session is to have of its own, and return the table of all that it has."""
        self._num_generations += 1
        generation = self._num_generations
        return KvAllocation.of(
            (
                *[GONE] * part.num_gone,
                *part.shared,
                *part.group.take(part.num_own, generation, leaves_gaps=leaves_gaps),
            ),
            self.device,
            generation=generation,
            num_shared=part.num_before,
            num_before=part.num_before,
            num_gone=part.num_gone,
        )

    def grow(self, allocation: KvAllocation, num_tokens: int) -> KvAllocation | None:
        """Return an allocation that takes the place of this one and has room for `num_tokens` positions.

        The run goes on where the next blocks are free. None: there are not so many blocks; nothing changed.
        """
        num_blocks = num_blocks_of(num_tokens)
        assert num_blocks > num_blocks_of(allocation.capacity), "there is room already"
        held = list(zip(self.groups.values(), allocation.tables, strict=True))
        if any(num_blocks - len(table.blocks) > group.num_available for group, table in held):
            return None
        full, *others = [self._grow(group, table, num_blocks) for group, table in held]
        return replace(full, sliding=others[0] if others else None)

    def _grow(self, group: BlockGroup, table: KvAllocation, num_blocks: int) -> KvAllocation:
        num_more = num_blocks - len(table.blocks)
        if num_more <= 0:
            return table
        generation = table.generation
        if group is self.sliding:
            # Its blocks come and go: a number of their own tells what they hold from what they held before.
            self._num_generations += 1
            generation = self._num_generations
        return KvAllocation.of(
            (*table.blocks, *group.take(num_more, generation, after=table.blocks[-1])),
            self.device,
            generation=table.generation,
            num_shared=table.num_shared,
            num_before=len(table.blocks),
            num_gone=table.num_gone,
        )

    def give_back(self, allocation: KvAllocation, position: int, keys: Sequence[bytes] = ()) -> KvAllocation:
        """Give back what no token from a position on sees, nor a drafter that reads what is before it.

        Args:
            keys: of the first blocks of the text, which are kept while there is room.

        Returns:
            An allocation that takes the place of this one; the same one if there is nothing to give back.
        """
        table = allocation.sliding
        if table is None or self.sliding is None:
            return allocation
        num_gone = min(self._num_unseen(position), len(table.blocks) - 1)
        if num_gone <= table.num_gone:
            return allocation
        for key, block in zip(keys[table.num_gone : num_gone], table.held_blocks, strict=False):
            self.sliding.keep(key, block, frozenset())
        self.sliding.leave(table.blocks[table.num_gone : num_gone])
        return replace(
            allocation,
            sliding=KvAllocation.of(
                (*[GONE] * num_gone, *table.blocks[num_gone:]),
                self.device,
                generation=table.generation,
                num_shared=max(table.num_shared, num_gone),
                num_before=table.num_before,
                num_gone=num_gone,
            ),
        )

    def window_blocks(self, allocation: KvAllocation) -> WindowBlocks | None:
        """Return where readers find the last positions in layers with a sliding window; None: they are where
        those of other layers are."""
        if self.sliding is None or self._sliding_layers is None or allocation.sliding is None:
            return None
        held = allocation.sliding.held_blocks
        return WindowBlocks(
            num_positions=self._sliding_layers.num_kept,
            num_gone_blocks=allocation.sliding.num_gone,
            block_ids=held,
            generations=tuple(self.sliding.generations[list(held)].tolist()),
            first_generation=self.full.num_blocks,
        )

    def keep(self, keys: Sequence[bytes], allocation: KvAllocation, hidden_names: frozenset[str]) -> None:
        """Note what the first blocks of an allocation hold, one key each: what they hold stays as it is."""
        for key, block in zip(keys, allocation.blocks, strict=False):
            self.full.keep(key, block, hidden_names)
        if self.sliding and allocation.sliding:
            table = allocation.sliding
            for key, block in zip(keys[table.num_gone :], table.held_blocks, strict=False):
                self.sliding.keep(key, block, frozenset())

    def clear(self, allocation: KvAllocation) -> None:
        """Zero an allocation's new slots, on the engine thread: an infinity left by another session would
        come through the mask as NaN."""
        for table in allocation.tables:
            self._clear(table, allocation)

    def clear_before(self, allocation: KvAllocation, start: int, stop: int) -> None:
        """Do so before a pass over positions start to stop, as far as it is the first to reach new slots:
        what is final lies before them."""
        for table in allocation.tables:
            if start <= table.new_from < stop:
                self._clear(table, allocation)

    def _clear(self, table: KvAllocation, allocation: KvAllocation) -> None:
        slots = table.slots(max(table.first, table.new_from), table.length)
        for layer in self.keys:
            if allocation.table(self.is_sliding(layer)) is table:
                self.keys[layer][slots] = 0
                self.values[layer][slots] = 0

    def move(
        self, allocation: KvAllocation, sources: Tensor, targets: Tensor, hidden_names: Iterable[str]
    ) -> None:
        """Copy KV, and hidden states of those names, of positions [num_positions] to others, on the engine
        thread.

        A position may be both a source and a target: all are read before one is written.
        """
        for table in allocation.tables:
            layers = [layer for layer in self.keys if allocation.table(self.is_sliding(layer)) is table]
            tensors = [part[layer] for layer in layers for part in (self.keys, self.values)]
            if table is allocation:
                tensors += [self.hidden[name] for name in hidden_names]
            self._move(tensors, table.slots_at(sources), table.slots_at(targets))

    def _move(self, tensors: Sequence[Tensor], sources: Tensor, targets: Tensor) -> None:
        if kernels.can_move(self.device):
            kernels.move(tensors, sources, targets)
            return
        for tensor in tensors:
            tensor.index_copy_(0, targets, tensor.index_select(0, sources))

    def free(self, allocation: KvAllocation) -> None:
        """Give the blocks back."""
        self.full.leave(allocation.blocks)
        self.full.generations[list(allocation.own_blocks)] = 0
        if self.sliding and allocation.sliding:
            self.sliding.leave(allocation.sliding.held_blocks)


def _block_bytes(
    shapes: Mapping[int, KvShape], dtype: torch.dtype, sliding: SlidingLayers | None
) -> BlockBytes:
    layers = sliding.layers if sliding else frozenset()
    num_bytes = {layer: shape.num_elements * dtype.itemsize * BLOCK_TOKENS for layer, shape in shapes.items()}
    in_window = sum(size for layer, size in num_bytes.items() if layer in layers)
    return BlockBytes(sum(num_bytes.values()) - in_window, in_window)


def _num_blocks(budget_bytes: int, block: BlockBytes, sliding: SlidingLayers | None) -> tuple[int, int]:
    """Return how many blocks there are of each kind.

    Raises:
        InvalidArgumentError: the budget is less than one block.
    """
    block_bytes = block.full + block.sliding
    if budget_bytes < block_bytes:
        raise InvalidArgumentError(
            f"The KV budget of {budget_bytes / 2**20:.1f} MiB is less than one block of this model "
            f"({block_bytes / 2**20:.2f} MiB); raise --kv-cache-mib.",
            field="kv_cache_mib",
        )
    if sliding is None:
        return budget_bytes // block_bytes, 0
    return divide(budget_bytes, block, sliding, BLOCK_TOKENS)
