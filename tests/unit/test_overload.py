"""A gateway's queue under more load than its verifier can serve, in virtual time: goodput stays, and all
callers have their share."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import pytest

from gateway.request.answer_times import AnswerTimes
from gateway.request.deadlines import may_begin, turn
from gateway.waiting import WaitingQueue
from specdec.contract.errors import DeadlineExceededError, ResourceExhaustedError
from tests.unit.virtual_time import run_in_virtual_time

MAX_NEW_TOKENS, MEAN_TOKENS = 64, 40
"""Answers have 16 to 64 tokens."""
CALLERS = ("many", "some", "few")
SHARES = (0.8, 0.15, 0.05)


@dataclass
class Context:
    """The deadline of a call."""

    deadline: float

    def time_remaining(self) -> float:
        return self.deadline - asyncio.get_running_loop().time()


@dataclass(eq=False)
class Session:
    """A session on the verifier, and how many tokens it still gets."""

    num_tokens: int
    num_done: int = 0
    is_done: asyncio.Event = field(default_factory=asyncio.Event)


class Verifier:
    """Gives each of its sessions a token a pass; passes are longer with more sessions.

    Args:
        fixed_s: what a pass takes, seconds.
        session_s: what each session adds to it.
    """

    def __init__(self, fixed_s: float, session_s: float, times: AnswerTimes, num_slots: int = 64) -> None:
        self.fixed_s, self.session_s, self.num_slots = fixed_s, session_s, num_slots
        self.sessions: list[Session] = []
        self._times = times
        self._draw = random.Random(1)

    async def run(self) -> None:
        while True:
            # Other tenants share the machine: a pass takes up to half as long again.
            strength = 1 + self._draw.random() / 2
            await asyncio.sleep((self.fixed_s + self.session_s * len(self.sessions)) * strength)
            for session in list(self.sessions):
                session.num_done += 1
                self._times.came(1)
                if session.num_done == session.num_tokens:
                    self.sessions.remove(session)
                    self._times.ended(session.num_tokens)
                    session.is_done.set()


@dataclass
class Outcome:
    """What became of the requests of a load."""

    num_good: Counter[str] = field(default_factory=Counter)
    num_offered: Counter[str] = field(default_factory=Counter)
    num_in_vain: int = 0
    goodput: float = 0.0
    longest_wait_s: float = 0.0


async def _offer(rate_per_s: float, bound_s: float, verifier_s: tuple[float, float], looks: bool) -> Outcome:
    loop = asyncio.get_running_loop()
    times = AnswerTimes(loop.time)
    verifier = Verifier(*verifier_s, times)
    queue = WaitingQueue(
        256,
        256,
        max_waiting_bytes=1,
        refusal=lambda: ResourceExhaustedError("full", reason="TOO_MANY_REQUESTS"),
    )
    outcome = Outcome()
    lengths = random.Random(3)
    longest_s: Callable[[int], float] = partial(times.longest_s, MAX_NEW_TOKENS) if looks else lambda _: 0.0
    fill_s, until_s = 2 * bound_s, 8 * bound_s

    async def ask(caller: str) -> None:
        begun = loop.time()
        context = cast(Any, Context(begun + bound_s))
        is_counted = begun >= fill_s
        outcome.num_offered[caller] += is_counted
        try:
            with queue.place(caller, 0, may_begin(context, longest_s)) as place:
                while True:
                    await turn(place, context, 900, longest_s)
                    if len(verifier.sessions) < verifier.num_slots:
                        break
                    place.send_back(ResourceExhaustedError("full", reason="NO_SESSION_SLOT"))
                if is_counted:
                    outcome.longest_wait_s = max(outcome.longest_wait_s, loop.time() - begun)
                session = Session(lengths.randint(16, MAX_NEW_TOKENS))
                verifier.sessions.append(session)
                place.took_room()
                try:
                    with times.running():
                        async with asyncio.timeout(context.time_remaining()):
                            await session.is_done.wait()
                    if fill_s <= loop.time() < until_s:
                        outcome.goodput += session.num_tokens / (until_s - fill_s)
                    outcome.num_good[caller] += is_counted
                except TimeoutError:
                    outcome.num_in_vain += is_counted
                    verifier.sessions.remove(session)
        except (ResourceExhaustedError, DeadlineExceededError):
            pass

    running = asyncio.ensure_future(verifier.run())
    draw = random.Random(2)
    asked = []
    while loop.time() < until_s:
        await asyncio.sleep(draw.expovariate(rate_per_s))
        asked.append(asyncio.ensure_future(ask(draw.choices(CALLERS, SHARES)[0])))
    await asyncio.gather(*asked)
    assert (queue.num_running, queue.num_waiting, queue.num_holding) == (0, 0, 0)
    running.cancel()
    return outcome


def offer(rate_per_s: float, bound_s: float, verifier_s: tuple[float, float], looks: bool = True) -> Outcome:
    return run_in_virtual_time(_offer(rate_per_s, bound_s, verifier_s, looks))


CPU, GPU = (0.016, 0.004), (0.02, 0.0002)
"""What a pass takes, and what a session adds to it, where passes compute and where they read weights."""


def capacity_per_s(fixed_s: float, session_s: float) -> float:
    """Return the answers per second of a verifier whose slots are all taken."""
    return 64 / (1.25 * (fixed_s + session_s * 64)) / MEAN_TOKENS


@pytest.mark.parametrize("verifier_s", [CPU, GPU], ids=["computes", "reads"])
def test_goodput_stays_at_its_peak_whatever_is_offered(verifier_s: tuple[float, float]) -> None:
    rate, bound_s = capacity_per_s(*verifier_s), 10.0
    loads = [offer(multiple * rate, bound_s, verifier_s) for multiple in (0.5, 1, 4)]
    goodput = [load.goodput for load in loads]
    assert goodput[-1] >= 0.9 * max(goodput), goodput
    assert loads[0].num_good == loads[0].num_offered
    for load in loads:
        assert load.num_in_vain <= 0.02 * load.num_good.total()
        assert load.longest_wait_s < bound_s
        many, some, few = (load.num_good[caller] / load.num_offered[caller] for caller in CALLERS)
        assert few >= 0.9 * some
        assert some >= 0.9 * many > 0, "who asks for more gets a smaller part of it, but something"
    assert few >= 0.95


def test_without_a_look_at_deadlines_all_answers_would_come_too_late() -> None:
    """It is the reason for the look, and shows that this world can tell."""
    load = offer(4 * capacity_per_s(*CPU), 10.0, CPU, looks=False)
    assert load.num_in_vain > 100
    assert load.goodput < 40


def test_a_machine_that_stood_still_is_soon_trusted_again() -> None:
    now = 0.0
    times = AnswerTimes(lambda: now)
    assert times.longest_s(100, 1) == 0
    times.ended(100)

    def run(seconds: float) -> float:
        nonlocal now
        with times.running():
            for _ in range(round(seconds * 10)):
                now += 0.1
                times.came(10)
                now += pause_s
        return times.longest_s(100, 1)

    pause_s = 0.0
    usual_s = run(60)
    assert usual_s == pytest.approx(1.25, rel=0.1)
    now += 600  # nothing ran meanwhile
    assert run(0.1) == pytest.approx(usual_s, rel=0.2)
    pause_s = 600.0
    run(0.2)
    pause_s = 0.0
    assert usual_s < run(0.1) < 20
    assert run(20) < 1.5 * usual_s
    for _ in range(64):
        times.ended(10)
    usual_s = times.longest_s(100, 1)
    assert times.longest_s(5, 1) == pytest.approx(usual_s / 2)


def test_more_at_a_time_are_expected_to_be_as_fast_until_it_was_seen() -> None:
    """Up to twice as many as ever: where passes read weights they are, and it is soon seen where not."""
    now = 0.0
    times = AnswerTimes(lambda: now)
    times.ended(100)

    def run(number: int, token_s: float) -> None:
        nonlocal now
        with ExitStack() as stack:
            for _ in range(number):
                stack.enter_context(times.running())
            for _ in range(100):
                now += token_s
                for _ in range(number):
                    times.came(1)

    run(1, 0.01)
    alone_s = times.longest_s(100, 1)
    assert alone_s == pytest.approx(1.25, rel=0.05)
    assert times.longest_s(100, 2) == pytest.approx(alone_s)
    assert times.longest_s(100, 8) == pytest.approx(4 * alone_s)
    run(4, 0.02)
    for number, factor in ((1, 1), (2, 4 / 3), (4, 2), (8, 2), (64, 16)):
        assert times.longest_s(100, number) == pytest.approx(factor * alone_s, rel=0.05)
