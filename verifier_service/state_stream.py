"""One session's state while it grows, and the streams that follow it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from specdec.contract.errors import InvalidArgumentError, ResourceExhaustedError
from specdec.contract.target_state import (
    GENERATIONS,
    PROJECTED,
    TargetStateRef,
    TargetStateSpec,
    TensorRef,
    WindowBlocks,
)
from specdec.runtime.kv_pool import KvPool
from specdec.runtime.kv_slots import KvAllocation
from specdec.state.view import Projection, TargetStateView, tensor_bytes

ValueT = TypeVar("ValueT")

_CHUNK_BYTES = 512 * 1024
_MAX_PROJECTED_POSITIONS = 64
"""Positions projected at a time; a prompt's worth would hold up every round."""
MAX_STREAMS_PER_SESSION = 4
"""How often the state of a session may be streamed at a time."""


class RunOnEngine(Protocol):
    """Calls a function on the engine thread, after the pass under way."""

    def __call__(self, function: Callable[[], ValueT], num_tokens: int = 0) -> Awaitable[ValueT]:
        """Return what the function returns; it costs about as much as `num_tokens` of prefill."""


@dataclass(frozen=True, slots=True)
class StateChunk:
    """Positions `start` to `stop` of every tensor, as bytes by name."""

    start: int
    stop: int
    rows: dict[str, bytes]
    num_gone: Mapping[str, int] = field(default_factory=dict)
    """How many positions, the first, some tensors lack."""


class ExportedState:
    """One session's state while the session lives.

    Args:
        ref: the handle, tensors included.
        hidden_names: what passes of the session capture.
        window_of: says where the last positions are in layers with a sliding window, if that is elsewhere.
    """

    def __init__(
        self,
        ref: TargetStateRef,
        spec: TargetStateSpec,
        allocation: KvAllocation,
        hidden_names: frozenset[str],
        window_of: Callable[[KvAllocation], WindowBlocks | None],
    ) -> None:
        self.spec = spec
        self.allocation = allocation
        """The session's slots; another allocation takes its place when the session gets on."""
        self.hidden_names = hidden_names
        self.num_streams = 0
        self.is_closed = False
        self.cached_length = 0
        self._window_of = window_of
        self._ref = ref
        """The handle with all the blocks that readers were told of."""
        self._changed = asyncio.Event()

    @property
    def session_id(self) -> str:
        """Names the session to whoever was given its handle."""
        return self._ref.session_id

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """The session's tensors."""
        return self._ref.tensors

    def first_ref(self) -> TargetStateRef:
        """Return the handle as the answer to an open carries it."""
        return replace(self._ref, cached_length=self.cached_length, window=self._window_of(self.allocation))

    def next_ref(self) -> TargetStateRef:
        """Return the handle as the next answer carries it, with the blocks that were added since the last."""
        blocks = self.allocation.blocks
        told = replace(self._ref, window=self._window_of(self.allocation))
        if len(blocks) == len(told.block_ids):
            return told.at(self.cached_length)
        self._ref = replace(self._ref, block_ids=blocks)
        return told.at(self.cached_length, blocks)

    def advance(self, cached_length: int) -> None:
        """Publish positions below `cached_length`; they never change again."""
        assert self.cached_length <= cached_length, "published state never shrinks"
        self.cached_length = cached_length
        self._notify()

    def close(self) -> None:
        """End the session's streams."""
        self.is_closed = True
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_beyond(self, position: int) -> bool:
        """Wait for more than `position` positions; False: the session has ended."""
        while not self.is_closed and self.cached_length <= position:
            await self._changed.wait()
        return not self.is_closed


class StateStreams:
    """Streams of sessions' state.

    Args:
        pool: memory of all sessions.
        run_on_engine: where projections are computed.
    """

    def __init__(self, pool: KvPool, run_on_engine: RunOnEngine) -> None:
        self.num_streams = 0
        self._pool = pool
        self._run_on_engine = run_on_engine

    async def follow(
        self,
        state: ExportedState,
        start: int,
        projection: Projection | None,
        tensor_names: Collection[str] = (),
    ) -> AsyncGenerator[StateChunk]:
        """Yield positions from `start` on as they become final, until the session ends.

        Args:
            tensor_names: which of the session's tensors; empty: all of them.

        Raises:
            InvalidArgumentError: a projection of other hidden states than the session's, or a tensor that
                the session does not have.
            ResourceExhaustedError: too many streams of this session.
        """
        names = _streamed_names(state, projection, tensor_names)
        num_positions = self._num_positions(names, projection)
        with self._counting(state):
            while await state.wait_beyond(start):
                stop = min(start + num_positions, state.cached_length)
                rows = {}
                if projection:
                    rows[PROJECTED] = await self._project(state, projection, start, stop)
                    if state.is_closed:  # what was read may be another session's by now
                        return
                num_gone = {}
                for name in names:
                    first, rows[name] = self._rows(name, state.allocation, start, stop)
                    num_gone[name] = first - start
                yield StateChunk(start, stop, rows, num_gone)
                start = stop

    def _num_positions(self, names: Sequence[str], projection: Projection | None) -> int:
        """Return how many positions a chunk has at most."""
        row_bytes = sum(self._pool.tensor(name)[0].nbytes for name in names)
        if projection is None:
            return max(1, _CHUNK_BYTES // row_bytes)
        row_bytes += projection.info.output_size * projection.norm.itemsize
        return min(max(1, _CHUNK_BYTES // row_bytes), _MAX_PROJECTED_POSITIONS)

    @contextmanager
    def _counting(self, state: ExportedState) -> Iterator[None]:
        if state.num_streams >= MAX_STREAMS_PER_SESSION:
            raise ResourceExhaustedError(
                f"The session's state is streamed {MAX_STREAMS_PER_SESSION} times already.",
                reason="TOO_MANY_STREAMS",
                retry_after_s=1.0,
            )
        state.num_streams += 1
        self.num_streams += 1
        try:
            yield
        finally:
            state.num_streams -= 1
            self.num_streams -= 1

    def _rows(self, name: str, allocation: KvAllocation, start: int, stop: int) -> tuple[int, bytes]:
        """Return a tensor's rows of these positions, and the position of the first one that is there."""
        tensor, table = self._pool.tensor(name), allocation.table(self._pool.holds_window(name))
        first = min(max(start, table.first), stop)
        runs = table.runs(first, stop) if first < stop else ()
        return first, b"".join(tensor_bytes(tensor[run]) for run in runs)

    async def _project(self, state: ExportedState, projection: Projection, start: int, stop: int) -> bytes:
        tensors = {name: self._pool.tensor(name) for name in state.hidden_names}
        view = TargetStateView(state.spec, tensors, (), state.allocation, stop, projection)
        projected = await self._run_on_engine(lambda: view.projected(start, stop), stop - start)
        return tensor_bytes(projected)


def _streamed_names(
    state: ExportedState, projection: Projection | None, tensor_names: Collection[str]
) -> list[str]:
    """Return the names of the tensors whose rows are sent as they are."""
    names = [ref.name for ref in state.tensors if ref.name != GENERATIONS]
    if unknown := set(tensor_names).difference(names):
        raise InvalidArgumentError(
            f"The session does not export {min(unknown)[:80]!r}; it exports {', '.join(names)}.",
            field="tensor_names",
        )
    names = [name for name in names if not tensor_names or name in tensor_names]
    if projection is None:
        return names
    if projection.info != state.spec.projection:
        raise InvalidArgumentError(
            "The projection is not the one of the session's spec.", field="projection_sha256"
        )
    return [name for name in names if name not in state.spec.hidden_names]
