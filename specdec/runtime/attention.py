"""Attention of a packed batch over the KV pool, in the shape transformers calls it.

A cache object stores each layer's K and V in the pool and hands the layer on as a reference; the attention
function, registered with transformers' AttentionInterface, resolves the reference to each session's own K
and V. Layers that share another layer's KV pass the reference along.

One session's bits must not depend on what else is in the pass, nor on how many tokens are verified at once:
a near-tie rounded otherwise would make the output depend on the drafter. So a query attends to a range of
whole key blocks, masked, that is a function of its own position alone, or, in a tree, to keys laid out to the
same effect (`tree_keys`); and query rows come in multiples of `_ROW_MULTIPLE`. On CPUs the kernels then round
each row alike, in bf16 too; elsewhere they may still differ. Small heads need more: there each token gets
products of its own (`_is_small`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, Cache

from specdec.runtime.kv_pool import BLOCK_TOKENS, KvAllocation, KvPool, join_slots, write_rows
from specdec.runtime.tree_keys import Branches, TreeKeys

ATTENTION_NAME = "specdec_paged"
_ROW_MULTIPLE = 4
_MIN_SHARED_HEAD_DIM = 64


def _is_small(head_dim: int) -> bool:
    """Whether the heads are so small that a product over several tokens may round otherwise than over one.

    The library that multiplies chooses its kernel by the shape of a product. With heads of 64 and more the
    choice shows in no bit. With one KV head of 16, 28 and 32 query rows were seen to round otherwise than 4,
    on a CPU with AVX512-BF16 and without AMX. So tokens with small heads share no product, nor do branches.
    """
    return head_dim < _MIN_SHARED_HEAD_DIM


@dataclass(frozen=True, slots=True)
class Segment:
    """One session's part of a pass: `token_ids` at positions `start` onwards, over the KV before them."""

    allocation: KvAllocation
    start: int
    token_ids: Sequence[int]
    num_logits: int
    """Logits wanted: of the last `num_logits` tokens."""
    parents: Sequence[int] = ()
    """Of a tree, the index in token_ids of each token's parent, which comes before it; -1 for the first,
    the root. Token i is stored where position start + i would be, whatever its own. Empty: each token
    follows the one before."""

    @property
    def stop(self) -> int:
        """Position after the last token of a sequence; after the last one's place, of a tree."""
        return self.start + len(self.token_ids)

    @property
    def positions(self) -> Sequence[int]:
        """Position of each token: of a tree, by its depth."""
        if not self.parents:
            return range(self.start, self.stop)
        positions: list[int] = []
        for parent in self.parents:
            positions.append(self.start if parent < 0 else positions[parent] + 1)
        return positions


@dataclass(frozen=True, slots=True)
class _Span:
    """Neighbouring queries of one segment that attend to the same key blocks."""

    allocation: KvAllocation
    row: int
    """Of its first query, in the packed batch."""
    num_queries: int
    position: int
    """Of its first query."""
    first_key: int
    num_keys: int
    tokens: Mapping[int, int] = field(default_factory=dict)
    """Of a tree, whose keys are where, from its root on: the position whose slot has the key, by place."""
    paths: Sequence[Sequence[int]] = ()
    """Of branches side by side, the places from `num_shared` on that each query attends to, beside all keys
    before. Empty: the positions say it."""
    num_shared: int = 0

    def key_slots(self, device: torch.device) -> slice | Tensor:
        """Where the keys are, in order of their places."""
        stop_key = self.first_key + self.num_keys
        if not self.tokens:
            return self.allocation.slots(self.first_key, stop_key)
        positions = torch.arange(self.first_key, stop_key)
        moved = {place: at for place, at in self.tokens.items() if self.first_key <= place < stop_key}
        positions[[place - self.first_key for place in moved]] = torch.tensor([*moved.values()])
        # A place after the root that nothing is put at is hidden, and may be none of the session's own.
        return self.allocation.slots_at(positions.clamp_(max=self.allocation.capacity - 1).to(device))

    def hidden(self, device: torch.device) -> Tensor:
        """Of branches side by side, which keys a query may not attend to: [num_queries, num_keys]."""
        hidden = torch.ones(self.num_queries, self.num_keys, dtype=torch.bool)
        hidden[:, : self.num_shared] = False
        queries = [query for query, path in enumerate(self.paths) for _ in path]
        hidden[queries, [place for path in self.paths for place in path]] = False
        return hidden.to(device)


class _Group:
    """Spans of several sessions that one call attends for: with as many keys, and about as many queries.

    A span's queries and the heads that read the same K and V become rows of one product, so that nothing is
    repeated. Rows that only fill up are copies of the last one: a row without any key would be NaN.

    Args:
        fold: query heads per KV head.
        num_kv_heads: of the layers.
    """

    def __init__(
        self, spans: Sequence[_Span], *, window: int, num_kv_heads: int, fold: int, like: Tensor
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


def _key_slots(spans: Sequence[_Span], device: torch.device) -> slice | Tensor:
    return join_slots([span.key_slots(device) for span in spans], device)


def _is_hidden(key_positions: Tensor, positions: Tensor, window: int) -> Tensor:
    """Whether a query may not attend to a key: it comes later, or before the sliding window (0: none)."""
    hidden = key_positions > positions
    return hidden | (key_positions <= positions - window) if window else hidden


@dataclass(frozen=True, slots=True)
class _Plan:
    """How layers with one geometry attend."""

    groups: list[_Group]
    output_index: Tensor
    """Where in the groups' outputs, [all rows * kv_heads], each (token, head) of the packed batch is."""


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
            row: _Tree(segment, branches) for row, segment in _with_rows(segments) if segment.parents
        }
        self.slots = slots
        self.num_tokens = sum(len(segment.token_ids) for segment in segments)
        self._has_joined = False
        self._plans: dict[tuple[int, int, int, int], _Plan] = {}

    @property
    def has_joined(self) -> bool:
        """Whether branches of a tree shared a call."""
        return self._has_joined

    @property
    def windows(self) -> set[int]:
        """Sliding windows that layers have asked for; 0 is none."""
        return {window for window, *_ in self._plans}

    def plan(self, window: int, num_kv_heads: int, query: Tensor) -> _Plan:
        """The plan of layers that attend alike, made once for all of them; `query` as attention gets it."""
        _, num_heads, num_rows, head_dim = query.shape
        key = (window, num_kv_heads, num_heads, head_dim)
        if key not in self._plans:
            fold = num_heads // num_kv_heads
            spans_of_window = list(self._spans(window, may_join=not _is_small(head_dim)))
            self._has_joined = self._has_joined or any(span.paths for span in spans_of_window)
            groups = [
                _Group(spans, window=window, num_kv_heads=num_kv_heads, fold=fold, like=query)
                for spans in _grouped(spans_of_window)
            ]
            written = torch.cat([group.output_index for group in groups])
            # What pads the pass takes any row.
            output_index = written.new_zeros(num_rows * num_heads)
            output_index[written] = torch.arange(len(written), device=query.device)
            self._plans[key] = _Plan(groups, output_index)
        return self._plans[key]

    def _spans(self, window: int, *, may_join: bool) -> Iterator[_Span]:
        for row, segment in _with_rows(self.segments):
            if tree := self._trees.get(row):
                yield from tree.spans(row, window, may_join=may_join)
            else:
                yield from _spans(segment.allocation, row, segment.start, segment.stop, window)


def _with_rows(segments: Sequence[Segment]) -> Iterator[tuple[int, Segment]]:
    """Segments with the row of the packed batch at which each begins."""
    row = 0
    for segment in segments:
        yield row, segment
        row += len(segment.token_ids)


def _spans(
    allocation: KvAllocation,
    row: int,
    start: int,
    stop: int,
    window: int,
    tokens: Mapping[int, int] | None = None,
) -> Iterator[_Span]:
    """Cut queries at positions start to stop, the first of them `row` of the batch, where the range of key
    blocks changes."""

    def key_range(position: int) -> tuple[int, int]:
        first = max(0, position - window + 1) if window else 0
        return first // BLOCK_TOKENS * BLOCK_TOKENS, (position // BLOCK_TOKENS + 1) * BLOCK_TOKENS

    for (first_key, stop_key), group in groupby(range(start, stop), key_range):
        positions = list(group)
        yield _Span(
            allocation,
            row + positions[0] - start,
            len(positions),
            positions[0],
            first_key,
            stop_key - first_key,
            tokens or {},
        )


class _Tree:
    """A tree as a bundle of chains: runs of tokens that follow one another, each with its ancestors' keys.

    So a token's query meets the keys it would meet in a chain, in the same order, and gets the same bits.
    Every token is in one run; depth first there are as many runs as leaves. Neighbouring runs share a span
    where their keys have room side by side.
    """

    def __init__(self, segment: Segment, branches: Branches) -> None:
        self._segment, self._positions = segment, segment.positions
        parents = segment.parents
        self._paths: list[list[int]] = []
        for index, parent in enumerate(parents):
            self._paths.append([index] if parent < 0 else [*self._paths[parent], index])
        heads = [index for index, parent in enumerate(parents) if not index or parent != index - 1]
        self._runs = [range(head, stop) for head, stop in pairwise([*heads, len(parents)])]
        self._bundles = [] if branches is Branches.APART else list(self._join(branches is Branches.EXACT))

    def _join(self, is_exact: bool) -> Iterator[tuple[list[range], TreeKeys]]:
        """Neighbouring runs that fit side by side, one that fits beside none alone; nothing if none can."""
        runs = self._runs
        while runs:
            keys, num_joined = TreeKeys(self._segment.start, self._segment.parents, is_exact=is_exact), 0
            if not keys.has_room:
                return  # nor has any of the others
            while num_joined < len(runs) and keys.add(self._paths[runs[num_joined][-1]]):
                num_joined += 1
            bundle, runs = runs[: max(1, num_joined)], runs[max(1, num_joined) :]
            yield bundle, keys

    def spans(self, row: int, window: int, *, may_join: bool) -> Iterator[_Span]:
        """What layers with that sliding window (0: none) attend in; the root is `row` of the packed batch."""
        # Within the first window no key is hidden for being too old.
        if may_join and self._bundles and not (window and max(self._positions) >= window):
            for bundle, keys in self._bundles:
                if len(bundle) > 1:
                    yield self._joined(row, range(bundle[0].start, bundle[-1].stop), keys)
                else:
                    yield from self._alone(row, bundle[0], window)
        else:
            for run in self._runs:
                yield from self._alone(row, run, window)

    def _joined(self, row: int, queries: range, keys: TreeKeys) -> _Span:
        """Several runs, side by side."""
        start = self._segment.start
        return _Span(
            self._segment.allocation,
            row + queries.start,
            len(queries),
            self._positions[queries.start],
            first_key=0,
            num_keys=-(-keys.num_places // BLOCK_TOKENS) * BLOCK_TOKENS,
            tokens={place: start + token for place, token in keys.tokens.items()},
            paths=[keys.paths[query] for query in queries],
            num_shared=keys.num_shared,
        )

    def _alone(self, row: int, run: range, window: int) -> Iterator[_Span]:
        """One run, as a chain whose ancestors' keys are elsewhere."""
        start, path = self._segment.start, self._paths[run[-1]]
        tokens = {start + depth: start + token for depth, token in enumerate(path)}
        first, last = self._positions[run[0]], self._positions[run[-1]]
        return _spans(self._segment.allocation, row + run.start, first, last + 1, window, tokens)


def _grouped(spans: Iterable[_Span]) -> Iterable[list[_Span]]:
    """Spans that share a call. Rows that only fill up cost time: sizes within a factor of two."""
    groups: dict[tuple[int, int], list[_Span]] = {}
    for span in spans:
        groups.setdefault((span.num_keys, (span.num_queries - 1).bit_length()), []).append(span)
    return groups.values()


class _LayerKv:
    """Stands for one layer's K (and V) of all sessions on the way from cache to attention."""

    def __init__(self, cache: PoolCache, layer: int) -> None:
        self.cache = cache
        self.layer = layer

    def to(self, *_args: Any, **_kwargs: Any) -> _LayerKv:
        """Models move shared KV between devices; the pool stays where it is."""
        return self


class PoolCache(Cache):
    """The cache a model sees during one pass."""

    def __init__(self, pool: KvPool, current: Pass) -> None:
        super().__init__(layers=[])
        self.pool = pool
        self.current = current

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_args: Any, **_kwargs: Any
    ) -> tuple[_LayerKv, _LayerKv]:
        """Store [1, heads, tokens, dim] of all segments; the result goes to attention as it is."""
        slots = self.current.slots
        for pool, states in (
            (self.pool.keys[layer_idx], key_states),
            (self.pool.values[layer_idx], value_states),
        ):
            # [tokens, heads, dim], without what pads the pass
            tokens = states[0].transpose(0, 1)[: self.current.num_tokens]
            write_rows(pool, slots, tokens)
        reference = _LayerKv(self, layer_idx)
        return reference, reference

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are given to the model; nothing may be derived from the cache."""
        return 0


def _paged_attention(
    module: nn.Module,
    query: Tensor,  # [1, num_heads, num_tokens, head_dim]
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of each segment over its own KV; returns [1, num_tokens, num_heads, value_dim]."""
    keys, values = key.cache.pool.keys[key.layer], key.cache.pool.values[key.layer]
    _, num_heads, num_tokens, head_dim = query.shape
    plan = key.cache.current.plan(sliding_window or 0, keys.shape[1], query)
    rows = query[0].transpose(0, 1).reshape(-1, head_dim)
    outputs = [
        group.attend(rows, keys, values, partial(_attend, scaling=scaling, softcap=softcap))
        .transpose(1, 2)
        .reshape(-1, values.shape[-1])
        for group in plan.groups
    ]
    output = (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).index_select(0, plan.output_index)
    return output.view(1, num_tokens, num_heads, -1), None


def _attend(
    query: Tensor,  # [spans, kv_heads, rows, head_dim]
    key: Tensor,  # [spans, kv_heads, keys, head_dim]
    value: Tensor,  # [spans, kv_heads, keys, value_dim]
    mask: Tensor,  # [spans, 1, rows, keys]
    scaling: float | None,
    softcap: float | None,
) -> Tensor:  # [spans, kv_heads, rows, value_dim]
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


AttentionInterface.register(ATTENTION_NAME, _paged_attention)
