"""The engine: the one thread of a process that runs the model.

A forward pass on the event loop would stall health checks, keepalive and every other stream. Work items are
awaited from the loop; the thread asks the scheduler which of them go together, and runs them as one step.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from specdec.contract.errors import InternalError, SpecdecError, UnavailableError, log_defect
from specdec.contract.request_id import REQUEST_ID
from specdec.runtime.model_thread import ModelThread
from specdec.runtime.scheduler import Scheduler, WorkItem, num_tokens_of

logger = logging.getLogger(__name__)

ItemT = TypeVar("ItemT", bound=WorkItem)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class EngineResult(Generic[ResultT]):
    """One item's result and where its time went."""

    value: ResultT
    queue_ns: int
    """Time from submission to the start of the step, nanoseconds."""
    compute_ns: int
    """The step, shared by its whole batch, nanoseconds."""
    batch_size: int
    """Items in the step."""
    batch_tokens: int
    """Tokens of all of them."""
    batch_background_tokens: int
    """How many of these are of items that are not urgent."""


@dataclass(frozen=True, slots=True, eq=False)
class _Submission(Generic[ItemT, ResultT]):
    """An item that somebody awaits the result of."""

    item: ItemT
    future: asyncio.Future[EngineResult[ResultT]]
    loop: asyncio.AbstractEventLoop
    submitted_ns: int
    source: Hashable
    request_id: str = field(default_factory=REQUEST_ID.get)
    """Name of the request whose task submitted the item; empty: it has none."""

    @property
    def num_tokens(self) -> int:
        return self.item.num_tokens

    @property
    def is_urgent(self) -> bool:
        return self.item.is_urgent

    @property
    def is_cancelled(self) -> bool:
        return self.future.cancelled()


class Engine(Generic[ItemT, ResultT]):
    """Runs `step` over batches of work items on a thread of its own.

    Args:
        step: one result, or the exception of that item alone, per item and in order. An exception it
            raises fails the whole batch, and nothing but the batch.
        max_batch_tokens: see Scheduler, as for the next two.
        max_background_tokens: budget of a step's background items.
        max_queued: how many items may wait.
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
        self._scheduler: Scheduler[_Submission[ItemT, ResultT]] = Scheduler(
            max_batch_tokens=max_batch_tokens,
            max_background_tokens=max_background_tokens,
            max_queued=max_queued,
        )
        self._wakeup = threading.Condition()  # holds the scheduler for one thread at a time
        self._closed = False
        self._under_way: Sequence[_Submission[ItemT, ResultT]] = ()
        """The items of the step that runs now."""
        self._started_ns = 0
        self._hangs = False
        """Whether the step under way was given up."""
        self._thread = thread or ModelThread("engine")
        self._thread.submit(self._run)

    @property
    def num_waiting(self) -> int:
        """Items that wait for a step; any thread may read this."""
        return self._scheduler.num_waiting

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
                raise _closed_error()
            if self._hangs:
                raise _hang_error()
            if self._scheduler.add(_Submission(item, future, loop, now_ns, source), now_ns):
                self._wakeup.notify()
        return await future

    def forget(self, source: Hashable) -> None:
        """Expect nothing more of a source."""
        with self._wakeup:
            self._scheduler.forget(source)
            self._wakeup.notify()

    def step_under_way(self) -> tuple[float, int]:
        """Return how long the step under way has run, seconds, and its tokens; (0, 0): no step runs."""
        with self._wakeup:
            if not self._under_way:
                return 0.0, 0
            return (time.monotonic_ns() - self._started_ns) / 1e9, num_tokens_of(self._under_way)

    def give_up_step(self) -> str:
        """Fail all that waits with UnavailableError, and all that comes until the step under way ends.

        Returns:
            Where in its code the step is.
        """
        with self._wakeup:
            if self._under_way:
                self._hangs = True
                self._fail((*self._under_way, *self._scheduler.drain()), _hang_error())
        return self._thread.stack()

    def close(self) -> None:
        """Stop the thread after the step under way; what waits fails with UnavailableError."""
        with self._wakeup:
            self._closed = True
            self._wakeup.notify()
        self._thread.close()

    def _run(self) -> None:
        while batch := self._next_batch():
            try:
                self._run_step(batch)
            except BaseException as error:  # a thread that has ended would leave every later item waiting
                log_defect(logger, "the engine failed around a step", error)
                self._fail(batch, InternalError(f"The engine failed: {type(error).__name__}: {error}"))
        self._fail(self._scheduler.drain(), _closed_error())

    def _run_step(self, batch: Sequence[_Submission[ItemT, ResultT]]) -> None:
        outcomes = self._outcomes(batch)
        started_ns, ended_ns = self._started_ns, time.monotonic_ns()
        with self._wakeup:
            self._under_way, self._hangs = (), False
            # The results leave first. Whoever gets one can submit again only when the lock is free.
            self._deliver(batch, outcomes, started_ns, ended_ns)
            self._scheduler.finish(batch, started_ns, ended_ns)
        self._report(len(batch), num_tokens_of(batch), ended_ns - started_ns)

    def _fail(self, submissions: Sequence[_Submission[ItemT, ResultT]], error: SpecdecError) -> None:
        _post([(submission, error) for submission in submissions])

    def _next_batch(self) -> list[_Submission[ItemT, ResultT]]:
        """Wait for work. Return the items of the next step, none when closed."""
        with self._wakeup:
            while not self._closed:
                now_ns = time.monotonic_ns()
                if batch := self._take(now_ns):
                    self._under_way, self._started_ns = batch, time.monotonic_ns()
                    return batch
                self._wakeup.wait(self._scheduler.wait_s(now_ns))
            return []

    def _take(self, now_ns: int) -> list[_Submission[ItemT, ResultT]]:
        try:
            return self._scheduler.take(now_ns)
        except BaseException as error:
            log_defect(logger, "the scheduler failed", error)
            self._fail(self._scheduler.drain(), InternalError(f"The scheduler failed: {error}"))
            return []

    def _outcomes(self, batch: Sequence[_Submission[ItemT, ResultT]]) -> Sequence[ResultT | SpecdecError]:
        """Run the step. Return an outcome per item, whatever the step raises."""
        try:
            values = self._step([submission.item for submission in batch])
            if len(values) != len(batch):
                raise ValueError(f"a step over {len(batch)} items had {len(values)} results")
            return values
        except SpecdecError as error:
            return [error] * len(batch)
        # A defect must fail the batch and not the service. Native libraries raise a BaseException when they
        # panic, and a thread that has ended would leave every later item waiting for ever.
        except BaseException as error:
            request_ids = sorted({submission.request_id for submission in batch} - {""})
            log_defect(logger, "engine step failed", error, request_ids=request_ids)
            return [InternalError(f"The model pass failed: {type(error).__name__}: {error}")] * len(batch)

    def _deliver(
        self,
        batch: Sequence[_Submission[ItemT, ResultT]],
        outcomes: Sequence[ResultT | SpecdecError],
        started_ns: int,
        ended_ns: int,
    ) -> None:
        compute_ns, num_tokens = ended_ns - started_ns, num_tokens_of(batch)
        num_background = num_tokens_of([each for each in batch if not each.is_urgent])

        def told(
            submission: _Submission[ItemT, ResultT], outcome: ResultT | SpecdecError
        ) -> EngineResult[ResultT] | SpecdecError:
            if isinstance(outcome, SpecdecError):
                return outcome
            queue_ns = started_ns - submission.submitted_ns
            return EngineResult(outcome, queue_ns, compute_ns, len(batch), num_tokens, num_background)

        pairs = zip(batch, outcomes, strict=True)
        _post([(submission, told(submission, outcome)) for submission, outcome in pairs])

    def _report(self, batch_size: int, batch_tokens: int, compute_ns: int) -> None:
        try:
            self._on_step(batch_size, batch_tokens, compute_ns)
        except Exception as error:  # what watches the engine must not end it
            log_defect(logger, "the report of a step failed", error)


def _closed_error() -> UnavailableError:
    return UnavailableError("The service is shutting down; try another replica.")


def _hang_error() -> UnavailableError:
    return UnavailableError("The model's pass hangs; try another replica.", reason="ENGINE_HANGS")


def _post(told: Sequence[tuple[_Submission[Any, Any], EngineResult[Any] | SpecdecError]]) -> None:
    """Hand outcomes to the event loops that wait for them, to each all at once: what its tasks then send to
    one peer goes together."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for submission, outcome in told:
        by_loop.setdefault(submission.loop, []).append((submission.future, outcome))
    for loop, outcomes in by_loop.items():
        try:
            loop.call_soon_threadsafe(_resolve, outcomes)
        except RuntimeError:
            logger.debug("the event loop ended before a result was ready")


def _resolve(outcomes: Sequence[tuple[asyncio.Future[Any], EngineResult[Any] | SpecdecError]]) -> None:
    for future, outcome in outcomes:
        if future.done():
            continue
        if isinstance(outcome, SpecdecError):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
