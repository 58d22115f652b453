"""Which keys each token of a packed pass attends to: segments, and the spans that they are cut into.

Spans are for torch's attention; where a kernel attends (`kernels.attention`) there are none. A session's
answer should not depend on what else is in the pass, nor on how many tokens are verified at once. So a query
attends to a range of whole key blocks, masked, that is a function of its own position alone, in a tree too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy
from numpy.typing import NDArray

from specdec.runtime.kv_slots import BLOCK_TOKENS, KvAllocation


@dataclass(frozen=True, slots=True)
class Segment:
    """One session's part of a pass: `token_ids` at positions `start` onwards, over the KV before them."""

    allocation: KvAllocation
    start: int
    token_ids: Sequence[int]
    num_logits: int
    """How many tokens, the last ones, have their logits computed."""
    parents: Sequence[int] = ()
    """The index in token_ids of each token's parent, which comes before it, where the tokens are a tree; -1
    for the first, the root. Token i is stored where position start + i would be, whatever its own position.
    Empty: each token follows the one before."""

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

    @property
    def paths(self) -> Sequence[Sequence[int]]:
        """The tokens of a tree from the root to each, as indices in token_ids."""
        paths: list[list[int]] = []
        for index, parent in enumerate(self.parents):
            paths.append([index] if parent < 0 else [*paths[parent], index])
        return paths


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring queries of one segment that attend to the same key blocks."""

    allocation: KvAllocation
    row: int
    """Row of its first query in the packed batch."""
    num_queries: int
    position: int
    """Position of its first query."""
    first_key: int
    num_keys: int
    tokens: Mapping[int, int] = field(default_factory=dict)
    """The position whose slot has the key of each place, from a tree's root on."""

    def key_slots(self) -> slice | NDArray[numpy.int64]:
        """The slots of the keys, in order of their places."""
        stop_key = self.first_key + self.num_keys
        if not self.tokens:
            return self.allocation.host_slots(self.first_key, stop_key)
        positions = numpy.arange(self.first_key, stop_key)
        moved = {place: at for place, at in self.tokens.items() if self.first_key <= place < stop_key}
        positions[[place - self.first_key for place in moved]] = [*moved.values()]
        # A place that nothing is put at is hidden, and may be none of the session's own.
        return self.allocation.host_slots_at(positions.clip(max=self.allocation.length - 1))

    def hidden(self) -> None:
        """Which keys a query may not attend to: as the positions say."""


def with_rows(segments: Sequence[Segment]) -> Iterator[tuple[int, Segment]]:
    """Segments with the row of the packed batch at which each begins."""
    row = 0
    for segment in segments:
        yield row, segment
        row += len(segment.token_ids)


def first_key(position: int, window: int) -> int:
    """Return the position of the first key that a query sees, with a sliding window (0: none)."""
    return max(0, position - window + 1) if window else 0


def chain_spans(
    allocation: KvAllocation,
    row: int,
    start: int,
    stop: int,
    window: int,
    tokens: Mapping[int, int] | None = None,
) -> Iterator[Span]:
    """Cut queries at positions start to stop, the first of them `row` of the batch, where the range of key
    blocks changes."""

    def key_range(position: int) -> tuple[int, int]:
        first = first_key(position, window)
        return first // BLOCK_TOKENS * BLOCK_TOKENS, (position // BLOCK_TOKENS + 1) * BLOCK_TOKENS

    for (first, stop_key), group in groupby(range(start, stop), key_range):
        positions = list(group)
        yield Span(
            allocation,
            row + positions[0] - start,
            len(positions),
            positions[0],
            first,
            stop_key - first,
            tokens or {},
        )


def tree_spans(segment: Segment, row: int, window: int) -> Iterator[Span]:
    """A tree as a bundle of chains: runs of tokens that follow one another, each with its ancestors' keys.

    So a token's query meets the keys it would meet in a chain, in the same order. Every token is in one run;
    depth first there are as many runs as leaves. The root is `row` of the packed batch.
    """
    parents, positions, start, paths = segment.parents, segment.positions, segment.start, segment.paths
    heads = [index for index, parent in enumerate(parents) if not index or parent != index - 1]
    for head, stop in pairwise([*heads, len(parents)]):
        tokens = {start + depth: start + token for depth, token in enumerate(paths[stop - 1])}
        first, last = positions[head], positions[stop - 1]
        table = segment.allocation.table(window > 0)
        yield from chain_spans(table, row + head, first, last + 1, window, tokens)
