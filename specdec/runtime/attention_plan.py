"""The plan of a pass: which spans of several sessions share an attention call, and how their rows lie in it.

Query rows come in multiples of `_ROW_MULTIPLE`: on CPUs torch's kernels then round most rows alike, whatever
else is in the pass. Kernels of our own do so always (`kernels.attention`).

Everything is computed on the host before the first layer runs, so that the layers neither wait for the host
nor repeat what they have in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, embedding
from torch.nn.functional import scaled_dot_product_attention

from specdec.runtime.attention import Span
from specdec.runtime.bucket import Bucket, MaskedSpan
from specdec.runtime.kv_slots import Indices, device_slots, join_slots

_ROW_MULTIPLE = 4


AnySpan = Span | MaskedSpan


class Geometry(NamedTuple):
    """What a plan depends on: layers that are alike in it share one. A tuple, for it is looked up often."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    """How many keys a query sees, its own included; 0: all before it."""
    stride: int = 0
    """Rows of a token where queries are taken from; 0: its query heads and nothing else."""
    value_dim: int = 0
    """Size of a head of values; 0: `head_dim`."""

    @property
    def fold(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


class SpanGroup:
    """Spans of several sessions that one call attends for: with as many keys, and about as many queries.

    A span's queries and the heads that read the same K and V become rows of one product, so that nothing is
    repeated. Rows that only fill up are copies of the last one: a row without any key would be NaN.
    """

    def __init__(
        self,
        spans: Sequence[AnySpan],
        geometry: Geometry,
        *,
        dtype: torch.dtype,
        device: torch.device,
        bucket: Bucket | None = None,
    ) -> None:
        self.num_spans, self.num_keys = len(spans), spans[0].num_keys
        self.num_kv_heads = geometry.num_kv_heads
        self.num_queries = max(span.num_queries for span in spans)
        if bucket:
            self.num_queries = bucket.num_queries
        head, query = self._rows(geometry.fold)
        first_rows, counts, positions, first_keys = numpy.array(
            [(span.row, span.num_queries, span.position, span.first_key) for span in spans]
        ).T[..., None]  # each [spans, 1]
        tokens = numpy.minimum(query, counts - 1)  # [spans, rows]
        heads = numpy.arange(self.num_kv_heads)[:, None] * geometry.fold + head  # [kv_heads, rows]
        token_rows = (tokens + first_rows)[:, None]
        taken = token_rows * (geometry.stride or geometry.num_heads) + heads
        self.query_index = torch.from_numpy(taken).to(device)
        """Where the queries are taken from, [spans, kv_heads, rows]."""
        self.output_index: Indices = (token_rows * geometry.num_heads + heads).transpose(0, 2, 1).ravel()
        """Which (token, head) of the packed batch each of [spans, rows, kv_heads] is: so kernels lay out what
        they return."""
        self.key_slots = device_slots(join_slots([span.key_slots() for span in spans]), device)
        key_positions = first_keys + numpy.arange(self.num_keys)  # [spans, keys]
        hidden = _is_hidden(key_positions[:, None], (tokens + positions)[..., None], geometry.window)
        for index, span in enumerate(spans):
            if (by_span := span.hidden()) is not None:
                hidden[index] = by_span[tokens[index]]
        mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), float("-inf"))
        self.mask = mask[:, None].to(device)
        """Additive, [spans, 1, rows, keys]."""

    def _rows(self, fold: int) -> tuple[Indices, Indices]:
        """Which of the heads that read the same K and V, and which query, each row is."""
        num_rows = fold * self.num_queries
        place = numpy.arange(_multiple(num_rows)).clip(max=num_rows - 1)
        return place // self.num_queries, place % self.num_queries

    def attend(
        self, packed: Tensor, keys: Tensor, values: Tensor, scaling: float | None, softcap: float
    ) -> Tensor:
        """[tokens * stride, dim] of the packed batch over a layer's KV to [spans, kv_heads, rows, dim]."""
        query, key, value = embedding(packed, self.query_index), self.keys(keys), self.keys(values)
        return attend(query, key, value, self.mask, scaling, softcap)

    def keys(self, pool: Tensor) -> Tensor:
        """A layer's K or V [1, kv_heads, slots, dim] to [spans, kv_heads, keys, dim]."""
        slots = self.key_slots
        if isinstance(slots, slice):
            return pool.narrow(2, slots.start, self.num_keys)
        keys = pool[0].transpose(0, 1).index_select(0, slots)
        return keys.view(self.num_spans, self.num_keys, self.num_kv_heads, -1).transpose(1, 2)


def attend(
    query: Tensor,  # [spans, kv_heads, rows, head_dim]
    key: Tensor,  # [spans, kv_heads, keys, head_dim]
    value: Tensor,  # [spans, kv_heads, keys, value_dim]
    mask: Tensor,  # [spans, 1, rows, keys]
    scaling: float | None,
    softcap: float,
) -> Tensor:  # [spans, kv_heads, rows, value_dim]
    """Attention in one call."""
    if softcap:
        return _softcapped(query, key, value, mask, scaling or query.shape[-1] ** -0.5, softcap)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float
) -> Tensor:
    """Attention with tanh-capped scores (Gemma 2), which the fused kernels do not offer."""
    scores = query @ key.transpose(-1, -2) * scaling
    scores = torch.tanh(scores / softcap) * softcap + mask
    return scores.float().softmax(-1).to(value.dtype) @ value


def _multiple(num_rows: int) -> int:
    return -(-num_rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def _is_hidden(key_positions: Indices, positions: Indices, window: int) -> NDArray[numpy.bool_]:
    """Whether a query may not attend to a key: it comes later, or before the sliding window (0: none)."""
    hidden: NDArray[numpy.bool_] = key_positions > positions
    return hidden | (key_positions <= positions - window) if window else hidden


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How layers with one geometry attend."""

    groups: Sequence[SpanGroup]
    output_index: Tensor
    """The place of each head of the packed batch in the groups' outputs, [tokens, num_heads]."""

    def attend(
        self, packed: Tensor, keys: Tensor, values: Tensor, scaling: float | None, softcap: float
    ) -> Tensor:
        """Attention of every token over its own session's KV.

        Args:
            packed: where the queries are taken from [tokens * stride, dim].
            keys: K of a layer [1, kv_heads, slots, dim].
            values: V of a layer [1, kv_heads, slots, value_dim].
            scaling: factor of the scores; None: the inverse root of `dim`.
            softcap: cap of the scores; 0: none.

        Returns:
            [tokens, num_heads, value_dim]
        """
        outputs = [
            group.attend(packed, keys, values, scaling, softcap).transpose(1, 2).flatten(0, 2)
            for group in self.groups
        ]
        return embedding(outputs[0] if len(outputs) == 1 else torch.cat(outputs), self.output_index)

    def buffers(self) -> list[Tensor]:
        """The tensors of a plan whose keys are not one run."""
        slots = [group.key_slots for group in self.groups if isinstance(group.key_slots, Tensor)]
        return [
            self.output_index,
            *slots,
            *(tensor for group in self.groups for tensor in (group.query_index, group.mask)),
        ]
