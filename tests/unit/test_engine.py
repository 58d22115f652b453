from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from specdec.contract.errors import (
    InternalError,
    NotFoundError,
    ResourceExhaustedError,
    SpecdecError,
    UnavailableError,
)
from specdec.runtime.engine import Engine


@dataclass(frozen=True)
class Item:
    name: str
    num_tokens: int = 1
    is_urgent: bool = True


class Recorder:
    """A step that waits for permission and notes its batches."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self.gate = threading.Semaphore(0)
        self.running = threading.Event()

    def step(self, items: Sequence[Item]) -> list[str | SpecdecError]:
        self.running.set()
        assert self.gate.acquire(timeout=10)
        self.threads.add(threading.get_ident())
        self.batches.append([item.name for item in items])
        if any(item.name == "defect" for item in items):
            raise RuntimeError("broken")
        return [NotFoundError("no") if item.name == "refused" else item.name.upper() for item in items]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


async def submit_while_busy(engine: Engine[Item, str], recorder: Recorder, *items: Item) -> list[object]:
    """Submit `items` while a step runs, so that they are scheduled together; their outcomes."""
    first = asyncio.ensure_future(engine.submit(Item("first")))
    await asyncio.to_thread(recorder.running.wait, 10)
    tasks = [asyncio.ensure_future(engine.submit(item)) for item in items]
    await asyncio.sleep(0)
    recorder.gate.release(100)
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


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


async def test_rounds_go_before_prefill_and_the_budget_holds(recorder: Recorder) -> None:
    engine = Engine(recorder.step, max_batch_tokens=10)
    items = [
        Item("p1", 8, False),
        Item("p2", 8, False),
        Item("r1", 3),
        Item("r2", 3),
        Item("huge", 50, False),
    ]
    await submit_while_busy(engine, recorder, *items)
    assert recorder.batches == [["first"], ["r1", "r2"], ["p1"], ["p2"], ["huge"]]
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


async def test_an_items_error_is_its_own(recorder: Recorder) -> None:
    engine = Engine(recorder.step)
    refused, fine = await submit_while_busy(engine, recorder, Item("refused"), Item("fine"))
    assert isinstance(refused, NotFoundError)
    assert fine.value == "FINE"  # type: ignore[attr-defined]
    engine.close()


async def test_a_defect_fails_its_batch_and_not_the_engine(recorder: Recorder) -> None:
    engine = Engine(recorder.step)
    outcomes = await submit_while_busy(engine, recorder, Item("defect"), Item("innocent"))
    assert [type(outcome) for outcome in outcomes] == [InternalError, InternalError]
    assert (await engine.submit(Item("after"))).value == "AFTER"
    engine.close()


async def test_a_full_queue_refuses(recorder: Recorder) -> None:
    engine = Engine(recorder.step, max_queued=2)
    outcomes = await submit_while_busy(engine, recorder, Item("a"), Item("b"), Item("c"))
    assert [type(outcome).__name__ for outcome in outcomes] == [
        "EngineResult",
        "EngineResult",
        "ResourceExhaustedError",
    ]
    assert isinstance(outcomes[2], ResourceExhaustedError)
    assert outcomes[2].retry_after_s
    engine.close()


async def test_closing_fails_what_waits(recorder: Recorder) -> None:
    engine = Engine(recorder.step)
    first = asyncio.ensure_future(engine.submit(Item("first")))
    await asyncio.to_thread(recorder.running.wait, 10)
    waiting = asyncio.ensure_future(engine.submit(Item("waiting")))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(asyncio.to_thread(engine.close))
    await asyncio.sleep(0.05)
    recorder.gate.release(100)
    await closing
    assert (await first).value == "FIRST"
    with pytest.raises(UnavailableError):
        await waiting
    with pytest.raises(UnavailableError):
        await engine.submit(Item("late"))


async def test_a_step_with_rounds_carries_little_prefill(recorder: Recorder) -> None:
    engine = Engine(recorder.step, max_batch_tokens=100, max_background_tokens=10)
    prefill = [Item(f"p{index}", 5, False) for index in range(4)]
    await submit_while_busy(engine, recorder, *prefill, Item("round", 3))
    assert recorder.batches == [["first"], ["round", "p0", "p1"], ["p2", "p3"]]
    engine.close()


async def test_rounds_that_fill_every_step_do_not_starve_prefill(recorder: Recorder) -> None:
    engine = Engine(recorder.step, max_batch_tokens=10)
    rounds = [Item(f"r{index}", 10) for index in range(5)]
    await submit_while_busy(engine, recorder, Item("prefill", 10, False), *rounds)
    assert recorder.batches == [["first"], ["r0"], ["r1"], ["r2"], ["prefill"], ["r3"], ["r4"]]
    engine.close()


class Sessions:
    """Sources that send their next item when they have the last one's result, after a delay of their own."""

    def __init__(self, *, step_s: float) -> None:
        self.batches: list[set[str]] = []
        self._step_s = step_s
        self.engine: Engine[Item, str] = Engine(self._step)

    def _step(self, items: Sequence[Item]) -> list[str]:
        self.batches.append({item.name for item in items})
        time.sleep(self._step_s)
        return [item.name for item in items]

    async def run(self, name: str, num_rounds: int, away_s: float) -> list[int]:
        """Take turns with the engine; the queue time of every round, nanoseconds."""
        queue_ns = []
        for _ in range(num_rounds):
            result = await self.engine.submit(Item(name), name)
            queue_ns.append(result.queue_ns)
            await asyncio.sleep(away_s)
        self.engine.forget(name)
        return queue_ns


async def test_sessions_that_come_back_at_once_share_every_step() -> None:
    sessions = Sessions(step_s=0.08)
    late = sessions.run("late", 6, away_s=0.003)
    await asyncio.gather(*(sessions.run(name, 6, away_s=0.0) for name in "abc"), late)
    sessions.engine.close()
    # The first step may start before all have come.
    assert sessions.batches[1:-1] == [{"a", "b", "c", "late"}] * (len(sessions.batches) - 2)
    assert len(sessions.batches) <= 7


async def test_nobody_waits_for_a_slow_session() -> None:
    sessions = Sessions(step_s=0.04)
    fast, _ = await asyncio.gather(sessions.run("fast", 20, away_s=0.0), sessions.run("slow", 4, away_s=0.1))
    sessions.engine.close()
    # One wait at most, for a session whose ways are not known yet; else only for the other's step.
    assert sum(queue_ns > 4e6 for queue_ns in fast) <= 5


async def test_nobody_waits_for_a_session_that_has_ended() -> None:
    sessions = Sessions(step_s=0.2)
    await asyncio.gather(sessions.run("ended", 1, away_s=0.0), sessions.run("other", 1, away_s=0.0))
    next_round = await sessions.engine.submit(Item("new"), "new")
    sessions.engine.close()
    assert next_round.queue_ns < 10e6


async def test_an_item_of_no_source_waits_for_nobody() -> None:
    sessions = Sessions(step_s=0.4)
    await asyncio.gather(sessions.run("a", 1, away_s=0.0), sessions.engine.submit(Item("b"), "b"))
    # The engine expects b, which was back at once, for a twentieth of a second.
    side_work = await sessions.engine.submit(Item("side"))
    sessions.engine.close()
    assert side_work.queue_ns < 20e6
