"""A drafter that is never right is found out, left alone, tried again, and trusted again once it is right."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import pytest

from gateway.rounds.records import DrafterRecords, TrackRecord


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def record_of(clock: Clock, *, pause_s: float = 30.0) -> TrackRecord:
    return TrackRecord("mtp", "host:1", pause_s=pause_s, now_s=clock)


def judge(record: TrackRecord, drafts: Iterable[bool]) -> None:
    for is_right in drafts:
        record.judge(is_right=is_right)


def num_drafts_until_paused(record: TrackRecord) -> int:
    """Let wrong drafts be judged; return after how many of them the drafter is left alone."""
    for num_drafts in range(1, 2000):
        record.judge(is_right=False)
        if record.is_paused:
            return num_drafts
    raise AssertionError("it is never left alone")


def test_it_takes_a_few_dozen_drafts_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    record = record_of(clock)
    assert (record.is_paused, record.verdict) == (False, "")
    assert 20 <= num_drafts_until_paused(record) <= 50
    assert "hardly ever right" in record.verdict
    for _ in range(3):
        clock.now_s += 10_000
        num_drafts_until_paused(record)
    (logged,) = (entry for entry in caplog.records if entry.levelno == logging.WARNING)
    assert (vars(logged)["drafter"], vars(logged)["uri"]) == ("mtp", "host:1")


def test_pauses_double_and_each_ends_with_a_short_trial() -> None:
    clock = Clock()
    record = record_of(clock)
    num_first = num_drafts_until_paused(record)
    for pause_s in (30, 60, 120, 240, 480, 600, 600):
        clock.now_s += pause_s - 1
        assert record.is_paused
        clock.now_s += 1
        assert not record.is_paused
        assert record.verdict, "a pause that is over proves nothing"
        assert 5 <= num_drafts_until_paused(record) < num_first / 2


def test_drafts_of_requests_that_fixed_a_size_do_not_prolong_a_pause() -> None:
    clock = Clock()
    record = record_of(clock)
    num_drafts_until_paused(record)
    judge(record, [False] * 500)
    clock.now_s += 30
    assert not record.is_paused


def test_one_right_draft_ends_it() -> None:
    clock = Clock()
    record = record_of(clock)
    num_first = num_drafts_until_paused(record)
    clock.now_s += 30
    num_drafts_until_paused(record)
    judge(record, [True])
    assert (record.is_paused, record.verdict) == (False, "")
    assert num_drafts_until_paused(record) > num_first, "what was right is remembered"
    clock.now_s += 30
    assert not record.is_paused, "the pauses are short again"


@pytest.mark.parametrize("one_in", [2, 10, 25])
def test_a_drafter_that_is_right_now_and_then_is_kept(one_in: int) -> None:
    record = record_of(Clock())
    judge(record, [at % one_in == 0 for at in range(2000)])
    assert not record.verdict


def test_a_text_that_nobody_guesses_does_not_condemn_a_good_drafter() -> None:
    record = record_of(Clock())
    judge(record, [True, False] * 200)
    judge(record, [False] * 300)
    assert not record.verdict
    assert num_drafts_until_paused(record) < 1000, "one that broke is found out all the same"


class TestSeveralReplicas:
    def test_the_drafter_is_left_alone_once_all_of_them_are(self) -> None:
        clock = Clock()
        first, second = record_of(clock), record_of(clock)
        records = DrafterRecords(lambda: [first, second])
        assert (records.is_paused, records.verdict) == (False, "")
        num_drafts_until_paused(first)
        assert (records.is_paused, records.verdict) == (False, "")
        num_drafts_until_paused(second)
        assert (records.is_paused, records.verdict) == (True, first.verdict)
        clock.now_s += 30
        assert (records.is_paused, records.verdict) == (False, first.verdict)
        judge(second, [True])
        assert records.verdict == ""

    def test_who_was_drafted_for_by_a_wrong_one_is_told(self) -> None:
        clock = Clock()
        first, second = record_of(clock), record_of(clock)
        num_drafts_until_paused(first)
        records = DrafterRecords(lambda: [first, second])
        records.used = first
        assert records.verdict == first.verdict
        records.used = second
        assert records.verdict == ""

    def test_of_a_drafter_without_a_replica_nothing_is_said(self) -> None:
        records = DrafterRecords()
        assert (records.is_paused, records.verdict) == (False, "")
