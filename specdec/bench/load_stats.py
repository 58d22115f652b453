"""From the records of a load to its rows: one for each rate, and one for each caller at each rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from specdec.bench.load import Fate, LoadConfig, LoadRecord


@dataclass(frozen=True, slots=True)
class Spread:
    """Percentiles of a time, seconds; null where no request has it."""

    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Return the percentiles of some values: the least value that so many of all do not pass."""
        ordered = sorted(values)
        return cls(*(_percentile(ordered, percent) for percent in (50, 95, 99)))


def _percentile(ordered: Sequence[float], percent: int) -> float | None:
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1] if ordered else None


@dataclass(frozen=True, slots=True)
class LoadRow:
    """Figures of one offered load. Requests are those that came while it was measured."""

    offered_per_s: float
    """Requests per second that were offered."""
    multiple: float | None
    """The same over the capacity; null: the capacity was not measured."""
    num_offered: int
    """Requests that came."""
    num_admitted: int
    """Requests that were not refused."""
    num_answered: int
    """Requests that were answered within the bound."""
    num_refused: int
    """Requests that were refused with RESOURCE_EXHAUSTED."""
    num_told_when: int
    """Refusals that say when to try again (RetryInfo)."""
    num_late: int
    """Requests whose deadline passed."""
    num_late_begun: int
    """Those among them that had a token already: work in vain."""
    num_failed: int
    """Requests that ended with another error."""
    goodput_tokens_per_s: float
    """Tokens per second of answers that ended within the bound, counted as they ended in the measured
    time."""
    waited_s: Spread
    """Time until there was room to run, of the admitted requests."""
    ttft_s: Spread
    """Time to the first token, of the answered requests."""
    total_s: Spread
    """Time to the end of the answer, of the answered requests."""


@dataclass(frozen=True, slots=True)
class CallerRow:
    """Figures of one caller at one offered load."""

    offered_per_s: float
    """Requests per second that all callers offered together."""
    caller: str
    """Name of the caller; the first offers most of the load."""
    num_offered: int
    """Requests that it made."""
    num_answered: int
    """Requests of it that were answered within the bound."""
    num_refused: int
    """Requests of it that were refused."""
    answered_share: float | None
    """Its answered requests over those it made; null: it made none."""
    share_of_answers: float | None
    """Its answered requests over those of all callers; null: none was answered."""
    longest_wait_s: float
    """Longest time that a request of it waited, refused ones included, seconds."""


def measured(records: Sequence[LoadRecord], config: LoadConfig) -> list[LoadRecord]:
    """Return the requests that came while the load was measured, and not while it filled the system."""
    until_s = config.bound_s + config.duration_s
    return [record for record in records if config.bound_s <= record.begun_s < until_s]


def goodput(records: Sequence[LoadRecord], config: LoadConfig) -> tuple[float, float]:
    """Return the answers and their tokens per second of one load, by when they ended."""
    until_s = config.bound_s + config.duration_s
    ended = [
        record
        for record in records
        if record.fate is Fate.ANSWERED and config.bound_s <= record.ended_s < until_s
    ]
    num_tokens = sum(record.num_tokens for record in ended)
    return len(ended) / config.duration_s, num_tokens / config.duration_s


def load_row(
    records: Sequence[LoadRecord], config: LoadConfig, rate_per_s: float, capacity_per_s: float | None
) -> LoadRow:
    """Return the figures of one offered load.

    Args:
        records: all its requests.
        rate_per_s: requests per second that were offered.
        capacity_per_s: answers per second that the system is able to give; None: not measured.
    """
    came = measured(records, config)
    admitted = [record for record in came if record.fate is not Fate.REFUSED]
    answered = [record for record in came if record.fate is Fate.ANSWERED]
    late = [record for record in came if record.fate is Fate.LATE]
    return LoadRow(
        offered_per_s=rate_per_s,
        multiple=rate_per_s / capacity_per_s if capacity_per_s else None,
        num_offered=len(came),
        num_admitted=len(admitted),
        num_answered=len(answered),
        num_refused=len(came) - len(admitted),
        num_told_when=sum(record.fate is Fate.REFUSED and record.has_retry_info for record in came),
        num_late=len(late),
        num_late_begun=sum(record.num_tokens > 0 for record in late),
        num_failed=sum(record.fate is Fate.FAILED for record in came),
        goodput_tokens_per_s=goodput(records, config)[1],
        waited_s=Spread.of(record.waited_s for record in came),
        ttft_s=Spread.of(record.ttft_s for record in answered if record.ttft_s is not None),
        total_s=Spread.of(record.total_s for record in answered),
    )


def caller_rows(
    records: Sequence[LoadRecord], config: LoadConfig, rate_per_s: float, callers: Sequence[str]
) -> list[CallerRow]:
    """Return the figures of each caller at one offered load, in the order of the callers."""
    came = measured(records, config)
    num_answered = sum(record.fate is Fate.ANSWERED for record in came)
    rows = []
    for caller in callers:
        own = [record for record in came if record.caller == caller]
        own_answered = sum(record.fate is Fate.ANSWERED for record in own)
        refused = [record for record in own if record.fate is Fate.REFUSED]
        waits = (record.waited_s for record in own)
        rows.append(
            CallerRow(
                offered_per_s=rate_per_s,
                caller=caller,
                num_offered=len(own),
                num_answered=own_answered,
                num_refused=len(refused),
                answered_share=own_answered / len(own) if own else None,
                share_of_answers=own_answered / num_answered if num_answered else None,
                longest_wait_s=max(waits, default=0.0),
            )
        )
    return rows
