"""The engine: the one thread of a process that runs the model.

A forward pass on the event loop would stall health checks, keepalive and every other stream. Work items
are awaited from the loop; the thread takes all that wait, within a token budget, and runs them as one step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

from specdec.errors import InternalError, ResourceExhaustedError, SpecdecError, UnavailableError

logger = logging.getLogger(__name__)


class WorkItem(Protocol):
    """What an engine schedules."""

    @property
    def num_tokens(self) -> int:
        """Tokens the item adds to a pass."""

    @property
    def is_urgent(self) -> bool:
        """Goes before items that are not: a round waits for nothing but a prefill chunk under way."""


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


@dataclass(slots=True)
class _Pending(Generic[ItemT, ResultT]):
    item: ItemT
    future: asyncio.Future[EngineResult[ResultT]]
    loop: asyncio.AbstractEventLoop
    submitted_ns: int


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
        max_queued: items that may wait; one more is refused.
        thread: the one that loaded the model. Every thread that ever ran a parallel operation keeps OpenMP
            workers of its own, and with more workers than cores none of them spins and each operation waits
            for the scheduler (measured: a pass takes 1.5 times as long). None: a new one.
    """

    def __init__(
        self,
        step: Callable[[Sequence[ItemT]], Sequence[ResultT | SpecdecError]],
        *,
        max_batch_tokens: int = 2048,
        max_queued: int = 1024,
        thread: ModelThread | None = None,
    ) -> None:
        self._step = step
        self._max_batch_tokens = max_batch_tokens
        self._max_queued = max_queued
        self._waiting: deque[_Pending[ItemT, ResultT]] = deque()
        self._wakeup = threading.Condition()
        self._closed = False
        self._thread = thread or ModelThread("engine")
        self._thread.submit(self._run)

    async def submit(self, item: ItemT) -> EngineResult[ResultT]:
        """Run one item. Cancelling the caller drops an item that waits, and the result of one that runs.

        Raises:
            ResourceExhaustedError: too many items wait.
            UnavailableError: the engine is closed.
            SpecdecError: what the step raised for this item.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[EngineResult[ResultT]] = loop.create_future()
        pending = _Pending(item, future, loop, time.monotonic_ns())
        with self._wakeup:
            if self._closed:
                raise UnavailableError("The service is shutting down; try another replica.")
            if len(self._waiting) >= self._max_queued:
                raise ResourceExhaustedError(
                    f"{self._max_queued} work items wait already; try again later.",
                    reason="QUEUE_FULL",
                    retry_after_s=1.0,
                )
            self._waiting.append(pending)
            self._wakeup.notify()
        return await future

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
                logger.exception("engine step failed")
                values = [InternalError(f"The model pass failed: {type(error).__name__}: {error}")] * len(
                    batch
                )
            self._deliver(batch, values, started_ns)
        for pending in self._waiting:
            _post(pending, UnavailableError("The service is shutting down; try another replica."))

    def _next_batch(self) -> list[_Pending[ItemT, ResultT]]:
        """Wait for work; the items of the next step, none when closed."""
        with self._wakeup:
            while True:
                live = [pending for pending in self._waiting if not pending.future.cancelled()]
                if self._closed or live:
                    break
                self._waiting.clear()
                self._wakeup.wait()
            if self._closed:
                return []
            live.sort(key=lambda pending: not pending.item.is_urgent)  # stable: first come, first served
            batch, num_tokens = [live[0]], live[0].item.num_tokens
            for pending in live[1:]:
                if num_tokens + pending.item.num_tokens > self._max_batch_tokens:
                    break
                batch.append(pending)
                num_tokens += pending.item.num_tokens
            self._waiting = deque(live[len(batch) :])
            return batch

    def _deliver(
        self,
        batch: Sequence[_Pending[ItemT, ResultT]],
        values: Sequence[ResultT | SpecdecError],
        started_ns: int,
    ) -> None:
        compute_ns = time.monotonic_ns() - started_ns
        for pending, value in zip(batch, values, strict=True):
            if isinstance(value, SpecdecError):
                _post(pending, value)
            else:
                queue_ns = started_ns - pending.submitted_ns
                _post(pending, EngineResult(value, queue_ns, compute_ns, len(batch)))


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
