"""Passes filled up to a few sizes, so that all passes of a size are one computation over other buffers.

A CUDA graph records such a computation once and replays it. What fills up does no harm: rows repeat the last
token, which stores the same keys and values once more; sessions repeat the last one; further keys are hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from specdec.runtime.attention import Segment, first_key, with_rows
from specdec.runtime.kv_slots import Indices, KvAllocation

MAX_QUERIES = 64
"""Most tokens of a session in a pass that is filled up; a prefill is not."""
_MIN_KEYS = 256


@dataclass(frozen=True, slots=True)
class Bucket:
    """The sizes of a pass."""

    num_spans: int
    """Sessions."""
    num_queries: int
    """Tokens of each session."""
    num_keys: int
    """Keys of each session, where no sliding window leaves fewer."""

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Bucket:
        """Return the smallest bucket that holds a pass over the segments."""
        return cls(
            _power_of_2(len(segments)),
            _power_of_2(max(len(segment.token_ids) for segment in segments)),
            max(_MIN_KEYS, _power_of_2(max(segment.stop for segment in segments))),
        )

    @property
    def num_rows(self) -> int:
        """Rows of the pass."""
        return self.num_spans * self.num_queries

    def keys_in(self, window: int) -> int:
        """Return how many keys of a session layers with that window read (0: no window)."""
        return min(self.num_keys, _power_of_2(window + self.num_queries)) if window else self.num_keys

    def spans(self, segments: Sequence[Segment], window: int) -> list[MaskedSpan]:
        """Return a span for each session, as many as the bucket has."""
        spans = [
            MaskedSpan.of(segment, row, window, self.keys_in(window)) for row, segment in with_rows(segments)
        ]
        return spans + spans[-1:] * (self.num_spans - len(spans))


def fits(segments: Sequence[Segment]) -> bool:
    """Say whether a pass is one to fill up: one of rounds, without a prefill."""
    return all(segment.num_logits == len(segment.token_ids) <= MAX_QUERIES for segment in segments)


@dataclass(frozen=True, slots=True)
class MaskedSpan:
    """All tokens of a session, with a mask that says which keys each attends to; see `attention.Span`."""

    allocation: KvAllocation
    row: int
    num_queries: int
    position: int
    first_key: int
    num_keys: int
    seen: NDArray[numpy.bool_]
    """Which keys of the session each token attends to [num_queries, keys of the session from the first]."""

    @classmethod
    def of(cls, segment: Segment, row: int, window: int, num_keys: int = 0) -> MaskedSpan:
        """Return the span of a segment whose first token is `row` of the packed batch.

        Args:
            num_keys: what the keys are filled up to; 0: there are as many as the segment has.
        """
        positions = numpy.array(segment.positions, dtype=numpy.int64)
        first = first_key(segment.start, window)
        before = numpy.arange(first, segment.start)
        own = _ancestors(segment)
        seen = numpy.concatenate([numpy.ones((len(positions), len(before)), dtype=numpy.bool_), own], axis=1)
        if window:
            seen &= numpy.concatenate([before, positions]) > positions[:, None] - window
        size = num_keys or seen.shape[1]
        table = segment.allocation.table(window > 0)
        return cls(table, row, len(positions), segment.start, first, size, seen)

    def key_slots(self) -> Indices:
        """The slots of the keys; the first one's stands for those that only fill up."""
        slots = self.allocation.host_slots_at(
            numpy.arange(self.first_key, self.first_key + self.seen.shape[1], dtype=numpy.int64)
        )
        return numpy.pad(slots, (0, self.num_keys - len(slots)), mode="constant", constant_values=slots[0])

    def hidden(self) -> NDArray[numpy.bool_]:
        """Which keys a token may not attend to [num_queries, num_keys]."""
        hidden = numpy.ones((self.num_queries, self.num_keys), dtype=numpy.bool_)
        hidden[:, : self.seen.shape[1]] = ~self.seen
        return hidden


def _ancestors(segment: Segment) -> NDArray[numpy.bool_]:
    """Which tokens of a segment are ancestors of each, or the token itself [tokens, tokens]."""
    size = len(segment.token_ids)
    if not segment.parents:
        return numpy.tri(size, dtype=numpy.bool_)
    own = numpy.eye(size, dtype=numpy.bool_)
    for index, parent in enumerate(segment.parents):
        if parent >= 0:
            own[index] |= own[parent]
    return own


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def padded(values: Sequence[int] | Indices, size: int) -> Indices:
    """Return values [size], the last one repeated."""
    array = numpy.asarray(values, dtype=numpy.int64)
    return numpy.pad(array, (0, size - len(array)), mode="edge")
