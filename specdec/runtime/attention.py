"""Attention of a packed batch over the KV pool, in the shape transformers calls it.

A cache object stores each layer's K and V in the pool and hands the layer on as a reference; the attention
function, registered with transformers' AttentionInterface, resolves the reference to each session's own K
and V. Layers that share another layer's KV pass the reference along.

One session's bits must not depend on what else is in the pass, nor on how many tokens are verified at once:
a near-tie rounded otherwise would make the output depend on the drafter. So a query attends to a range of
whole key blocks, masked, that is a function of its own position alone, and query rows come in multiples of
`_ROW_MULTIPLE`. On CPUs the kernels then round each row alike, in bf16 too; elsewhere they may still differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, Cache

from specdec.runtime.kv_pool import BLOCK_TOKENS, KvAllocation, KvPool

ATTENTION_NAME = "specdec_paged"
_ROW_MULTIPLE = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """One session's part of a pass: `token_ids` at positions `start` onwards, over the KV before them."""

    allocation: KvAllocation
    start: int
    token_ids: Sequence[int]
    num_logits: int
    """Logits wanted: of the last `num_logits` tokens."""

    @property
    def stop(self) -> int:
        """Position after the last token."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class _Span:
    """Neighbouring queries of one segment that attend to the same key blocks."""

    segment: Segment
    rows: slice
    """Where they are in the packed batch."""
    first_position: int
    first_key: int
    stop_key: int

    def mask(self, window: int, fold: int, like: Tensor) -> Tensor:
        """Additive causal mask [fold * queries, rounded up, keys]."""
        num_queries = self.rows.stop - self.rows.start
        positions = torch.arange(num_queries, device=like.device)[:, None] + self.first_position
        key_positions = torch.arange(self.first_key, self.stop_key, device=like.device)
        hidden = key_positions > positions
        if window:
            hidden |= key_positions <= positions - window
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        mask = mask.masked_fill_(hidden, float("-inf")).repeat(fold, 1)
        # Rows that only fill up see every key: a row without any would be NaN.
        return pad(mask, (0, 0, 0, -len(mask) % _ROW_MULTIPLE))


class Pass:
    """What every layer of one pass shares.

    Args:
        segments: what the pass runs.
        slots: where the KV of the segments' tokens goes.
    """

    def __init__(self, segments: Sequence[Segment], slots: slice | Tensor) -> None:
        self.segments = segments
        self.slots = slots
        self.num_tokens = sum(len(segment.token_ids) for segment in segments)
        self._plans: dict[tuple[int, int], list[tuple[_Span, Tensor]]] = {}

    @property
    def windows(self) -> set[int]:
        """Sliding windows that layers have asked for; 0 is none."""
        return {window for window, _ in self._plans}

    def plan(self, window: int, fold: int, like: Tensor) -> list[tuple[_Span, Tensor]]:
        """The spans of all segments in packed order, each with its mask; made once for all layers."""
        plan = self._plans.get((window, fold))
        if plan is None:
            spans = [span for row, segment in self._rows() for span in _spans(segment, row, window)]
            plan = [(span, span.mask(window, fold, like)) for span in spans]
            self._plans[window, fold] = plan
        return plan

    def _rows(self) -> Iterator[tuple[int, Segment]]:
        row = 0
        for segment in self.segments:
            yield row, segment
            row += len(segment.token_ids)


def _spans(segment: Segment, row: int, window: int) -> Iterator[_Span]:
    """Cut a segment, whose first token is `row` of the batch, where the range of key blocks changes."""

    def key_range(position: int) -> tuple[int, int]:
        first = max(0, position - window + 1) if window else 0
        return first // BLOCK_TOKENS * BLOCK_TOKENS, (position // BLOCK_TOKENS + 1) * BLOCK_TOKENS

    for keys, group in groupby(range(segment.start, segment.stop), key_range):
        positions = list(group)
        first = row + positions[0] - segment.start
        yield _Span(segment, slice(first, first + len(positions)), positions[0], *keys)


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
            if isinstance(slots, slice):
                pool[slots] = tokens
            else:
                pool.index_copy_(0, slots, tokens)
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
    current = key.cache.current
    keys, values = key.cache.pool.keys[key.layer], key.cache.pool.values[key.layer]
    fold = query.shape[1] // keys.shape[1]
    outputs = []
    for span, mask in current.plan(sliding_window or 0, fold, query):
        slots = span.segment.allocation.slots(span.first_key, span.stop_key)
        span_keys, span_values = keys[slots].transpose(0, 1), values[slots].transpose(0, 1)
        output = _attend(query[0, :, span.rows], span_keys, span_values, mask, scaling, softcap)
        outputs.append(output.transpose(0, 1))
    if padding := query.shape[2] - current.num_tokens:
        outputs.append(outputs[0].new_zeros(padding, *outputs[0].shape[1:]))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0), None


def _attend(
    query: Tensor,  # [num_heads, num_tokens, head_dim]
    key: Tensor,  # [num_kv_heads, num_keys, head_dim]
    value: Tensor,  # [num_kv_heads, num_keys, value_dim]
    mask: Tensor,  # [num_rows, num_keys]
    scaling: float | None,
    softcap: float | None,
) -> Tensor:  # [num_heads, num_tokens, value_dim]
    num_heads, num_tokens, head_dim = query.shape
    # Heads that read the same K and V become rows of one product: nothing is repeated.
    rows = query.reshape(len(key), -1, head_dim)
    num_rows = rows.shape[1]
    rows = pad(rows, (0, 0, 0, len(mask) - num_rows))
    if softcap:
        output = _softcapped(rows, key, value, mask, scaling or head_dim**-0.5, softcap)
    else:
        output = scaled_dot_product_attention(
            rows[None], key[None], value[None], attn_mask=mask, scale=scaling
        )[0]
    return output[:, :num_rows].reshape(num_heads, num_tokens, -1)


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float
) -> Tensor:
    """Attention with tanh-capped scores (Gemma 2), which the fused kernels do not offer."""
    scores = query @ key.transpose(-1, -2) * scaling
    scores = torch.tanh(scores / softcap) * softcap + mask
    return scores.float().softmax(-1).to(value.dtype) @ value


AttentionInterface.register(ATTENTION_NAME, _paged_attention)
