"""KV memory of all sessions: one preallocated tensor per layer, handed out in blocks from a free list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.errors import InvalidArgumentError, ResourceExhaustedError

BLOCK_TOKENS = 64
"""Tokens per block: the pool's unit of allocation, and of the keys that attention reads."""


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
    """Slots of one session, in position order. A contiguous run is kept as an offset: reading is a view."""

    blocks: tuple[int, ...]
    slot_ids: Tensor | None  # [capacity] int64, only where the blocks are not contiguous

    @property
    def capacity(self) -> int:
        """Positions that fit."""
        return len(self.blocks) * BLOCK_TOKENS

    def slots(self, start: int, stop: int) -> slice | Tensor:
        """Index of positions start to stop into a layer's pool: a slice where contiguous, else slot ids."""
        if self.slot_ids is not None:
            return self.slot_ids[start:stop]
        first = self.blocks[0] * BLOCK_TOKENS
        return slice(first + start, first + stop)


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
    ) -> None:
        block_bytes = sum(shape.num_elements for shape in shapes.values()) * dtype.itemsize * BLOCK_TOKENS
        num_blocks = budget_bytes // block_bytes
        if num_blocks < 1:
            raise InvalidArgumentError(
                f"The KV budget of {budget_bytes / 2**20:.1f} MiB is less than one block of this model "
                f"({block_bytes / 2**20:.2f} MiB); raise --kv-cache-mib.",
                field="kv_cache_mib",
            )
        slots = num_blocks * BLOCK_TOKENS
        # Per layer [slots, num_heads, head_dim]. Zeros, not empty: attention reads whole blocks under a
        # mask, which a NaN would survive.
        self.keys = {
            layer: torch.zeros(slots, shape.num_heads, shape.key_dim, dtype=dtype, device=device)
            for layer, shape in shapes.items()
        }
        self.values = {
            layer: torch.zeros(slots, shape.num_heads, shape.value_dim, dtype=dtype, device=device)
            for layer, shape in shapes.items()
        }
        self._device = device
        self._free = bytearray(b"\1" * num_blocks)

    @property
    def capacity_tokens(self) -> int:
        """Tokens the pool holds."""
        return len(self._free) * BLOCK_TOKENS

    @property
    def free_tokens(self) -> int:
        """Tokens no session has reserved."""
        return self._free.count(1) * BLOCK_TOKENS

    def allocate(self, num_tokens: int) -> KvAllocation:
        """Reserve room for `num_tokens` positions, as one contiguous run if there is one.

        Raises:
            InvalidArgumentError: more than the whole pool.
            ResourceExhaustedError: more than is free now.
        """
        if num_tokens > self.capacity_tokens:
            raise InvalidArgumentError(
                f"The request needs KV for {num_tokens} tokens (prompt and max_new_tokens), the whole "
                f"pool holds {self.capacity_tokens}; shorten the prompt, lower max_new_tokens, or start the "
                "service with a larger --kv-cache-mib.",
                field="max_new_tokens",
                reason="EXCEEDS_KV_POOL",
            )
        num_blocks = -(-num_tokens // BLOCK_TOKENS)
        blocks = self._find(num_blocks)
        if blocks is None:
            raise ResourceExhaustedError(
                f"The request needs KV for {num_tokens} tokens, {self.free_tokens} of "
                f"{self.capacity_tokens} are free now; try again when a session has ended.",
                reason="KV_POOL_FULL",
                retry_after_s=1.0,
            )
        for block in blocks:
            self._free[block] = 0
        return KvAllocation(blocks, None if _is_run(blocks) else self._slot_ids(blocks))

    def clear(self, allocation: KvAllocation) -> None:
        """Zero an allocation's slots, on the engine thread: an infinity left by another session would come
        through the mask as NaN."""
        slots = allocation.slots(0, allocation.capacity)
        for tensor in (*self.keys.values(), *self.values.values()):
            tensor[slots] = 0

    def free(self, allocation: KvAllocation) -> None:
        """Give the blocks back."""
        for block in allocation.blocks:
            assert not self._free[block], f"block {block} freed twice"
            self._free[block] = 1

    def _find(self, num_blocks: int) -> tuple[int, ...] | None:
        first = self._free.find(b"\1" * num_blocks)
        if first >= 0:
            return tuple(range(first, first + num_blocks))
        scattered = [block for block, is_free in enumerate(self._free) if is_free][:num_blocks]
        return tuple(scattered) if len(scattered) == num_blocks else None

    def _slot_ids(self, blocks: tuple[int, ...]) -> Tensor:
        starts = torch.tensor(blocks, device=self._device) * BLOCK_TOKENS
        return (starts[:, None] + torch.arange(BLOCK_TOKENS, device=self._device)).flatten()


def _is_run(blocks: tuple[int, ...]) -> bool:
    return blocks[-1] - blocks[0] == len(blocks) - 1
