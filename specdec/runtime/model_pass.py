"""One pass over the model: the buffers that every layer reads, made on the host before the first layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy
import torch
from torch import Tensor

from specdec.runtime.attention import Segment, chain_spans, tree_spans, with_rows
from specdec.runtime.attention_plan import AnySpan, AttentionPlan, Geometry, SpanGroup
from specdec.runtime.bucket import Bucket, MaskedSpan, padded
from specdec.runtime.kernels.attention import RowPlan, SessionRows, attends
from specdec.runtime.kv_slots import Indices, as_indices, device_slots, join_slots

_MIN_PASS_TOKENS = 2
"""A pass over one token is padded to this many. Matrix products with a single row take another path through
oneDNN, which rounds otherwise in bf16: padded, plain decoding and verification give the same bits."""


class Pass:
    """What every layer of one pass shares: the buffers that it reads, and how it attends.

    Args:
        segments: what the pass runs.
        dtype: of keys, values and queries.
        joins_branches: whether a tree's branches share calls, where a kernel does not see to that.
        bucket: sizes that the pass is filled up to, its branches side by side; None: it has its own.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        dtype: torch.dtype,
        device: torch.device,
        joins_branches: bool = False,
        bucket: Bucket | None = None,
    ) -> None:
        self.segments = segments
        self._dtype, self._device, self.bucket = dtype, device, bucket
        self._joins_branches = joins_branches
        token_ids = [token_id for segment in segments for token_id in segment.token_ids]
        positions = [position for segment in segments for position in segment.positions]
        self.num_tokens = len(token_ids)
        self.num_rows = bucket.num_rows if bucket else max(_MIN_PASS_TOKENS, self.num_tokens)
        """Tokens, and rows that only fill up: they repeat the last token."""
        self.num_stored = self.num_rows if bucket else self.num_tokens
        """How many rows are kept, at `slots`."""
        self.token_ids = self._tensor(padded(token_ids, self.num_rows))
        self.positions = self._tensor(padded(positions, self.num_rows))
        self.slots = self._slots(is_sliding=False)
        """Where the KV of the tokens goes, and their hidden states."""
        has_window = any(segment.allocation.sliding for segment in segments)
        self._window_slots = self._slots(is_sliding=True) if has_window else self.slots
        self.num_logits = [segment.num_logits for segment in segments]
        self.logit_rows = self._tensor(range(self.num_rows) if bucket else _logit_rows(segments))
        """Rows whose logits are computed: in a bucket all of them, the first of which are wanted."""
        self._plans: dict[Geometry, AttentionPlan | RowPlan] = {}

    def _slots(self, *, is_sliding: bool) -> slice | Tensor:
        slots = join_slots(
            [
                segment.allocation.table(is_sliding).host_slots(segment.start, segment.stop)
                for segment in self.segments
            ]
        )
        if self.bucket:
            # Always a tensor of that size: what repeats a token stores the same once more.
            slots = padded(as_indices(slots), self.num_rows)
        return device_slots(slots, self._device)

    def slots_of(self, *, is_sliding: bool) -> slice | Tensor:
        """Return where the KV of the tokens goes, of layers that have a sliding window or that have none."""
        return self._window_slots if is_sliding else self.slots

    def _tensor(self, values: Sequence[int] | Indices) -> Tensor:
        return torch.from_numpy(numpy.asarray(values, dtype=numpy.int64)).to(self._device)

    def buffers(self) -> list[Tensor]:
        """All tensors that a pass of a bucket reads, in an order that is the same for all of that bucket."""
        assert self.bucket
        assert isinstance(self.slots, Tensor)
        assert isinstance(self._window_slots, Tensor)
        plans = [self._plans[geometry] for geometry in sorted(self._plans)]
        own = [self.token_ids, self.positions, self.slots, self.logit_rows]
        if self._window_slots is not self.slots:
            own.append(self._window_slots)
        return own + [tensor for plan in plans for tensor in plan.buffers()]

    def split(self, logits: Tensor) -> list[Tensor]:
        """Return the logits [num_logits, vocab_size] of each segment, of those that the pass computed."""
        return list(logits[: sum(self.num_logits)].split(self.num_logits))

    @property
    def windows(self) -> set[int]:
        """Sliding windows that layers have asked for; 0 is none."""
        return {geometry.window for geometry in self._plans}

    def plan(self, geometry: Geometry) -> AttentionPlan | RowPlan:
        """The plan of layers that attend alike, made once for all of them."""
        plan = self._plans.get(geometry)
        if plan is None:
            plan = self._plans[geometry] = self._make_plan(geometry)
        return plan

    def _make_plan(self, geometry: Geometry) -> AttentionPlan | RowPlan:
        if not self.bucket and attends(self._dtype, self._device, geometry.head_dim, geometry.value_dim):
            sessions = [
                SessionRows.of(segment, row, geometry.window) for row, segment in with_rows(self.segments)
            ]
            return RowPlan(sessions, geometry, self.num_rows)
        if self.bucket:
            grouped: Iterable[Sequence[AnySpan]] = [self.bucket.spans(self.segments, geometry.window)]
        else:
            grouped = _grouped(self._spans(geometry.window))
        groups = [
            SpanGroup(alike, geometry, dtype=self._dtype, device=self._device, bucket=self.bucket)
            for alike in grouped
        ]
        written = numpy.concatenate([group.output_index for group in groups])
        output_index = numpy.zeros((self.num_rows, geometry.num_heads), dtype=numpy.int64)
        output_index.ravel()[written] = numpy.arange(len(written))
        # What fills up goes on repeating the last token, in every layer.
        output_index[self.num_tokens :] = output_index[self.num_tokens - 1]
        return AttentionPlan(groups, torch.from_numpy(output_index).to(self._device))

    def _spans(self, window: int) -> Iterator[AnySpan]:
        for row, segment in with_rows(self.segments):
            if not segment.parents:
                table = segment.allocation.table(window > 0)
                yield from chain_spans(table, row, segment.start, segment.stop, window)
            elif self._joins_branches:
                yield MaskedSpan.of(segment, row, window)
            else:
                yield from tree_spans(segment, row, window)


def _logit_rows(segments: Sequence[Segment]) -> list[int]:
    """Indices, in the packed batch, of the tokens whose logits are wanted."""
    rows: list[int] = []
    stop = 0
    for segment in segments:
        stop += len(segment.token_ids)
        rows.extend(range(stop - segment.num_logits, stop))
    return rows


def _grouped(spans: Iterable[AnySpan]) -> Iterable[list[AnySpan]]:
    """Spans that share a call. Rows that only fill up cost time: sizes within a factor of two."""
    groups: dict[tuple[int, int], list[AnySpan]] = {}
    for span in spans:
        groups.setdefault((span.num_keys, (span.num_queries - 1).bit_length()), []).append(span)
    return groups.values()
