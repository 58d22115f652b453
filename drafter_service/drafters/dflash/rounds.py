"""A session's part of a DFlash pass, and the keys and values that a pass reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from drafter_service.drafters.base import CachedSession
from drafter_service.drafters.dflash.layers import LayerMask
from drafter_service.drafters.growing import GrowingTree
from specdec.runtime.attention import first_key
from specdec.runtime.attention_plan import Geometry
from specdec.runtime.kernels import layer as kernels
from specdec.runtime.kernels.attention import RowKeys, RowPlan, SessionRows, attends
from specdec.runtime.kv_pool import KvPool
from specdec.runtime.kv_slots import device_slots, join_slots, write_rows


@dataclass(slots=True, eq=False)
class BlockRound:
    """One session's part of a pass."""

    session: CachedSession
    context: Tensor  # [num_context, hidden_size]
    block: Sequence[int]
    """Token ids of the block: the anchor and the masks."""
    num_drafts: int
    tree: GrowingTree | None = None
    """The draft where a tree is wanted."""

    @property
    def start(self) -> int:
        """Position of the first new row of the context."""
        return self.session.num_cached

    @property
    def anchor(self) -> int:
        """Position of the block's first token: the context ends before it."""
        return self.start + len(self.context)

    @property
    def stop(self) -> int:
        """Position after the block."""
        return self.anchor + len(self.block)


class PassKv:
    """Keys and values of the sessions of a pass, in the drafter's pool."""

    def __init__(self, pool: KvPool, rounds: Sequence[BlockRound], masks: Sequence[LayerMask]) -> None:
        self._pool, self._rounds, self._masks = pool, rounds, masks
        if len(rounds) == 1:
            # The block lies behind its context: their slots are one run.
            (only,) = rounds
            self._slots = only.session.allocation.slots(only.start, only.stop)
        else:
            context = [part.session.allocation.host_slots(part.start, part.anchor) for part in rounds]
            blocks = [part.session.allocation.host_slots(part.anchor, part.stop) for part in rounds]
            self._slots = device_slots(join_slots([*context, *blocks]), pool.device)
        self._reads: dict[LayerMask, list[tuple[slice | Tensor, Tensor | None]]] = {}
        """By mask, for each round: the slots of the keys that a block reads, and those a query sees."""
        self._plans: dict[LayerMask, RowPlan] = {}

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """Store what is new and attend session by session, over views of the pool where slots are one run."""
        pooled = self._pool.keys[layer], self._pool.values[layer]
        mask = self._masks[layer]
        if attends(queries.dtype, queries.device, queries.shape[-1]):
            # The heads of a row must lie side by side.
            queries, keys, values = (
                part.transpose(0, 1).contiguous().transpose(0, 1)
                if part.stride(0) != part.shape[-1]
                else part
                for part in (queries, keys, values)
            )
            kernels.store(keys.transpose(0, 1), values.transpose(0, 1), *pooled, self._slots)
            plan = self._plans.get(mask) or self._plan(mask, queries, len(keys))
            return plan.attend(queries, *pooled, scaling, softcap=0.0).transpose(0, 1)
        for tensor, rows in zip(pooled, (keys, values), strict=True):
            write_rows(tensor, self._slots, rows.transpose(0, 1))
        if mask not in self._reads:
            self._reads[mask] = [self._read(part, mask) for part in self._rounds]
        outputs = [
            self._attend_alone(own, pooled, *read, scaling)
            for own, read in zip(
                queries.split([len(part.block) for part in self._rounds], 1), self._reads[mask], strict=True
            )
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _plan(self, mask: LayerMask, queries: Tensor, num_kv_heads: int) -> RowPlan:
        """Make the plan of the layers with a mask; queries lie apart, between the heads of keys."""
        num_heads, num_rows, head_dim = queries.shape
        sessions, row = [], 0
        for part in self._rounds:
            positions = range(part.anchor, part.stop)
            window = 0 if mask.reach is None else mask.reach + 1
            rows = [
                RowKeys(at, first_key(position, window), mask.stop(position, part.stop))
                for at, position in enumerate(positions, row)
            ]
            sessions.append(SessionRows(part.session.allocation.blocks, rows, part.stop))
            row += len(positions)
        geometry = Geometry(num_heads, num_kv_heads, head_dim, stride=queries.stride(1) // head_dim)
        plan = self._plans[mask] = RowPlan(sessions, geometry, num_rows)
        return plan

    def _read(self, part: BlockRound, mask: LayerMask) -> tuple[slice | Tensor, Tensor | None]:
        """Return the slots of the keys that a block reads, and which of them each query sees; None: all."""
        first = 0 if mask.reach is None else max(0, part.anchor - mask.reach)
        slots = part.session.allocation.slots(first, part.stop)
        positions = torch.arange(first, part.stop, device=self._pool.device)
        return slots, mask.seen(positions[part.anchor - first :], positions)

    def _attend_alone(
        self,
        queries: Tensor,
        pooled: tuple[Tensor, Tensor],
        slots: slice | Tensor,
        seen: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """Attend from one session's block [num_heads, num_rows, head_dim] to its own context and block."""
        keys, values = (tensor[slots].transpose(0, 1)[None] for tensor in pooled)
        num_heads, num_rows, _ = queries.shape
        fold = num_heads // keys.shape[1]
        # Heads that share keys are queries of one attention.
        folded = queries.reshape(1, keys.shape[1], fold * num_rows, -1)
        if seen is not None:
            seen = seen.repeat(fold, 1)
        attended = scaled_dot_product_attention(folded, keys, values, attn_mask=seen, scale=scaling)
        return attended.reshape(queries.shape)
