"""The plan of a pass: which spans of several sessions share an attention call, and how their rows lie in it.

Query rows come in multiples of `_ROW_MULTIPLE`. On CPUs the kernels then round each row alike, in bf16 too,
whatever else is in the pass; elsewhere they may still differ. Small heads need more: there each token gets
products of its own (`_is_small`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specdec.runtime.attention import Segment, Span, Tree, chain_spans, with_rows
from specdec.runtime.kv_pool import join_slots
from specdec.runtime.tree_keys import Branches

_ROW_MULTIPLE = 4
_MIN_SHARED_HEAD_DIM = 64


def _is_small(head_dim: int) -> bool:
    """Whether the heads are so small that a product over several tokens may round otherwise than over one.

    The library that multiplies chooses its kernel by the shape of a product. With heads of 64 and more the
    choice shows in no bit. With one KV head of 16, 28 and 32 query rows were seen to round otherwise than 4,
    on a CPU with AVX512-BF16 and without AMX. So tokens with small heads share no product, nor do branches.
    """
    return head_dim < _MIN_SHARED_HEAD_DIM


class SpanGroup:
    """Spans of several sessions that one call attends for: with as many keys, and about as many queries.

    A span's queries and the heads that read the same K and V become rows of one product, so that nothing is
    repeated. Rows that only fill up are copies of the last one: a row without any key would be NaN.

    Args:
        fold: query heads per KV head.
        num_kv_heads: of the layers.
    """

    def __init__(
        self, spans: Sequence[Span], *, window: int, num_kv_heads: int, fold: int, like: Tensor
    ) -> None:
        device = like.device
        self.num_spans, self.num_keys, self.num_kv_heads = len(spans), spans[0].num_keys, num_kv_heads
        self.num_queries = max(span.num_queries for span in spans)
        self.is_small = _is_small(like.shape[-1])
        head, query = self._rows(fold)
        self.num_rows = len(head)
        first_rows, counts, positions, first_keys = torch.tensor(
            [(span.row, span.num_queries, span.position, span.first_key) for span in spans], device=device
        ).T[..., None]  # each [spans, 1]
        head, query = head.to(device), query.to(device)
        tokens = torch.minimum(query, counts - 1)  # [spans, rows]
        heads = torch.arange(num_kv_heads, device=device)[:, None] * fold + head  # [kv_heads, rows]
        packed = (tokens + first_rows)[:, None] * (fold * num_kv_heads) + heads
        self.query_index = packed.flatten()
        """Which (token, head) of the packed batch each of [spans, kv_heads, rows] is."""
        self.output_index = packed.transpose(1, 2).flatten()
        """The same of [spans, rows, kv_heads], in which kernels lay out what they return."""
        self.key_slots = _key_slots(spans, device)
        key_positions = first_keys + torch.arange(self.num_keys, device=device)  # [spans, keys]
        hidden = _is_hidden(key_positions[:, None], (tokens + positions)[..., None], window)
        for index, span in enumerate(spans):
            if span.paths:
                hidden[index] = span.hidden(device)[tokens[index]]
        self.mask = torch.zeros(hidden.shape, dtype=like.dtype, device=device)[:, None]
        """Additive, [spans, 1, rows, keys]."""
        self.mask.masked_fill_(hidden[:, None], float("-inf"))

    def _rows(self, fold: int) -> tuple[Tensor, Tensor]:
        """Which of the heads that read the same K and V, and which query, each row is."""
        if self.is_small:
            rows_of_query = torch.arange(_multiple(fold)).clamp_(max=fold - 1)
            return rows_of_query.repeat(self.num_queries), torch.arange(self.num_queries).repeat_interleave(
                len(rows_of_query)
            )
        num_rows = fold * self.num_queries
        place = torch.arange(_multiple(num_rows)).clamp_(max=num_rows - 1)
        return place // self.num_queries, place % self.num_queries

    def attend(self, packed: Tensor, keys: Tensor, values: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        """[tokens * heads, dim] of the packed batch over a layer's KV to [spans, kv_heads, rows, dim]."""
        query, key, value = self.queries(packed), self.keys(keys), self.keys(values)
        if not self.is_small:
            return attend(query, key, value, self.mask)
        return torch.stack(
            [self._each(attend, *span) for span in zip(query, key, value, self.mask, strict=True)]
        )

    def _each(
        self,
        attend: Callable[..., Tensor],
        query: Tensor,  # [kv_heads, rows, dim]
        key: Tensor,  # [kv_heads, keys, dim]
        value: Tensor,  # [kv_heads, keys, value_dim]
        mask: Tensor,  # [1, rows, keys]
    ) -> Tensor:  # [kv_heads, rows, value_dim]
        """One span, whose queries become a batch over the same keys."""
        apart = (self.num_queries, -1)
        output = attend(
            query.unflatten(1, apart).transpose(0, 1),
            key.expand(self.num_queries, *key.shape),
            value.expand(self.num_queries, *value.shape),
            mask.unflatten(1, apart).transpose(0, 1),
        )
        return output.transpose(0, 1).flatten(1, 2)

    def queries(self, packed: Tensor) -> Tensor:
        """[tokens * heads, dim] of the packed batch to [spans, kv_heads, rows, dim]."""
        rows = packed.index_select(0, self.query_index)
        return rows.view(self.num_spans, self.num_kv_heads, self.num_rows, -1)

    def keys(self, pool: Tensor) -> Tensor:
        """A layer's K or V [slots, kv_heads, dim] to [spans, kv_heads, keys, dim]."""
        slots = self.key_slots
        keys = pool[slots] if isinstance(slots, slice) else pool.index_select(0, slots)
        return keys.view(self.num_spans, self.num_keys, self.num_kv_heads, -1).transpose(1, 2)


def _multiple(num_rows: int) -> int:
    return -(-num_rows // _ROW_MULTIPLE) * _ROW_MULTIPLE


def _key_slots(spans: Sequence[Span], device: torch.device) -> slice | Tensor:
    return join_slots([span.key_slots(device) for span in spans], device)


def _is_hidden(key_positions: Tensor, positions: Tensor, window: int) -> Tensor:
    """Whether a query may not attend to a key: it comes later, or before the sliding window (0: none)."""
    hidden = key_positions > positions
    return hidden | (key_positions <= positions - window) if window else hidden


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """How layers with one geometry attend."""

    groups: list[SpanGroup]
    output_index: Tensor
    """The place of each (token, head) of the packed batch in the groups' outputs, [all rows * kv_heads]."""


class Pass:
    """What every layer of one pass shares.

    Args:
        segments: what the pass runs.
        slots: where the KV of the segments' tokens goes.
        branches: how those of trees are computed.
    """

    def __init__(
        self, segments: Sequence[Segment], slots: slice | Tensor, *, branches: Branches = Branches.APART
    ) -> None:
        self.segments = segments
        self._trees = {
            row: Tree(segment, branches) for row, segment in with_rows(segments) if segment.parents
        }
        self.slots = slots
        self.num_tokens = sum(len(segment.token_ids) for segment in segments)
        self._has_joined = False
        self._plans: dict[tuple[int, int, int, int], AttentionPlan] = {}

    @property
    def has_joined(self) -> bool:
        """Whether branches of a tree shared a call."""
        return self._has_joined

    @property
    def windows(self) -> set[int]:
        """Sliding windows that layers have asked for; 0 is none."""
        return {window for window, *_ in self._plans}

    def plan(self, window: int, num_kv_heads: int, query: Tensor) -> AttentionPlan:
        """The plan of layers that attend alike, made once for all of them; `query` as attention gets it."""
        _, num_heads, num_rows, head_dim = query.shape
        key = (window, num_kv_heads, num_heads, head_dim)
        if key not in self._plans:
            fold = num_heads // num_kv_heads
            spans_of_window = list(self._spans(window, may_join=not _is_small(head_dim)))
            self._has_joined = self._has_joined or any(span.paths for span in spans_of_window)
            groups = [
                SpanGroup(spans, window=window, num_kv_heads=num_kv_heads, fold=fold, like=query)
                for spans in _grouped(spans_of_window)
            ]
            written = torch.cat([group.output_index for group in groups])
            # What pads the pass takes any row.
            output_index = written.new_zeros(num_rows * num_heads)
            output_index[written] = torch.arange(len(written), device=query.device)
            self._plans[key] = AttentionPlan(groups, output_index)
        return self._plans[key]

    def _spans(self, window: int, *, may_join: bool) -> Iterator[Span]:
        for row, segment in with_rows(self.segments):
            if tree := self._trees.get(row):
                yield from tree.spans(row, window, may_join=may_join)
            else:
                yield from chain_spans(segment.allocation, row, segment.start, segment.stop, window)


def _grouped(spans: Iterable[Span]) -> Iterable[list[Span]]:
    """Spans that share a call. Rows that only fill up cost time: sizes within a factor of two."""
    groups: dict[tuple[int, int], list[Span]] = {}
    for span in spans:
        groups.setdefault((span.num_keys, (span.num_queries - 1).bit_length()), []).append(span)
    return groups.values()
