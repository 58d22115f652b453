"""Which keys each token of a packed pass attends to: segments, and the spans that they are cut into.

One session's bits must not depend on what else is in the pass, nor on how many tokens are verified at once:
a near-tie rounded otherwise would make the output depend on the drafter. So a query attends to a range of
whole key blocks, masked, that is a function of its own position alone, or, in a tree, to keys laid out to the
same effect (`tree_keys`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy
from numpy.typing import NDArray

from specdec.runtime.kv_pool import BLOCK_TOKENS, KvAllocation
from specdec.runtime.tree_keys import Branches, TreeKeys


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
    branches: TreeKeys | None = None
    """Where the keys are, if branches lie side by side."""
    queried: Sequence[int] = ()
    """Which tokens the queries are of, then."""

    def key_slots(self) -> slice | NDArray[numpy.int64]:
        """The slots of the keys, in order of their places."""
        stop_key = self.first_key + self.num_keys
        if not self.branches and not self.tokens:
            return self.allocation.host_slots(self.first_key, stop_key)
        positions = numpy.arange(self.first_key, stop_key)
        if self.branches:
            placed = self.branches.positions()
            positions[: len(placed)] = placed
        else:
            moved = {place: at for place, at in self.tokens.items() if self.first_key <= place < stop_key}
            positions[[place - self.first_key for place in moved]] = [*moved.values()]
        # A place that nothing is put at is hidden, and may be none of the session's own.
        return self.allocation.host_slots_at(positions.clip(max=self.allocation.capacity - 1))

    def hidden(self) -> NDArray[numpy.bool_] | None:
        """Which keys a query may not attend to [num_queries, num_keys]; None: as the positions say."""
        if not self.branches:
            return None
        hidden = numpy.ones((self.num_queries, self.num_keys), dtype=numpy.bool_)
        hidden[:, : self.branches.num_shared] = False
        for of_query, token in zip(hidden, self.queried, strict=True):
            path = self.branches.paths[token]
            of_query[path.common : path.common + self.branches.num_common] = False
            of_query[[*path.own]] = False
        return hidden


def with_rows(segments: Sequence[Segment]) -> Iterator[tuple[int, Segment]]:
    """Segments with the row of the packed batch at which each begins."""
    row = 0
    for segment in segments:
        yield row, segment
        row += len(segment.token_ids)


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
        first = max(0, position - window + 1) if window else 0
        return first // BLOCK_TOKENS * BLOCK_TOKENS, (position // BLOCK_TOKENS + 1) * BLOCK_TOKENS

    for (first_key, stop_key), group in groupby(range(start, stop), key_range):
        positions = list(group)
        yield Span(
            allocation,
            row + positions[0] - start,
            len(positions),
            positions[0],
            first_key,
            stop_key - first_key,
            tokens or {},
        )


class Tree:
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
        """Neighbouring runs that fit side by side; one that fits beside none is alone."""
        runs = self._runs
        while runs:
            keys, num_joined = TreeKeys(self._segment.start, self._segment.parents, is_exact=is_exact), 0
            while num_joined < len(runs) and keys.add(self._paths[runs[num_joined][-1]]):
                num_joined += 1
            bundle, runs = runs[: max(1, num_joined)], runs[max(1, num_joined) :]
            yield bundle, keys

    def spans(self, row: int, window: int, *, may_join: bool) -> Iterator[Span]:
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

    def _joined(self, row: int, queries: range, keys: TreeKeys) -> Span:
        """Several runs, side by side."""
        return Span(
            self._segment.allocation,
            row + queries.start,
            len(queries),
            self._positions[queries.start],
            first_key=0,
            num_keys=-(-keys.num_places // BLOCK_TOKENS) * BLOCK_TOKENS,
            branches=keys,
            queried=queries,
        )

    def _alone(self, row: int, run: range, window: int) -> Iterator[Span]:
        """One run, as a chain whose ancestors' keys are elsewhere."""
        start, path = self._segment.start, self._paths[run[-1]]
        tokens = {start + depth: start + token for depth, token in enumerate(path)}
        first, last = self._positions[run[0]], self._positions[run[-1]]
        return chain_spans(self._segment.allocation, row + run.start, first, last + 1, window, tokens)
