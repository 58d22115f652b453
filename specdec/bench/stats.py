"""From records to rows: one for each concurrency, category and method."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

from specdec.bench.records import Answer, RequestRecord
from specdec.client import Speculation
from specdec.contract.methods import PLAIN

_T = TypeVar("_T")

OVERALL = "all"
"""Category of the row over all prompts."""


@dataclass(frozen=True, slots=True)
class Row:
    """Figures of one method at one concurrency in one category.

    Medians (p50) are over the answered requests, and null where no request has the figure. A peer without
    rounds has neither acceptance nor times per round.
    """

    method: str
    """Method or peer that answered."""
    concurrency: int
    """Number of requests under way at a time."""
    category: str
    """Category of the prompts, or "all"."""
    num_prompts: int
    """Number of prompts the method was asked, failed requests included; each turn counts each time."""
    ttft_ms_p50: float | None
    """Time to first token, milliseconds."""
    tpot_ms_p50: float | None
    """Mean time per output token after the first, milliseconds."""
    tokens_per_s: float | None
    """Output tokens over the wall time the method kept the services busy, prefill included."""
    speedup: float | None
    """Median TPOT of `none` over the method's, at the same concurrency and in the same category: a slow
    request changes it little, and it can be recomputed from the rows."""
    mean_acceptance_length: float | None
    """1 + accepted tokens / rounds, both summed over requests; bonus included."""
    draft_ms_p50: float | None
    """The drafter's time per round, milliseconds: the median of the requests' means."""
    verify_ms_p50: float | None
    """The verifier's time per round, the median of means as above."""
    transport_ms_p50: float | None
    """Time on the wire and in gRPC per round, the median of means as above."""
    gateway_ms_p50: float | None
    """The gateway's own time per round, the median of means as above."""
    identical_to_none: float | None
    """Share of the prompts that both answered where the token ids equal those of `none`, 0 to 1."""
    acceptance_per_position: list[float]
    """Entry i is the share of the rounds with a draft token at position i that accepted it."""
    num_errors: int
    """Number of requests that failed."""
    draft_tokens_per_token: float | None = None
    """Draft tokens verified, with all branches of trees, per token emitted after the first."""
    proposer_shares: dict[str, float] = field(default_factory=dict)
    """Share of the accepted draft tokens that a drafter proposed, 0 to 1, by its name. Shares overlap where
    several drafters proposed the same token."""
    paired_speedup: float | None = None
    """Median, over blocks of prompts, of the method's tokens per second over those of `none` with the same
    prompts, measured one right after the other; reading prompts and waiting for the slowest included."""
    paired_interval: list[float] = field(default_factory=list)
    """Where that median lies with a confidence of 95 %, from and to; with fewer than nine blocks, the least
    and the largest of them. Empty: there is none."""
    num_pairs: int = 0
    """Number of these blocks."""


@dataclass(frozen=True, slots=True)
class TurnRow:
    """Figures over all prompts for one turn of the user, the first, second or a later time it was asked."""

    ask: int
    """Which time, counted from 1."""
    turn: int
    """Which turn, counted from 1."""
    row: Row
    """The figures."""


def compute_turn_rows(records: Sequence[RequestRecord]) -> list[TurnRow]:
    """Return rows by ask, turn, concurrency and method; none where everything was one turn asked once."""
    groups: dict[tuple[int, int], list[RequestRecord]] = {}
    for record in records:
        groups.setdefault((record.ask, record.turn), []).append(record)
    if len(groups) < 2:
        return []
    return [
        TurnRow(ask, turn, row)
        for (ask, turn), group in sorted(groups.items())
        for row in compute_rows(group)
        if row.category == OVERALL
    ]


def compute_rows(records: Sequence[RequestRecord]) -> list[Row]:
    """Return rows by concurrency, category ("all" first) and method, each in the order of first
    appearance."""
    rows = []
    methods = _distinct(record.method for record in records)
    # Rotation lets any method appear first; the others are read against `none`, which comes first here.
    methods.sort(key=lambda method: method != PLAIN)
    for concurrency in _distinct(record.concurrency for record in records):
        at_level = [record for record in records if record.concurrency == concurrency]
        for category in [OVERALL, *_distinct(record.category for record in at_level)]:
            group = [record for record in at_level if category in (OVERALL, record.category)]
            plain = [record for record in group if record.method == PLAIN]
            for method in methods:
                if own := [record for record in group if record.method == method]:
                    rows.append(_row(own, plain, category))
    return rows


def _row(own: Sequence[RequestRecord], plain: Sequence[RequestRecord], category: str) -> Row:
    answers = _answers(own)
    rounds = [answer.speculation for answer in answers if answer.speculation is not None]
    ratios = _paired(own, plain) if own[0].method != PLAIN else []
    tpot_ms, plain_tpot_ms = _tpot_p50(answers), _tpot_p50(_answers(plain))
    return Row(
        method=own[0].method,
        concurrency=own[0].concurrency,
        category=category,
        num_prompts=len(own),
        ttft_ms_p50=_median(answer.ttft_ms for answer in answers),
        tpot_ms_p50=tpot_ms,
        tokens_per_s=_tokens_per_s(own),
        speedup=plain_tpot_ms / tpot_ms if plain_tpot_ms and tpot_ms else None,
        mean_acceptance_length=_mean_acceptance_length(rounds),
        draft_ms_p50=_per_round_p50(rounds, lambda stats: stats.draft_ms),
        verify_ms_p50=_per_round_p50(rounds, lambda stats: stats.verify_ms),
        transport_ms_p50=_per_round_p50(rounds, lambda stats: stats.transport_ms),
        gateway_ms_p50=_per_round_p50(rounds, lambda stats: stats.gateway_ms),
        identical_to_none=_identical_share(own, plain),
        acceptance_per_position=_acceptance_per_position(rounds),
        num_errors=sum(record.answer is None for record in own),
        draft_tokens_per_token=_draft_tokens_per_token(rounds),
        proposer_shares=_proposer_shares(rounds),
        paired_speedup=_median(ratios),
        paired_interval=_interval(ratios),
        num_pairs=len(ratios),
    )


def _paired(own: Sequence[RequestRecord], plain: Sequence[RequestRecord]) -> list[float]:
    """Return the tokens per second over those of `none`, ascending, of each block that both answered."""
    ratios = []
    for pair in _distinct(record.pair for record in own):
        mine = _tokens_per_s([record for record in own if record.pair == pair])
        theirs = _tokens_per_s([record for record in plain if record.pair == pair])
        ratios += [mine / theirs] if mine and theirs else []
    return sorted(ratios)


def _interval(values: Sequence[float]) -> list[float]:
    """Return the 95 % confidence interval of the median of ascending values, from their order alone: each of
    them is above it as likely as below."""
    if not values:
        return []
    count, num_left_out = len(values), 0
    while 2 * sum(math.comb(count, few) for few in range(num_left_out + 2)) <= 0.05 * 2**count:
        num_left_out += 1
    return [values[num_left_out], values[-1 - num_left_out]]


def _answers(records: Iterable[RequestRecord]) -> list[Answer]:
    return [record.answer for record in records if record.answer is not None]


def _tpot_p50(answers: Iterable[Answer]) -> float | None:
    return _median(answer.tpot_ms for answer in answers if answer.tpot_ms is not None)


def _tokens_per_s(records: Sequence[RequestRecord]) -> float | None:
    answered = [(len(r.answer.token_ids), r.busy_ms) for r in records if r.answer is not None]
    busy_s = sum(busy_ms for _, busy_ms in answered) / 1e3
    return sum(num_tokens for num_tokens, _ in answered) / busy_s if busy_s else None


def _mean_acceptance_length(rounds: Sequence[Speculation]) -> float | None:
    num_rounds = sum(stats.num_rounds for stats in rounds)
    return 1.0 + sum(stats.num_accepted_tokens for stats in rounds) / num_rounds if num_rounds else None


def _draft_tokens_per_token(rounds: Sequence[Speculation]) -> float | None:
    num_tokens = sum(stats.num_rounds + stats.num_accepted_tokens for stats in rounds)
    return sum(stats.num_draft_tokens for stats in rounds) / num_tokens if num_tokens else None


def _proposer_shares(rounds: Sequence[Speculation]) -> dict[str, float]:
    won: Counter[str] = Counter()
    for stats in rounds:
        for proposer in stats.proposers:
            won[proposer.drafter] += proposer.num_accepted_tokens
    num_accepted = sum(stats.num_accepted_tokens for stats in rounds)
    return {name: count / num_accepted if num_accepted else 0.0 for name, count in won.items()}


def _per_round_p50(rounds: Sequence[Speculation], time_ms: Callable[[Speculation], float]) -> float | None:
    return _median(time_ms(stats) / stats.num_rounds for stats in rounds if stats.num_rounds)


def _identical_share(own: Sequence[RequestRecord], plain: Sequence[RequestRecord]) -> float | None:
    expected = {record.prompt_key: record.answer.token_ids for record in plain if record.answer is not None}
    same = [
        record.answer.token_ids == expected[record.prompt_key]
        for record in own
        if record.answer is not None and record.prompt_key in expected
    ]
    return sum(same) / len(same) if same else None


def _acceptance_per_position(rounds: Sequence[Speculation]) -> list[float]:
    drafted = _sum_per_position(stats.num_draft_tokens_per_position for stats in rounds)
    accepted = _sum_per_position(stats.num_accepted_tokens_per_position for stats in rounds)
    accepted += [0] * (len(drafted) - len(accepted))
    return [a / d if d else 0.0 for a, d in zip(accepted, drafted, strict=True)]


def _sum_per_position(counts: Iterable[Sequence[int]]) -> list[int]:
    total: list[int] = []
    for count in counts:
        total += [0] * (len(count) - len(total))
        for position, value in enumerate(count):
            total[position] += value
    return total


def _median(values: Iterable[float]) -> float | None:
    ordered = list(values)
    return median(ordered) if ordered else None


def _distinct(values: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(values))
