"""The engine's thread. What it runs together is the scheduler's choice: see test_scheduler."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pytest

from specdec.contract.errors import (
    InternalError,
    NotFoundError,
    ResourceExhaustedError,
    SpecdecError,
    UnavailableError,
)
from specdec.contract.request_id import REQUEST_ID
from specdec.runtime import scheduler
from specdec.runtime.engine import Engine, EngineResult
from specdec.runtime.model_thread import ModelThread
from tests.raw_streams import until

ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Item:
    name: str
    num_tokens: int = 1
    is_urgent: bool = True


class Recorder:
    """A step that waits for permission and notes its batches."""

    def __init__(self, defect: BaseException | None = None) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self.gate = threading.Semaphore(0)
        self.running = threading.Event()
        self._defect = defect or RuntimeError("broken")

    def step(self, items: Sequence[Item]) -> list[str | SpecdecError]:
        self.running.set()
        assert self.gate.acquire(timeout=10)
        self.threads.add(threading.get_ident())
        self.batches.append([item.name for item in items])
        if any(item.name == "defect" for item in items):
            raise self._defect
        return [NotFoundError("no") if item.name == "refused" else item.name.upper() for item in items]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


async def soon(awaitable: Awaitable[ValueT]) -> ValueT:
    """Return the result; fail instead of waiting for an engine that has died or waits for ever."""
    return await asyncio.wait_for(awaitable, 20)


async def submit_while_busy(engine: Engine[Item, str], recorder: Recorder, *items: Item) -> list[object]:
    """Submit `items` while a step runs, so that they are scheduled together; return their outcomes."""
    first = asyncio.ensure_future(engine.submit(Item("first")))
    await asyncio.to_thread(recorder.running.wait, 10)
    tasks = [asyncio.ensure_future(engine.submit(item)) for item in items]
    await asyncio.sleep(0)
    recorder.gate.release(100)
    await first
    return await soon(asyncio.gather(*tasks, return_exceptions=True))


async def test_waiting_items_become_one_batch_on_one_thread(recorder: Recorder) -> None:
    engine = Engine(recorder.step)
    results = await submit_while_busy(engine, recorder, Item("a"), Item("b"), Item("c"))
    assert [result.value for result in results] == ["A", "B", "C"]  # type: ignore[attr-defined]
    assert recorder.batches == [["first"], ["a", "b", "c"]]
    assert results[0].batch_size == 3  # type: ignore[attr-defined]
    assert results[0].queue_ns > 0  # type: ignore[attr-defined]
    assert recorder.threads.isdisjoint({threading.get_ident()})
    assert len(recorder.threads) == 1
    engine.close()


async def test_rounds_go_first_and_the_budget_holds(recorder: Recorder) -> None:
    engine = Engine(recorder.step, max_batch_tokens=12, max_background_tokens=4)
    prefill = [Item(f"p{index}", 4, False) for index in range(4)]
    await submit_while_busy(engine, recorder, *prefill, Item("round", 3))
    assert recorder.batches == [["first"], ["round", "p0"], ["p1", "p2", "p3"]]
    engine.close()


async def test_a_cancelled_item_is_dropped(recorder: Recorder) -> None:
    engine = Engine(recorder.step)
    first = asyncio.ensure_future(engine.submit(Item("first")))
    await asyncio.to_thread(recorder.running.wait, 10)
    doomed, kept = (asyncio.ensure_future(engine.submit(Item(name))) for name in ("doomed", "kept"))
    await asyncio.sleep(0)
    doomed.cancel()
    await asyncio.sleep(0)
    recorder.gate.release(100)
    await asyncio.gather(first, kept)
    assert recorder.batches == [["first"], ["kept"]]
    assert doomed.cancelled()
    engine.close()


async def test_the_result_of_an_item_that_is_cancelled_while_it_runs_is_dropped(recorder: Recorder) -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    engine = Engine(recorder.step)
    doomed = asyncio.ensure_future(engine.submit(Item("doomed")))
    await asyncio.to_thread(recorder.running.wait, 10)
    doomed.cancel()
    recorder.gate.release(100)
    assert (await soon(engine.submit(Item("after")))).value == "AFTER"
    assert recorder.batches == [["doomed"], ["after"]]
    assert doomed.cancelled()
    assert not complaints
    engine.close()


async def test_an_items_error_is_its_own(recorder: Recorder) -> None:
    engine = Engine(recorder.step)
    refused, fine = await submit_while_busy(engine, recorder, Item("refused"), Item("fine"))
    assert isinstance(refused, NotFoundError)
    assert fine.value == "FINE"  # type: ignore[attr-defined]
    engine.close()


DEFECTS = [
    RuntimeError("broken"),
    ValueError(),
    KeyError("x"),
    MemoryError(),
    SystemExit(1),
    BaseException("panic"),
]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: type(defect).__name__)
async def test_a_defect_of_any_type_fails_its_batch_and_not_the_engine(defect: BaseException) -> None:
    recorder = Recorder(defect)
    engine = Engine(recorder.step)
    outcomes = await submit_while_busy(engine, recorder, Item("defect"), Item("innocent"))
    assert [type(outcome) for outcome in outcomes] == [InternalError, InternalError]
    assert type(defect).__name__ in str(outcomes[0])
    assert (await soon(engine.submit(Item("after")))).value == "AFTER"
    engine.close()


async def test_an_error_of_the_whole_step_is_everybodys() -> None:
    recorder = Recorder(NotFoundError("no such thing"))
    engine = Engine(recorder.step)
    outcomes = await submit_while_busy(engine, recorder, Item("defect"), Item("innocent"))
    assert [type(outcome) for outcome in outcomes] == [NotFoundError, NotFoundError]
    engine.close()


async def test_a_step_with_too_few_results_fails_its_batch_and_not_the_engine() -> None:
    engine = Engine[Item, str](lambda items: [item.name for item in items if item.name != "missing"])
    with pytest.raises(InternalError, match="1 items had 0 results"):
        await soon(engine.submit(Item("missing")))
    assert (await soon(engine.submit(Item("after")))).value == "after"
    engine.close()


async def test_steps_are_reported_and_a_report_that_fails_ends_nothing(recorder: Recorder) -> None:
    reports = []

    def report(batch_size: int, batch_tokens: int, duration_ns: int) -> None:
        reports.append((batch_size, batch_tokens, duration_ns > 0))
        raise ValueError("no room for reports")

    engine = Engine(recorder.step, on_step=report)
    await submit_while_busy(engine, recorder, Item("a", 2), Item("b", 3))
    await soon(engine.submit(Item("after")))
    engine.close()
    assert reports == [(1, 1, True), (2, 5, True), (1, 1, True)]


async def test_a_full_queue_refuses(recorder: Recorder) -> None:
    engine = Engine(recorder.step, max_queued=2)
    outcomes = await submit_while_busy(engine, recorder, Item("a"), Item("b"), Item("c"))
    assert [type(outcome) for outcome in outcomes] == [EngineResult, EngineResult, ResourceExhaustedError]
    engine.close()


class ClosingThread(ModelThread):
    """Says when it is asked to end."""

    def __init__(self) -> None:
        self.is_closing = threading.Event()
        super().__init__("closing")

    def close(self, *, wait: bool = True) -> None:
        self.is_closing.set()
        super().close(wait=wait)


async def test_closing_fails_what_waits(recorder: Recorder) -> None:
    thread = ClosingThread()
    engine = Engine(recorder.step, thread=thread)
    first = asyncio.ensure_future(engine.submit(Item("first")))
    await asyncio.to_thread(recorder.running.wait, 10)
    waiting = asyncio.ensure_future(engine.submit(Item("waiting")))
    await asyncio.sleep(0)
    assert engine.num_waiting == 1
    closing = asyncio.ensure_future(asyncio.to_thread(engine.close))
    assert await asyncio.to_thread(thread.is_closing.wait, 10)
    recorder.gate.release(100)
    await closing
    assert (await first).value == "FIRST"
    with pytest.raises(UnavailableError):
        await soon(waiting)
    with pytest.raises(UnavailableError):
        await engine.submit(Item("late"))
    assert engine.num_waiting == 0
    assert recorder.batches == [["first"]]


class Sessions:
    """Sources that take turns with an engine, whose step notes who came together."""

    def __init__(self) -> None:
        self.batches: list[set[str]] = []
        self.gate = threading.Event()
        """Steps end while it is set."""
        self.gate.set()
        self.engine: Engine[Item, str] = Engine(self._step)

    def _step(self, items: Sequence[Item]) -> list[str]:
        self.gate.wait(20)
        self.batches.append({item.name for item in items})
        time.sleep(0.002)  # a pass takes its time, and others wait for a share of it
        return [item.name for item in items]

    async def run(self, name: str, num_rounds: int = 1, away_s: float = 0.0) -> None:
        for _ in range(num_rounds):
            await soon(self.engine.submit(Item(name), name))
            await asyncio.sleep(away_s)


@pytest.fixture
async def sessions() -> AsyncIterator[Sessions]:
    sessions = Sessions()
    yield sessions
    sessions.engine.close()


@pytest.fixture
def lingers_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the engine wait for expected sources until they come, however busy the machine is."""
    monkeypatch.setattr(scheduler, "_LINGER_SHARE", 1e6)
    monkeypatch.setattr(scheduler, "_LONGEST_WAIT", 1e6)
    monkeypatch.setattr(scheduler, "_best_wait", lambda waits_ns, num_present, step_ns: len(waits_ns))


@pytest.mark.usefixtures("lingers_for_ever")
async def test_sessions_that_come_back_share_every_step(sessions: Sessions) -> None:
    async def whole(name: str, away_s: float) -> None:
        await sessions.run(name, 6, away_s)
        sessions.engine.forget(name)

    everybody = {"late", "a", "b", "c"}
    await asyncio.gather(*(whole(name, 0.003 * (name == "late")) for name in everybody))
    # The first step may start before all have come, and the last one is of those it left out.
    assert sessions.batches.count(everybody) >= 5
    assert len(sessions.batches) <= 7


@pytest.mark.usefixtures("lingers_for_ever")
async def test_a_session_that_ends_wakes_the_engine(sessions: Sessions) -> None:
    # Both share a step: one that came late would be waited for, and never wait itself.
    sessions.gate.clear()
    first = [asyncio.ensure_future(sessions.engine.submit(Item("first")))]
    await until(lambda: sessions.engine.step_under_way() != (0.0, 0))
    first += [asyncio.ensure_future(sessions.run(name)) for name in ("ended", "other")]
    await until(lambda: sessions.engine.num_waiting == 2)
    sessions.gate.set()
    await asyncio.gather(*first)
    waiting = asyncio.ensure_future(sessions.run("other"))
    # An item without a source wakes the engine, which waits for the session again when that is done.
    await soon(sessions.engine.submit(Item("side")))
    assert not waiting.done()
    sessions.engine.forget("ended")
    await waiting
    assert sessions.batches[-2:] == [{"side"}, {"other"}]


async def test_the_engine_wakes_by_itself_when_nobody_comes_any_more(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "_LINGER_SHARE", 50)
    await asyncio.gather(sessions.run("lost"), sessions.run("other"))
    await sessions.run("other")
    assert sessions.batches[-1] == {"other"}


async def test_the_log_names_the_requests_of_a_failed_step(caplog: pytest.LogCaptureFixture) -> None:
    recorder = Recorder()
    engine: Engine[Item, str] = Engine(recorder.step)
    REQUEST_ID.set("order-66")
    recorder.gate.release()
    with pytest.raises(InternalError):
        await soon(engine.submit(Item("defect")))
    engine.close()
    (record,) = [record for record in caplog.records if record.message == "engine step failed"]
    assert record.__dict__["request_ids"] == ["order-66"]


@dataclass
class BrokenAfterItsStep:
    """An item whose tokens cannot be counted any more once its step is over."""

    name: str = "broken"
    is_urgent: bool = True
    is_over: bool = False

    @property
    def num_tokens(self) -> int:
        if self.is_over:
            raise RuntimeError("no count")
        return 1


async def test_a_defect_around_a_step_ends_neither_the_thread_nor_a_wait() -> None:
    def step(items: Sequence[BrokenAfterItsStep]) -> list[str]:
        for item in items:
            item.is_over = item.name == "broken"
        return [item.name for item in items]

    engine: Engine[BrokenAfterItsStep, str] = Engine(step)
    try:
        with pytest.raises(InternalError, match="no count"):
            await soon(engine.submit(BrokenAfterItsStep()))
        assert (await soon(engine.submit(BrokenAfterItsStep("well")))).value == "well"
        waits = BrokenAfterItsStep("unscheduled", is_over=True)
        with pytest.raises(InternalError, match="no count"):
            await soon(engine.submit(waits))
        assert (await soon(engine.submit(BrokenAfterItsStep("well")))).value == "well"
    finally:
        engine.close()


async def test_a_step_that_is_given_up_fails_all_that_waits_until_it_ends(recorder: Recorder) -> None:
    engine: Engine[Item, str] = Engine(recorder.step)
    try:
        assert engine.step_under_way() == (0.0, 0)
        running = asyncio.ensure_future(engine.submit(Item("running", num_tokens=7)))
        await asyncio.to_thread(recorder.running.wait, 10)
        waiting = asyncio.ensure_future(engine.submit(Item("waiting")))
        await asyncio.sleep(0.01)
        seconds, num_tokens = engine.step_under_way()
        assert seconds > 0
        assert num_tokens == 7
        assert "in step" in engine.give_up_step()
        for item in (running, waiting, engine.submit(Item("late"))):
            with pytest.raises(UnavailableError, match="another replica"):
                await soon(item)
        recorder.gate.release(2)
        await until(lambda: engine.step_under_way() == (0.0, 0))
        assert (await soon(engine.submit(Item("after")))).value == "AFTER"
        assert recorder.batches == [["running"], ["after"]]
    finally:
        recorder.gate.release(10)
        engine.close()


async def test_results_say_how_many_tokens_were_in_the_background(recorder: Recorder) -> None:
    engine = Engine(recorder.step)
    prompt = Item("prompt", num_tokens=5, is_urgent=False)
    results = await submit_while_busy(engine, recorder, Item("round", num_tokens=3), prompt)
    told = [(result.batch_tokens, result.batch_background_tokens) for result in results]  # type: ignore[attr-defined]
    assert told == [(8, 5), (8, 5)]
    engine.close()
