"""The scheduler's rules, with times that the tests make up: no thread and no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.contract.errors import ResourceExhaustedError
from specdec.contract.step_costs import StepCosts
from specdec.runtime.scheduler import Scheduler

STEP_NS = 80
LINGER_NS = 10
"""An eighth of a step: how long the next step waits for who should be back."""


@dataclass(eq=False)
class Job:
    name: str
    num_tokens: int = 1
    is_urgent: bool = True
    source: str | None = None
    is_cancelled: bool = False


def prefill(name: str, num_tokens: int) -> Job:
    return Job(name, num_tokens, is_urgent=False)


def names(batch: Sequence[Job]) -> str:
    return " ".join(job.name for job in batch)


def queue(scheduler: Scheduler[Job], *jobs: Job) -> None:
    for job in jobs:
        scheduler.add(job, 0)


def steps(scheduler: Scheduler[Job], *jobs: Job) -> list[str]:
    """Queue jobs; return the names in each step until none is left."""
    queue(scheduler, *jobs)
    taken = []
    while batch := scheduler.take(0):
        taken.append(names(batch))
    return taken


def run(scheduler: Scheduler[Job], *sources: str, at: int = 0) -> int:
    """Run a step over an item of each source, which all come at the same time; return when it ended."""
    for source in sources:
        scheduler.add(Job(source, source=source), at)
    batch = scheduler.take(at)
    assert names(batch) == " ".join(sources)
    scheduler.finish(batch, at, at + STEP_NS)
    return at + STEP_NS


@pytest.fixture
def scheduler() -> Scheduler[Job]:
    return Scheduler()


def test_all_that_waits_becomes_one_step(scheduler: Scheduler[Job]) -> None:
    assert steps(scheduler, Job("a"), Job("b"), Job("c")) == ["a b c"]
    assert scheduler.num_waiting == 0
    assert scheduler.take(0) == []
    assert scheduler.wait_s(0) is None


def test_rounds_go_before_prefill_and_the_budget_holds() -> None:
    jobs = [prefill("p1", 8), prefill("p2", 8), Job("r1", 3), Job("r2", 3), prefill("huge", 50)]
    assert steps(Scheduler(max_batch_tokens=10), *jobs) == ["r1 r2", "p1", "p2", "huge"]


def test_what_fits_behind_a_job_that_does_not_has_to_wait_for_it() -> None:
    jobs = [Job("a", 6), Job("b", 6), Job("c", 1)]
    assert steps(Scheduler(max_batch_tokens=10), *jobs) == ["a", "b c"]


def test_a_step_with_rounds_carries_little_prefill() -> None:
    jobs = [prefill(f"p{index}", 5) for index in range(4)]
    scheduler = Scheduler[Job](max_batch_tokens=100, max_background_tokens=10)
    assert steps(scheduler, *jobs, Job("round", 3)) == ["round p0 p1", "p2 p3"]


def test_rounds_that_fill_every_step_do_not_starve_prefill() -> None:
    jobs = [prefill("p0", 10), prefill("p1", 10), *(Job(f"r{index}", 10) for index in range(7))]
    taken = steps(Scheduler(max_batch_tokens=10), *jobs)
    assert taken == ["r0", "r1", "r2", "p0", "r3", "r4", "r5", "p1", "r6"]


def test_steps_that_carry_prefill_beside_rounds_starve_nobody() -> None:
    scheduler = Scheduler[Job](max_batch_tokens=100, max_background_tokens=10)
    queue(scheduler, *(prefill(f"p{index}", 6) for index in range(8)))
    taken = []
    for index in range(8):
        scheduler.add(Job(f"r{index}", 3), 0)
        taken.append(names(scheduler.take(0)))
    # The round first, every time: none of these steps has left the prefill out.
    assert taken == [f"r{index} p{index}" for index in range(8)]


def test_a_cancelled_job_is_dropped(scheduler: Scheduler[Job]) -> None:
    doomed = Job("doomed")
    queue(scheduler, doomed, Job("kept"))
    doomed.is_cancelled = True
    assert steps(scheduler) == ["kept"]
    assert scheduler.num_waiting == 0


def test_a_full_queue_refuses() -> None:
    scheduler = Scheduler[Job](max_queued=2)
    queue(scheduler, Job("a"), Job("b"))
    with pytest.raises(ResourceExhaustedError) as refused:
        scheduler.add(Job("c"), 0)
    assert (refused.value.reason, refused.value.retry_after_s) == ("QUEUE_FULL", 1.0)
    assert steps(scheduler) == ["a b"]
    scheduler.add(Job("c"), 0)


@pytest.mark.parametrize(("last_step_s", "since_s", "expected_s"), [(10, 4, 6), (10, 30, 1), (900, 1, 60)])
def test_a_full_queue_says_when_the_step_under_way_should_end(
    last_step_s: int, since_s: int, expected_s: float
) -> None:
    scheduler = Scheduler[Job](max_queued=1)
    second = 10**9
    queue(scheduler, Job("done"))
    scheduler.finish(scheduler.take(0), 0, last_step_s * second)
    queue(scheduler, Job("under way"))
    assert names(scheduler.take(last_step_s * second)) == "under way"
    queue(scheduler, Job("waits"))
    with pytest.raises(ResourceExhaustedError) as refused:
        scheduler.add(Job("refused"), (last_step_s + since_s) * second)
    assert (refused.value.reason, refused.value.retry_after_s) == ("QUEUE_FULL", expected_s)


def test_a_step_waits_for_a_source_that_is_late_by_a_little(scheduler: Scheduler[Job]) -> None:
    ended = run(scheduler, "early", "late")
    scheduler.add(Job("early", source="early"), ended + 1)
    assert scheduler.take(ended + 1) == []
    assert scheduler.wait_s(ended + 1) == pytest.approx((LINGER_NS - 1) / 1e9)
    scheduler.add(Job("late", source="late"), ended + 3)
    assert names(scheduler.take(ended + 3)) == "early late"


def test_a_step_waits_no_longer_than_its_share_of_the_last_one(scheduler: Scheduler[Job]) -> None:
    ended = run(scheduler, "early", "late")
    scheduler.add(Job("early", source="early"), ended)
    assert scheduler.take(ended + LINGER_NS - 1) == []
    assert names(scheduler.take(ended + LINGER_NS)) == "early"


def run_late(scheduler: Scheduler[Job], at: int, **away_ns: int) -> int:
    """Run a step over an item of each source, which come back so long after `at`; return when it ended."""
    for source, away in away_ns.items():
        scheduler.add(Job(source, source=source), at + away)
    started = at + max(away_ns.values())
    batch = scheduler.take(started)
    assert names(batch) == " ".join(away_ns)
    scheduler.finish(batch, started, started + STEP_NS)
    return started + STEP_NS


@pytest.mark.parametrize(("first", "taken"), [("fast", "fast"), ("slow", "")])
def test_nobody_waits_for_a_source_that_was_slow_the_last_time(
    scheduler: Scheduler[Job], first: str, taken: str
) -> None:
    slow = STEP_NS + 1
    ended = run_late(scheduler, run(scheduler, "fast", "slow"), fast=LINGER_NS, slow=slow)
    scheduler.add(Job(first, source=first), ended)
    assert names(scheduler.take(ended)) == taken


@pytest.mark.parametrize(
    ("late", "taken"),
    [
        ({"late": 20}, ""),
        ({"late": 45}, "a b"),
        ({"late": 45, "later": 46, "last": 47}, ""),
        ({"late": 10, "last": 79}, ""),
    ],
    ids=["worth it", "one is not", "three are", "the next is"],
)
def test_a_step_waits_as_long_as_that_delays_all_together_least(
    late: dict[str, int], taken: str, scheduler: Scheduler[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two wait for a step of 80. Who misses it waits for its end."""
    monkeypatch.setattr("specdec.runtime.scheduler._LONGEST_WAIT", 1)
    monkeypatch.setattr(StepCosts, "fixed", 0)
    ended = run_late(scheduler, run(scheduler, "a", "b", *late), a=0, b=0, **late)
    for name in "ab":
        scheduler.add(Job(name, source=name), ended)
    assert names(scheduler.take(ended)) == taken


def test_a_step_goes_on_without_who_is_not_worth_the_wait(
    scheduler: Scheduler[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StepCosts, "fixed", 0)
    ended = run_late(scheduler, run(scheduler, "a", "soon", "last"), a=0, soon=10, last=79)
    scheduler.add(Job("a", source="a"), ended)
    assert scheduler.take(ended) == []
    scheduler.add(Job("soon", source="soon"), ended + 10)
    assert names(scheduler.take(ended + 10)) == "a soon"


def test_two_convoys_become_one_where_what_a_step_costs_anyway_is_more_than_they_are_away(
    scheduler: Scheduler[Job],
) -> None:
    """Steps of 80 cost that whoever is in them; the late are away for 60."""
    ended = run_late(scheduler, run(scheduler, "a", "b", "late"), a=0, b=0, late=60)
    for name in "ab":
        scheduler.add(Job(name, source=name), ended)
    assert scheduler.take(ended) == []
    scheduler.add(Job("late", source="late"), ended + 60)
    assert names(scheduler.take(ended + 60)) == "a b late"


def test_what_a_step_costs_anyway_is_told_from_what_its_tokens_cost() -> None:
    costs = StepCosts(50.0)
    costs.add(8, 100)
    assert costs.fixed == 100, "nothing is known of other sizes"
    for _ in range(20):
        for num_tokens in (4, 8, 12, 40):
            costs.add(num_tokens, 60 + 5 * num_tokens)
    assert costs.fixed == pytest.approx(60, abs=1)


def test_a_source_that_is_quick_again_is_waited_for_again(scheduler: Scheduler[Job]) -> None:
    ended = run_late(scheduler, run(scheduler, "a", "b"), a=0, b=LINGER_NS + 1)
    ended = run_late(scheduler, ended, a=0, b=1)
    scheduler.add(Job("a", source="a"), ended)
    assert scheduler.take(ended) == []


def test_who_was_waited_for_in_vain_is_not_waited_for_again(scheduler: Scheduler[Job]) -> None:
    ended = run(scheduler, "lost", "other")
    scheduler.add(Job("other", source="other"), ended)
    batch = scheduler.take(ended + LINGER_NS)
    assert names(batch) == "other"
    scheduler.finish(batch, ended + LINGER_NS, ended + LINGER_NS + STEP_NS)
    ended += LINGER_NS + STEP_NS
    scheduler.add(Job("other", source="other"), ended)
    assert names(scheduler.take(ended)) == "other"


def test_a_source_that_was_forgotten_comes_as_a_new_one(scheduler: Scheduler[Job]) -> None:
    ended = run(scheduler, "again", "other")
    scheduler.forget("again")
    # However long it was away: what counts is how long it takes from here on.
    ended = run(scheduler, "again", "other", at=ended + 10 * STEP_NS)
    scheduler.add(Job("other", source="other"), ended)
    assert scheduler.take(ended) == []


@pytest.mark.parametrize("forget_first", [True, False])
def test_nobody_waits_for_a_source_that_has_ended(scheduler: Scheduler[Job], forget_first: bool) -> None:
    ended = run(scheduler, "other", "ended")
    if forget_first:
        scheduler.forget("ended")
    scheduler.add(Job("other", source="other"), ended)
    if not forget_first:
        assert scheduler.take(ended) == []
        scheduler.forget("ended")
    assert names(scheduler.take(ended)) == "other"


@pytest.mark.parametrize("how", ["cancelled", "forgotten"])
def test_nobody_waits_for_a_source_that_left_while_its_step_ran(scheduler: Scheduler[Job], how: str) -> None:
    left = Job("left", source="left")
    queue(scheduler, Job("other", source="other"), left)
    batch = scheduler.take(0)
    if how == "cancelled":
        left.is_cancelled = True
    else:
        scheduler.forget("left")
    scheduler.finish(batch, 0, STEP_NS)
    scheduler.add(Job("other", source="other"), STEP_NS)
    assert names(scheduler.take(STEP_NS)) == "other"


def test_a_job_of_no_source_waits_for_nobody_and_nobody_for_it(scheduler: Scheduler[Job]) -> None:
    ended = run(scheduler, "a", "b")
    scheduler.add(Job("a", source="a"), ended)
    scheduler.add(Job("side", num_tokens=10_000), ended)
    side = scheduler.take(ended)
    assert names(side) == "side"
    # A step of such jobs alone moves nobody's time to be back.
    scheduler.finish(side, ended, ended + 1)
    assert scheduler.take(ended + LINGER_NS - 1) == []
    assert names(scheduler.take(ended + LINGER_NS)) == "a"


def test_who_is_woken(scheduler: Scheduler[Job]) -> None:
    """`add` reports when it is worth looking again: for the first item, the last that is expected, and side
    work.
    """
    ended = run(scheduler, "a", "b", "c")
    assert scheduler.add(Job("a", source="a"), ended)
    assert scheduler.take(ended) == []
    assert not scheduler.add(Job("b", source="b"), ended)
    assert scheduler.add(Job("side"), ended)
    assert scheduler.add(Job("c", source="c"), ended)
    assert names(scheduler.take(ended)) == "a b side c"


def test_draining_empties_the_queue(scheduler: Scheduler[Job]) -> None:
    queue(scheduler, Job("a"), prefill("b", 5))
    assert names(scheduler.drain()) == "a b"
    assert scheduler.num_waiting == 0
    assert scheduler.take(0) == []


@given(
    st.lists(
        st.tuples(st.integers(1, 15), st.booleans(), st.sampled_from([None, "a", "b", "c"]), st.booleans()),
        max_size=30,
    ),
    st.integers(1, 5),
)
def test_no_job_is_lost_and_no_step_is_too_large(
    specs: list[tuple[int, bool, str | None, bool]], num_at_once: int
) -> None:
    scheduler = Scheduler[Job](max_batch_tokens=20, max_background_tokens=8)
    jobs = [Job(str(index), *spec) for index, spec in enumerate(specs)]
    taken: list[Job] = []
    now = 0
    for start in range(0, len(jobs), num_at_once):
        for job in jobs[start : start + num_at_once]:
            scheduler.add(job, now)
        now = take_a_step(scheduler, taken, now)
    while scheduler.num_waiting:
        now = take_a_step(scheduler, taken, now)
    assert sorted(map(id, taken)) == sorted(id(job) for job in jobs if not job.is_cancelled)


def take_a_step(scheduler: Scheduler[Job], taken: list[Job], now: int) -> int:
    """Run one step and check it; return when the next may begin."""
    batch = scheduler.take(now)
    if not batch and (wait_s := scheduler.wait_s(now)) is not None:
        assert wait_s > 0, "a step that waits says how long"
        now += round(wait_s * 1e9)
        batch = scheduler.take(now)
        assert batch, "and is due then"
    assert len(batch) <= 1 or sum(job.num_tokens for job in batch) <= 20
    background = [job for job in batch if not job.is_urgent]
    if len(background) < len(batch) and len(background) > 1:
        assert sum(job.num_tokens for job in background) <= 8
    taken += batch
    scheduler.finish(batch, now, now + STEP_NS)
    return now + STEP_NS + 1
