"""The engine: the one thread of a process that runs the model.

A forward pass on the event loop would stall health checks, keepalive and every other stream. Work items
are awaited from the loop; the thread takes all that wait, within a token budget, and runs them as one step.

Sessions take turns with the engine: each sends its next item when it has the result of the last. One that is
a millisecond late would miss the others' step, and they its own: two convoys, and twice the steps. So a step
with work at hand waits a little for sources known to come back at once.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from specdec.contract.errors import (
    InternalError,
    ResourceExhaustedError,
    SpecdecError,
    UnavailableError,
    log_defect,
)

logger = logging.getLogger(__name__)


class WorkItem(Protocol):
    """What an engine schedules."""

    @property
    def num_tokens(self) -> int:
        """Tokens the item adds to a pass."""

    @property
    def is_urgent(self) -> bool:
        """Goes before items that are not: a round waits for nothing but a prefill chunk under way."""


_LINGER_SHARE = 1 / 8
"""Longest wait for a source that is on its way back, as a share of the last step's time."""
_PATIENCE_STEPS = 3
"""Steps in a row that items which are not urgent may be left out of because urgent ones fill the budget."""

ItemT = TypeVar("ItemT", bound=WorkItem)
ResultT = TypeVar("ResultT")
ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True)
class EngineResult(Generic[ResultT]):
    """One item's result and where its time went."""

    value: ResultT
    queue_ns: int
    """From submission to the start of the step, nanoseconds."""
    compute_ns: int
    """The step, shared by its whole batch, nanoseconds."""
    batch_size: int
    """Items in the step."""
    batch_tokens: int
    """Tokens of all of them."""


@dataclass(slots=True)
class _Pending(Generic[ItemT, ResultT]):
    item: ItemT
    future: asyncio.Future[EngineResult[ResultT]]
    loop: asyncio.AbstractEventLoop
    submitted_ns: int
    source: Hashable
    away_ns: int
    """From the source's last result to this item, nanoseconds; 0 if it is the first."""


class ModelThread:
    """The one thread that loads a model and then runs its engine.

    A daemon, unlike an executor's threads: a process that fails before it closes its engine still ends.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[[], ValueT]) -> Future[ValueT]:
        """Call `function` on the thread, after what was submitted before."""
        future: Future[ValueT] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._calls.put(call)
        return future

    def close(self, *, wait: bool = True) -> None:
        """End the thread once what was submitted is done, and wait for that."""
        self._calls.put(None)
        if wait:
            self._thread.join()

    def _run(self) -> None:
        while call := self._calls.get():
            call()


class Engine(Generic[ItemT, ResultT]):
    """Runs `step` over batches of work items on a thread of its own.

    Args:
        step: one result, or the exception of that item alone, per item and in order. An exception it
            raises fails the whole batch.
        max_batch_tokens: token budget of a step; urgent items are taken first. At least one item is taken.
        max_background_tokens: budget of the items that are not urgent in a step with urgent ones, which wait
            for all of it; None: no other than the step's.
        max_queued: items that may wait; one more is refused.
        thread: the one that loaded the model. Every thread that ever ran a parallel operation keeps OpenMP
            workers of its own, and with more workers than cores none of them spins and each operation waits
            for the scheduler (measured: a pass takes 1.5 times as long). None: a new one.
        on_step: called on the engine's thread after each step, when its results are on their way, with items,
            tokens and nanoseconds.
    """

    def __init__(
        self,
        step: Callable[[Sequence[ItemT]], Sequence[ResultT | SpecdecError]],
        *,
        max_batch_tokens: int = 2048,
        max_background_tokens: int | None = None,
        max_queued: int = 1024,
        thread: ModelThread | None = None,
        on_step: Callable[[int, int, int], None] = lambda batch_size, batch_tokens, duration_ns: None,
    ) -> None:
        self._step = step
        self._on_step = on_step
        self._max_batch_tokens = max_batch_tokens
        self._max_background_tokens = max_background_tokens or max_batch_tokens
        self._max_queued = max_queued
        self._waiting: deque[_Pending[ItemT, ResultT]] = deque()
        self._delivered_ns: dict[Hashable, int] = {}  # of sources whose next item is not here
        self._expected: set[Hashable] = set()  # those of them that will be back at once
        self._linger_until_ns = 0
        self._num_steps_without_background = 0
        self._wakeup = threading.Condition()
        self._closed = False
        self._thread = thread or ModelThread("engine")
        self._thread.submit(self._run)

    @property
    def num_waiting(self) -> int:
        """Items that wait for a step; may be read by any thread."""
        return len(self._waiting)

    async def submit(self, item: ItemT, source: Hashable = None) -> EngineResult[ResultT]:
        """Run one item. Cancelling the caller drops an item that waits, and the result of one that runs.

        Args:
            source: who submits one item after the other, each when it has the last one's result; the engine
                may wait a moment for its next. To be followed by `forget`.

        Raises:
            ResourceExhaustedError: too many items wait.
            UnavailableError: the engine is closed.
            SpecdecError: what the step raised for this item.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[EngineResult[ResultT]] = loop.create_future()
        now_ns = time.monotonic_ns()
        with self._wakeup:
            if self._closed:
                raise UnavailableError("The service is shutting down; try another replica.")
            if len(self._waiting) >= self._max_queued:
                raise ResourceExhaustedError(
                    f"{self._max_queued} work items wait already; try again later.",
                    reason="QUEUE_FULL",
                    retry_after_s=1.0,
                )
            away_ns = now_ns - self._delivered_ns.pop(source, now_ns)
            self._expected.discard(source)
            self._waiting.append(_Pending(item, future, loop, now_ns, source, away_ns))
            # While the engine lingers only the last one it expects need wake it, or one it lingers not for.
            if len(self._waiting) == 1 or not self._expected or source is None:
                self._wakeup.notify()
        return await future

    def forget(self, source: Hashable) -> None:
        """Expect nothing more of a source."""
        with self._wakeup:
            self._delivered_ns.pop(source, None)
            self._expected.discard(source)
            self._wakeup.notify()

    def close(self) -> None:
        """Stop the thread after the step under way; what waits fails with UnavailableError."""
        with self._wakeup:
            self._closed = True
            self._wakeup.notify()
        self._thread.close()

    def _run(self) -> None:
        while batch := self._next_batch():
            started_ns = time.monotonic_ns()
            values: Sequence[ResultT | SpecdecError]
            try:
                values = self._step([pending.item for pending in batch])
            except SpecdecError as error:
                values = [error] * len(batch)
            except Exception as error:  # a defect must fail the batch, not the service
                log_defect(logger, "engine step failed", error)
                values = [InternalError(f"The model pass failed: {type(error).__name__}: {error}")] * len(
                    batch
                )
            self._deliver(batch, values, started_ns)
        for pending in self._waiting:
            _post(pending, UnavailableError("The service is shutting down; try another replica."))

    def _next_batch(self) -> list[_Pending[ItemT, ResultT]]:
        """Wait for work; the items of the next step, none when closed."""
        with self._wakeup:
            while not self._closed:
                live = [pending for pending in self._waiting if not pending.future.cancelled()]
                linger_ns = self._linger_until_ns - time.monotonic_ns() if self._expected else 0
                batch = self._choose(live, is_lingering=linger_ns > 0)
                if batch:
                    taken = set(map(id, batch))
                    self._waiting = deque(pending for pending in live if id(pending) not in taken)
                    return batch
                self._waiting = deque(live)
                self._wakeup.wait(linger_ns / 1e9 if live else None)
            return []

    def _choose(
        self, live: Sequence[_Pending[ItemT, ResultT]], *, is_lingering: bool
    ) -> list[_Pending[ItemT, ResultT]]:
        """Of the items that wait the next step; of a kind, first come, first served."""
        if is_lingering:
            # Items of no source wait with nobody.
            return _fitting([p for p in live if p.source is None], self._max_batch_tokens, at_least_one=True)
        self._expected.clear()
        urgent = [pending for pending in live if pending.item.is_urgent]
        background = [pending for pending in live if not pending.item.is_urgent]
        batch: list[_Pending[ItemT, ResultT]] = []
        if background and self._num_steps_without_background >= _PATIENCE_STEPS:
            batch.append(background.pop(0))
        num_left = self._max_batch_tokens - _num_tokens(batch)
        num_left_in_background = self._max_background_tokens - _num_tokens(batch) if urgent else num_left
        rounds = _fitting(urgent, num_left, at_least_one=not batch)
        num_left = min(num_left - _num_tokens(rounds), num_left_in_background)
        batch += rounds
        batch += _fitting(background, num_left, at_least_one=not batch)
        starves = background and all(pending.item.is_urgent for pending in batch)
        self._num_steps_without_background = self._num_steps_without_background + 1 if starves else 0
        return batch

    def _deliver(
        self,
        batch: Sequence[_Pending[ItemT, ResultT]],
        values: Sequence[ResultT | SpecdecError],
        started_ns: int,
    ) -> None:
        ended_ns = time.monotonic_ns()
        compute_ns = ended_ns - started_ns
        self._expect(batch, ended_ns, int(compute_ns * _LINGER_SHARE))
        num_tokens = _num_tokens(batch)
        for pending, value in zip(batch, values, strict=True):
            if isinstance(value, SpecdecError):
                _post(pending, value)
            else:
                queue_ns = started_ns - pending.submitted_ns
                _post(pending, EngineResult(value, queue_ns, compute_ns, len(batch), num_tokens))
        self._on_step(len(batch), num_tokens, compute_ns)

    def _expect(self, batch: Sequence[_Pending[ItemT, ResultT]], ended_ns: int, linger_ns: int) -> None:
        """Note whose next items may be waited for: of sources that were back in time the last time, too."""
        with self._wakeup:
            if any(pending.source is not None for pending in batch):
                self._linger_until_ns = ended_ns + linger_ns
            for pending in batch:
                if pending.source is not None and not pending.future.cancelled():
                    self._delivered_ns[pending.source] = ended_ns
                    if pending.away_ns <= linger_ns:
                        self._expected.add(pending.source)


def _num_tokens(batch: Sequence[_Pending[ItemT, ResultT]]) -> int:
    return sum(pending.item.num_tokens for pending in batch)


def _fitting(
    waiting: Sequence[_Pending[ItemT, ResultT]], num_tokens: int, *, at_least_one: bool = False
) -> list[_Pending[ItemT, ResultT]]:
    """The first items, as many as fit into a number of tokens."""
    batch: list[_Pending[ItemT, ResultT]] = []
    for pending in waiting:
        num_tokens -= pending.item.num_tokens
        if num_tokens < 0 and (batch or not at_least_one):
            break
        batch.append(pending)
    return batch


def _post(pending: _Pending[ItemT, ResultT], outcome: EngineResult[ResultT] | SpecdecError) -> None:
    try:
        pending.loop.call_soon_threadsafe(_resolve, pending.future, outcome)
    except RuntimeError:
        logger.debug("the event loop ended before a result was ready")


def _resolve(
    future: asyncio.Future[EngineResult[ResultT]], outcome: EngineResult[ResultT] | SpecdecError
) -> None:
    if future.done():
        return
    if isinstance(outcome, SpecdecError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
