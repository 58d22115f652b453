"""The queue of a gateway, over a verifier with so much room: nobody is forgotten, callers take turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.place import Place
from gateway.waiting import FIRST_PAUSE_S, LONGEST_PAUSE_S, WaitingQueue
from specdec.contract.errors import ResourceExhaustedError

VERIFIER_IS_FULL = ResourceExhaustedError("no room", reason="KV_POOL_FULL")


@dataclass
class Pause:
    """A timer that rings when a test says so."""

    pauses: list[Pause]
    seconds: float
    ring: Callable[[], None]

    def cancel(self) -> None:
        self.pauses.remove(self)


@dataclass
class Request:
    """A request under way."""

    caller: str
    size: int
    num_bytes: int = 0
    place: Place | None = None
    may_end: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    runs: bool = False
    is_preempted: bool = False
    """Whether a verifier ended its session, and it was not told yet."""
    num_preempted: int = 0

    def preempt(self) -> None:
        """End its session before its time."""
        self.is_preempted = True
        self.may_end.set()


class World:
    """A queue, a verifier with room for some requests, and pauses that end when they are told to."""

    def __init__(
        self, *, room: int, max_running: int = 100, max_waiting: int = 100, max_waiting_bytes: int = 100
    ) -> None:
        self.room = room
        """What is free at the verifier. Other gateways may take it."""
        self.delay = 1
        """Turns of the event loop until a refusal is known."""
        self.pauses: list[Pause] = []
        self.tries = 0
        self.started: list[str] = []
        """Callers, as their requests found room."""
        self.requests: list[Request] = []
        self.queue = WaitingQueue(
            max_running,
            max_waiting,
            max_waiting_bytes=max_waiting_bytes,
            refusal=lambda: ResourceExhaustedError("the queue is full", reason="TOO_MANY_REQUESTS"),
            call_later=self._call_later,
        )

    def _call_later(self, seconds: float, ring: Callable[[], None]) -> Pause:
        self.pauses.append(Pause(self.pauses, seconds, ring))
        return self.pauses[-1]

    def come(self, caller: str = "", size: int = 1, num_bytes: int = 0) -> Request:
        request = Request(caller, size, num_bytes)
        request.task = asyncio.ensure_future(self._run(request))
        self.requests.append(request)
        return request

    async def _run(self, request: Request) -> None:
        with self.queue.place(request.caller, request.num_bytes) as request.place:
            await self._find_room(request, request.place)
            self.started.append(request.caller)
            await self._hold(request, request.place)
            while request.is_preempted:
                request.is_preempted = False
                request.may_end.clear()
                request.num_preempted += 1
                await self._find_room_again(request, request.place)
                await self._hold(request, request.place)
            request.place.gave_room()

    async def _hold(self, request: Request, place: Place) -> None:
        try:
            place.took_room()
            request.runs = True
            await request.may_end.wait()
        finally:
            request.runs = False
            self.room += request.size

    async def _find_room_again(self, request: Request, place: Place) -> None:
        while True:
            await place.turn_again(VERIFIER_IS_FULL)
            self.tries += 1
            if self.room >= request.size:
                self.room -= request.size
                return
            for _ in range(self.delay):
                await asyncio.sleep(0)

    async def _find_room(self, request: Request, place: Place) -> None:
        while True:
            await place.turn()
            self.tries += 1
            if self.room >= request.size:
                self.room -= request.size
                return
            for _ in range(self.delay):
                await asyncio.sleep(0)
            place.send_back(VERIFIER_IS_FULL)

    async def settle(self, turns: int = 30) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)

    async def end_pause(self) -> float:
        """Let the pause end that is under way; return how long it was."""
        (pause,) = self.pauses
        self.pauses.clear()
        pause.ring()
        await self.settle()
        return pause.seconds

    async def end_one(self) -> None:
        next(request for request in self.requests if request.runs).may_end.set()
        await self.settle()

    async def end_all(self) -> None:
        while self.queue.num_running or self.queue.num_waiting:
            await self.end_one()
        assert not self.pauses, "a timer is left"
        for request in self.requests:
            assert request.task
            with suppress(asyncio.CancelledError, ResourceExhaustedError):
                await request.task


async def refusal_of(request: Request) -> ResourceExhaustedError:
    assert request.task
    with pytest.raises(ResourceExhaustedError) as raised:
        await request.task
    return raised.value


async def test_bytes_that_wait_are_limited() -> None:
    world = World(room=1, max_waiting_bytes=10)
    running = world.come(num_bytes=1000)
    waiting = [world.come(num_bytes=5) for _ in range(2)]
    await world.settle()
    assert running.runs, "only what waits counts"
    assert (await refusal_of(world.come(num_bytes=1))).reason == "TOO_MANY_REQUESTS"
    with pytest.raises(ResourceExhaustedError):
        world.queue.require_room("", 1)
    await world.end_one()
    assert waiting[0].runs
    last = world.come(num_bytes=5)
    await world.settle()
    assert world.queue.num_waiting == 2
    await world.end_all()
    assert last.task
    assert last.task.done()


async def test_a_caller_with_few_bytes_takes_the_place_of_one_with_many() -> None:
    world = World(room=9, max_running=1, max_waiting_bytes=10)
    world.come("many")
    first, second = (world.come("many", num_bytes=5) for _ in range(2))
    await world.settle()
    world.queue.require_room("few", 2)
    few = world.come("few", num_bytes=2)
    assert (await refusal_of(second)).reason == "TOO_MANY_REQUESTS"
    too_large = world.come("few", num_bytes=8)
    assert (await refusal_of(too_large)).reason == "TOO_MANY_REQUESTS"
    await world.end_one()
    await world.end_one()
    assert sorted(world.started) == ["few", "many", "many"]
    assert few.task
    assert first.task
    await world.end_all()


async def test_who_waits_while_the_gateway_drains_is_sent_away_and_who_runs_goes_on() -> None:
    world = World(room=1)
    world.delay = 5
    running, sent_back = world.come(), world.come()
    await world.settle()
    trying = world.come("other")
    assert trying.task
    world.queue.drain(lambda: ResourceExhaustedError("it drains", reason="DRAINING"))
    for request in (sent_back, trying):
        assert (await refusal_of(request)).reason == "DRAINING"
    assert running.runs
    assert (await refusal_of(world.come())).reason == "DRAINING"
    await world.end_all()


async def test_who_finds_room_does_not_wait() -> None:
    world = World(room=2)
    first, second = world.come(), world.come()
    await world.settle()
    assert first.runs
    assert second.runs
    assert first.place
    assert first.place.waited_s < 1
    assert (world.queue.num_running, world.queue.num_waiting, world.pauses) == (2, 0, [])
    await world.end_all()


async def test_requests_that_run_are_limited() -> None:
    world = World(room=9, max_running=2)
    requests = [world.come() for _ in range(4)]
    await world.settle()
    assert [request.runs for request in requests] == [True, True, False, False]
    assert not world.pauses, "it knows when one ends"
    await world.end_one()
    assert requests[2].runs
    assert world.tries == 3
    await world.end_all()


async def test_a_session_that_ends_lets_one_try() -> None:
    world = World(room=2)
    for _ in range(10):
        world.come()
    await world.settle()
    assert (world.tries, len(world.started), world.queue.num_waiting) == (10, 2, 8)
    for number in range(1, 9):
        await world.end_one()
        assert (world.tries, len(world.started)) == (10 + number, 2 + number)
    await world.end_all()


async def test_a_session_that_ends_while_a_try_is_refused_is_not_missed() -> None:
    world = World(room=1)
    world.delay = 10
    first, second = world.come(), world.come()
    await world.settle(3)
    assert first.runs
    assert world.tries == 2, "the second was refused, but does not know it yet"
    first.may_end.set()
    await world.settle()
    assert second.runs
    await world.end_all()


async def test_pauses_grow_while_there_is_no_room_and_each_lets_one_try() -> None:
    world = World(room=0)
    for _ in range(5):
        world.come()
    await world.settle()
    pauses = []
    for number in range(1, 8):
        pauses.append(await world.end_pause())
        assert world.tries == 5 + number
    assert pauses == [min(FIRST_PAUSE_S * 2**number, LONGEST_PAUSE_S) for number in range(7)]
    world.room = 4
    await world.end_pause()
    assert len(world.started) == 4, "who finds room lets the next ones try at once"
    world.room = 1
    assert await world.end_pause() == FIRST_PAUSE_S
    await world.end_all()


async def test_pauses_grow_for_one_who_waits_alone() -> None:
    world = World(room=0)
    world.come()
    await world.settle()
    assert [await world.end_pause() for _ in range(3)] == [FIRST_PAUSE_S * 2**number for number in range(3)]
    world.room = 1
    await world.end_pause()
    assert world.started == [""]
    await world.end_all()


async def test_small_requests_do_not_keep_a_large_one_waiting() -> None:
    world = World(room=2)
    small = [world.come("a"), world.come("a")]
    await world.settle()
    large = world.come("b", size=2)
    await world.settle()
    late = world.come("c")
    small[0].may_end.set()
    await world.settle()
    assert not late.runs
    small[1].may_end.set()
    await world.settle()
    assert large.runs
    await world.end_all()
    assert world.started == ["a", "a", "b", "c"]


async def test_a_full_queue_refuses_the_next_and_nothing_else() -> None:
    world = World(room=0, max_waiting=2)
    waiting = [world.come(), world.come()]
    await world.settle()
    assert (await refusal_of(world.come())).reason == "TOO_MANY_REQUESTS"
    world.room = 2
    await world.end_pause()
    assert all(request.runs for request in waiting)
    await world.end_all()


async def test_who_sends_many_does_not_fill_the_queue_for_others() -> None:
    world = World(room=0, max_waiting=4)
    many = [world.come("many") for _ in range(4)]
    await world.settle()
    one = world.come("one")
    await world.settle()
    assert await refusal_of(many[3])
    assert await refusal_of(world.come("many"))
    two = world.come("one")
    await world.settle()
    assert await refusal_of(many[2])
    assert await refusal_of(world.come("one"))
    world.room = 4
    await world.end_pause()
    assert all(request.runs for request in (many[0], many[1], one, two))
    await world.end_all()


async def test_without_a_queue_the_verifiers_refusal_is_told() -> None:
    world = World(room=1, max_running=3, max_waiting=0)
    first, second = world.come(), world.come()
    await world.settle()
    assert first.runs
    assert await refusal_of(second) is VERIFIER_IS_FULL
    world.room = 1
    assert not world.pauses
    third = world.come()
    await world.settle()
    assert third.runs, "whether verifiers are full is found out anew"
    await world.end_all()


async def test_who_was_called_and_leaves_lets_the_next_run() -> None:
    world = World(room=3, max_running=1)
    first, second, third = (world.come() for _ in range(3))
    await world.settle()
    first.may_end.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert second.task
    second.task.cancel()
    await world.settle()
    assert third.runs
    await world.end_all()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 8)), min_size=1, max_size=6))
@settings(deadline=None)
def test_callers_take_turns(arrivals: list[tuple[int, int]]) -> None:
    """Whoever waits is passed by each other caller once at most before its turn."""

    async def play() -> None:
        world = World(room=1)
        world.come("first")
        await world.settle()
        coming = [str(caller) for caller, number in arrivals for _ in range(number)]
        for caller in coming:
            world.come(caller)
        await world.settle()
        await world.end_all()
        assert sorted(world.started[1:]) == sorted(coming)
        for caller in set(coming):
            turns = [index for index, started in enumerate(world.started) if started == caller]
            for one, another in zip([0, *turns], turns, strict=False):
                between = world.started[one + 1 : another]
                assert len(between) == len(set(between)), world.started

    asyncio.run(play())


CALLERS = st.sampled_from("abc")
STEPS = st.one_of(
    st.tuples(st.just("come"), CALLERS, st.integers(1, 2)),
    st.tuples(st.just("end"), st.integers(0, 20)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.just("preempt"), st.integers(0, 20)),
    st.tuples(st.just("others"), st.integers(-2, 2)),
    st.tuples(st.just("pause")),
    st.tuples(st.just("delay"), st.integers(0, 6)),
    st.tuples(st.just("settle"), st.integers(1, 10)),
)


@given(st.lists(STEPS, max_size=60), st.integers(1, 4), st.integers(1, 6), st.integers(0, 5))
@settings(deadline=None, max_examples=300)
def test_nobody_is_forgotten_whatever_happens(
    steps: list[tuple[Any, ...]], room: int, max_running: int, max_waiting: int
) -> None:
    async def play() -> None:
        world = World(room=max(room, 2), max_running=max_running, max_waiting=max_waiting)
        taken = 0
        for step, *values in steps:
            match step, values:
                case "come", (caller, size):
                    world.come(caller, size)
                case "end", (number,) if world.requests:
                    request = world.requests[number % len(world.requests)]
                    if request.runs:
                        request.may_end.set()
                case "preempt", (number,) if world.requests:
                    request = world.requests[number % len(world.requests)]
                    if request.runs and not request.may_end.is_set():
                        request.preempt()
                case "cancel", (number,) if world.requests:
                    task = world.requests[number % len(world.requests)].task
                    assert task
                    task.cancel()
                case "others", (number,):
                    number = max(-taken, min(number, world.room))
                    taken, world.room = taken + number, world.room - number
                case "pause", _ if world.pauses:
                    world.pauses.pop().ring()
                case "delay", (number,):
                    world.delay = number
                case "settle", (number,):
                    await world.settle(number)
            assert world.queue.num_running <= max_running
            num_preempted = sum(request.num_preempted > 0 for request in world.requests)
            assert world.queue.num_waiting <= max_waiting + num_preempted
            assert len(world.pauses) <= 1
        world.room += taken
        await _everybody_gets_a_turn(world, max_running)
        assert world.room == max(room, 2)

    asyncio.run(play())


async def _everybody_gets_a_turn(world: World, max_running: int) -> None:
    """Check that, as sessions end, all who still wait get room."""
    await world.settle()
    while world.queue.num_waiting:
        while world.pauses and world.room >= 2 and world.queue.num_running < max_running:
            await world.end_pause()
        if world.queue.num_waiting:
            assert world.room < 2 or world.queue.num_running == max_running
            await world.end_one()
    await world.end_all()


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("how", ["goes on", "ends"])
async def test_room_goes_first_to_who_runs_and_has_lost_its_verifier(how: str) -> None:
    world = World(room=2)
    lost, other, waits = (world.come(name) for name in ("lost", "other", "waits"))
    await settle()
    assert (lost.runs, other.runs, waits.runs) == (True, True, False)
    assert lost.place
    lost.place.lost_room()
    other.may_end.set()
    await settle()
    assert not waits.runs, "the room is for the one that was lost"
    if how == "goes on":
        lost.place.took_room()
    else:
        lost.may_end.set()
    await settle()
    assert waits.runs
    for request in world.requests:
        request.may_end.set()
    await asyncio.gather(*(request.task for request in world.requests if request.task))


async def test_who_was_preempted_goes_on_before_anybody_begins() -> None:
    world = World(room=2)
    first, second = world.come("many"), world.come("many")
    await world.settle()
    waits = [world.come("few", size=1) for _ in range(3)]
    await world.settle()
    second.preempt()
    await world.settle(1)
    world.room -= 1  # the older session's by now
    await world.settle()
    assert (second.runs, second.num_preempted, world.queue.num_waiting) == (False, 1, 4)
    first.may_end.set()
    await world.settle()
    assert second.runs, "a session has ended"
    assert not any(request.runs for request in waits)
    world.room += 1
    await world.end_all()
    assert world.started == ["many", "many", "few", "few", "few"], "nobody begins twice"


async def test_who_was_preempted_is_never_one_too_many() -> None:
    world = World(room=1, max_waiting=0)
    request = world.come()
    await world.settle()
    request.preempt()
    await world.settle(1)
    world.room = 0
    await world.settle()
    assert world.queue.num_waiting == 1
    assert (await refusal_of(world.come())).reason == "TOO_MANY_REQUESTS"
    await world.end_pause()
    assert not request.runs
    world.room = 1
    await world.end_pause()
    assert request.runs
    await world.end_all()


async def test_time_between_the_waits_does_not_count_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("gateway.place.time.monotonic", lambda: now)
    world = World(room=0)
    request = world.come()
    await world.settle()
    now += 2
    world.room = 1
    await world.end_pause()
    assert request.place
    now += 30
    assert request.place.waited_s == 2
    request.preempt()
    await world.settle(1)
    world.room = 0
    await world.settle()
    now += 3
    assert request.place.waited_s == 5
    world.room = 1
    await world.end_pause()
    now += 40
    assert (request.runs, request.place.waited_s) == (True, 5)
    await world.end_all()


async def test_a_lost_and_then_preempted_request_does_not_keep_the_others_waiting() -> None:
    world = World(room=1)
    request, other = world.come(), world.come()
    await world.settle()
    assert request.place
    request.place.lost_room()
    request.preempt()
    await world.settle()
    await world.end_pause()
    assert (request.runs, other.runs) == (True, False)
    await world.end_all()
    assert len(world.started) == 2
