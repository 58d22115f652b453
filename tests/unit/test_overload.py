"""A gateway's queue under more load than its verifier can serve, in virtual time: goodput stays, and all
callers have their share."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

import pytest

from gateway.request.answer_times import AnswerTimes, ExpectedTime, RunningAnswer
from gateway.request.deadlines import TimeLeft, may_begin, turn
from gateway.waiting import WaitingQueue
from specdec.contract.errors import DeadlineExceededError, ResourceExhaustedError
from tests.unit.virtual_time import run_in_virtual_time

MAX_NEW_TOKENS, MEAN_TOKENS = 64, 40
"""Answers have 16 to 64 tokens."""
CALLERS = ("many", "some", "few")
SHARES = (0.8, 0.15, 0.05)
CHUNK = 128
"""Tokens of prompts that a pass reads."""


def time_left(deadline: float) -> TimeLeft:
    """Return what says how long it is to a deadline."""
    return lambda: deadline - asyncio.get_running_loop().time()


@dataclass(eq=False)
class Session:
    """A session on the verifier, and how many tokens it still gets."""

    answer: RunningAnswer
    num_tokens: int
    num_prompt_tokens: int = 1
    num_read: int = 0
    num_done: int = 0
    begun: float = field(default_factory=lambda: asyncio.get_running_loop().time())
    is_done: asyncio.Event = field(default_factory=asyncio.Event)


class Verifier:
    """Gives each of its sessions a token a pass; passes are longer with more sessions. Beside them a pass
    reads a chunk of the prompts that came first.

    Args:
        fixed_s: what a pass takes, seconds.
        session_s: what each session adds to it, and each 16 tokens of prompts.
    """

    def __init__(self, fixed_s: float, session_s: float, num_slots: int = 64) -> None:
        self.fixed_s, self.session_s, self.num_slots = fixed_s, session_s, num_slots
        self.sessions: list[Session] = []
        self._draw = random.Random(1)

    async def run(self) -> None:
        while True:
            # Other tenants share the machine: a pass takes up to half as long again.
            strength = 1 + self._draw.random() / 2
            decoding = [session for session in self.sessions if session.num_done]
            reading = [session for session in self.sessions if not session.num_done]
            left = CHUNK
            for session in reading:
                taken = min(left, session.num_prompt_tokens - session.num_read)
                session.num_read += taken
                left -= taken
            added_s = self.session_s * (len(decoding) + (CHUNK - left) / 16)
            await asyncio.sleep((self.fixed_s + added_s) * strength)
            for session in reading:
                if session.num_read == session.num_prompt_tokens:
                    session.num_done = 1
                    reading_s = asyncio.get_running_loop().time() - session.begun
                    session.answer.read(session.num_prompt_tokens, reading_s)
            for session in decoding:
                session.num_done += 1
                session.answer.came(1)
                if session.num_done >= session.num_tokens:
                    session.answer.is_whole = True
                    session.is_done.set()
            self.sessions = [session for session in self.sessions if not session.is_done.is_set()]


@dataclass
class Outcome:
    """What became of the requests of a load."""

    num_good: Counter[str] = field(default_factory=Counter)
    num_offered: Counter[str] = field(default_factory=Counter)
    num_in_vain: int = 0
    goodput: float = 0.0
    longest_wait_s: float = 0.0


@dataclass(frozen=True)
class Requests:
    """What is asked for."""

    draw_length: Callable[[random.Random], int] = lambda draw: draw.randint(16, MAX_NEW_TOKENS)
    draw_prompt: Callable[[random.Random], int] = lambda draw: 1
    max_new_tokens: int = MAX_NEW_TOKENS


async def _offer(
    rate_per_s: float, bound_s: float, verifier_s: tuple[float, float], looks: bool, requests: Requests
) -> Outcome:
    loop = asyncio.get_running_loop()
    times = AnswerTimes(loop.time)
    verifier = Verifier(*verifier_s)
    queue = WaitingQueue(
        256,
        256,
        max_waiting_bytes=1,
        refusal=lambda: ResourceExhaustedError("full", reason="TOO_MANY_REQUESTS"),
    )
    outcome = Outcome()
    lengths = random.Random(3)
    fill_s, until_s = 2 * bound_s, 8 * bound_s

    async def ask(caller: str) -> None:
        begun = loop.time()
        left = time_left(begun + bound_s)
        is_counted = begun >= fill_s
        outcome.num_offered[caller] += is_counted
        length, prompt = requests.draw_length(lengths), requests.draw_prompt(lengths)
        expected = ExpectedTime(times, requests.max_new_tokens, prompt)
        longest_s: Callable[[int], float] = expected.longest_s if looks else lambda _: 0.0
        try:
            with queue.place(caller, 0, may_begin(left, longest_s)) as place:
                while True:
                    await turn(place, left, 900, longest_s)
                    if len(verifier.sessions) < verifier.num_slots:
                        break
                    place.send_back(ResourceExhaustedError("full", reason="NO_SESSION_SLOT"))
                if is_counted:
                    outcome.longest_wait_s = max(outcome.longest_wait_s, loop.time() - begun)
                place.took_room()
                try:
                    with times.running() as answer:
                        session = Session(answer, length, prompt)
                        verifier.sessions.append(session)
                        async with asyncio.timeout(left()):
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


def offer(
    rate_per_s: float,
    bound_s: float,
    verifier_s: tuple[float, float],
    looks: bool = True,
    requests: Requests = Requests(),
) -> Outcome:
    return run_in_virtual_time(_offer(rate_per_s, bound_s, verifier_s, looks, requests))


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


def test_prompts_that_take_long_to_read_keep_answers_from_beginning_too_late() -> None:
    """More than half of the time goes into prompts, some of them of 2,048 tokens."""
    requests = Requests(draw_prompt=lambda draw: draw.choice([16, 256, 2048]))
    loads = [offer(multiple * capacity_per_s(*CPU), 10.0, CPU, requests=requests) for multiple in (1, 4)]
    assert loads[1].goodput >= 0.9 * loads[0].goodput
    for load in loads:
        assert load.num_good.total() > 100
        assert load.num_in_vain <= 0.02 * load.num_good.total()


def test_few_long_answers_are_not_forgotten_because_they_run_out_of_time() -> None:
    """One in four answers has ten times as many tokens as the others."""
    requests = Requests(draw_length=lambda draw: 160 if draw.random() < 0.25 else 16, max_new_tokens=512)
    load = offer(2 * capacity_per_s(*CPU), 30.0, CPU, requests=requests)
    assert load.num_good.total() > 100
    assert load.num_in_vain <= 0.02 * load.num_good.total()


def end(times: AnswerTimes, num_tokens: int, *, is_whole: bool = True) -> None:
    """Let an answer of so many tokens end, in no time."""
    with times.running() as answer:
        answer.num_tokens, answer.is_whole = num_tokens, is_whole


def known(*, token_s: float = 0.01, now: float = 0.0) -> tuple[AnswerTimes, Callable[[float], None]]:
    """Return times by which a lone answer's tokens come at that pace, and what lets time pass."""

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    times = AnswerTimes(lambda: now)
    with times.running() as answer:
        answer.read(1, 0.0)
        for _ in range(100):
            wait(token_s)
            times.came(1)
    times._lengths.clear()
    return times, wait


def test_an_answer_that_was_cut_counts_as_at_least_that_long() -> None:
    times, _ = known()
    for _ in range(30):
        end(times, 10)
    for _ in range(4):
        end(times, 200)
    for _ in range(30):
        end(times, 50, is_whole=False)
    assert times.longest_s(1000, 1) == pytest.approx(1.25 * 0.01 * 200), "not 50, nor 10"
    assert times.longest_s(80, 1) == pytest.approx(1.25 * 0.01 * 80)
    for _ in range(64):
        end(times, 50, is_whole=False)
    assert times.longest_s(1000, 1) == pytest.approx(1.25 * 0.01 * 50), "more is not known"
    for _ in range(64):
        end(times, 10)
    assert times.longest_s(1000, 1) == pytest.approx(1.25 * 0.01 * 10), "it is forgotten"


def test_an_answer_that_never_began_says_nothing_of_lengths() -> None:
    times, _ = known()
    end(times, 100)
    for _ in range(64):
        end(times, 0, is_whole=False)
    assert times.longest_s(1000, 1) == pytest.approx(1.25 * 0.01 * 100)


def test_the_time_to_read_a_prompt_is_a_line_by_its_length() -> None:
    times, wait = known(token_s=0.01)
    for _ in range(10):
        for num_prompt_tokens in (100, 1000):
            with times.running() as answer:
                wait(0.1 + 0.002 * num_prompt_tokens)
                answer.read(num_prompt_tokens, 0.1 + 0.002 * num_prompt_tokens)
                for _ in range(49):
                    wait(0.01)
                    answer.came(1)
                answer.is_whole = True
    # Reading does not count as decoding: tokens come as they did.
    for num_prompt_tokens in (0, 100, 500, 4000):
        reading_s = 0.1 + 0.002 * num_prompt_tokens
        takes_s = times.longest_s(1000, 1, num_prompt_tokens)
        assert takes_s == pytest.approx(1.25 * (reading_s + 50 * 0.01), rel=0.05)
        assert ExpectedTime(times, 1000, num_prompt_tokens).longest_s(1) == takes_s


def test_what_was_seen_of_so_many_answers_in_a_bad_moment_does_not_keep_them_from_running_again() -> None:
    times, wait = known(token_s=0.01)

    def run(number: int, token_s: float) -> None:
        with ExitStack() as stack:
            answers = [stack.enter_context(times.running()) for _ in range(number)]
            wait(100 * token_s)
            for answer in answers:
                answer.read(100, 100 * token_s)
            for _ in range(50):
                wait(token_s)
                for answer in answers:
                    answer.came(1)

    for _ in range(10):
        run(4, 1.0)
    run(1, 0.01)
    assert times.longest_s(100, 4, 100) > 100
    for _ in range(80):
        run(1, 0.01)
    assert times.longest_s(100, 4, 100) < 5


def test_an_answer_that_waits_in_its_middle_does_not_count_as_running() -> None:
    times, wait = known(token_s=0.01)
    with times.running() as waits, times.running() as runs:
        waits.read(1, 0.0)
        runs.read(1, 0.0)
        with waits.waiting():
            for _ in range(500):
                wait(0.01)
                runs.came(1)
        runs.is_whole = True
    assert times.longest_s(100, 2) == pytest.approx(times.longest_s(100, 1))


def test_a_machine_that_stood_still_is_soon_trusted_again() -> None:
    now = 0.0
    times = AnswerTimes(lambda: now)
    assert times.longest_s(100, 1) == 0
    end(times, 100)

    def run(seconds: float) -> float:
        nonlocal now
        with times.running() as answer:
            answer.has_read = True
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
        end(times, 10)
    usual_s = times.longest_s(100, 1)
    assert times.longest_s(5, 1) == pytest.approx(usual_s / 2)


def test_more_at_a_time_are_expected_to_be_as_fast_until_it_was_seen() -> None:
    """Up to twice as many as ever: where passes read weights they are, and it is soon seen where not."""
    now = 0.0
    times = AnswerTimes(lambda: now)
    end(times, 100)

    def run(number: int, token_s: float) -> None:
        nonlocal now
        with ExitStack() as stack:
            for _ in range(number):
                stack.enter_context(times.running()).has_read = True
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


def test_tokens_that_come_while_no_answer_runs_do_not_tell_how_long_answers_take() -> None:
    now = [0.0]
    times = AnswerTimes(lambda: now[0])
    with times.running() as answer:
        answer.read(10, 0.1)
    now[0] = 5.0
    answer.came(100)  # they were on the way when it gave up its room
    assert times.longest_s(64, 1) == 0.0


def test_answers_of_one_token_do_not_make_tokens_seem_slow() -> None:
    now = [0.0]
    times = AnswerTimes(lambda: now[0])

    def answer(num_tokens: int) -> None:
        with times.running() as running:
            now[0] += 0.05
            running.read(10, 0.05)
            for _ in range(num_tokens - 1):
                now[0] += 0.01
                running.came(1)
            now[0] += 0.003

    for _ in range(4):
        answer(64)
    usual = times.longest_s(1, 1)
    assert usual > 0.0
    for _ in range(4000):
        answer(1)
        assert times.longest_s(1, 1) < 20 * usual
