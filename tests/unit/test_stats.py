"""Statistics of a request by hand-computed numbers, and the counters of all requests."""

from __future__ import annotations

from collections import Counter
from typing import Any

from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from gateway.metrics import OTHER, GatewayMetrics
from gateway.rounds.records import DrafterRecords, TrackRecord
from gateway.rounds.stats import SpeculationStats, SpeculationTally
from gateway.rounds.vocabulary import Draft, Proposal, Round, Verified
from specdec.service.exporters import make_telemetry
from specdec.v1 import gateway_pb2

PREFILL = Round(Draft(), Verified(0, 1, server_ns=99, elapsed_ns=999), is_prefill=True)


def make_round(
    num_draft_tokens: int,
    num_accepted_tokens: int,
    *,
    draft_ns: tuple[int, int] = (0, 0),
    verify_ns: tuple[int, int] = (0, 0),
    fallback_reason: str = "",
) -> Round:
    """Return a round with (server, elapsed) times of both sides."""
    draft = Draft(tuple(range(num_draft_tokens)), *draft_ns, fallback_reason=fallback_reason)
    verified = Verified(num_accepted_tokens, 7, server_ns=verify_ns[0], elapsed_ns=verify_ns[1])
    return Round(draft, verified)


def tally_of(*rounds: Round, method: str = "ngram") -> SpeculationStats:
    tally = SpeculationTally(method)
    for round_ in rounds:
        tally.add(round_)
    return tally.stats()


def test_sums_and_histograms() -> None:
    stats = tally_of(
        PREFILL,
        make_round(4, 4, draft_ns=(10, 15), verify_ns=(100, 120)),
        make_round(4, 1, draft_ns=(20, 22), verify_ns=(200, 203)),
        make_round(2, 0, draft_ns=(5, 6), verify_ns=(50, 60)),
        make_round(0, 0, draft_ns=(0, 4), verify_ns=(30, 31), fallback_reason="lost"),
    )
    assert stats.method == "ngram"
    assert stats.num_rounds == 4
    assert stats.num_draft_tokens == 10
    assert stats.num_accepted_tokens == 5
    assert list(stats.acceptance_histogram) == [2, 1, 0, 0, 1]
    assert list(stats.num_draft_tokens_per_position) == [3, 3, 2, 2]
    assert list(stats.num_accepted_tokens_per_position) == [2, 1, 1, 1]
    assert stats.draft_ns == 35
    assert stats.verify_ns == 380
    assert stats.transport_ns == 5 + 20 + 2 + 3 + 1 + 10 + 4 + 1
    assert stats.num_fallback_rounds == 1
    assert stats.fallback_reason == "lost"


TREE = Round(
    Draft(
        (4, 5, 6, 7, 8),
        parent_indices=(-1, 0, -1, 2, 2),
        proposals=(
            Proposal("a", frozenset({0, 1, 2})),
            Proposal("b", frozenset({2, 3, 4})),
            Proposal("c", fallback_reason="late"),
        ),
    ),
    Verified(2, 9, accepted_node_indices=(2, 4)),
)
"""Two paths of the drafter a, three of b, which share a beginning; one of b's is accepted."""


def test_positions_of_a_tree_are_depths_and_proposers_have_their_shares() -> None:
    stats = tally_of(PREFILL, TREE, TREE, make_round(3, 1), method="a+b+c")
    assert TREE.token_ids == (6, 8, 9)
    assert (stats.num_rounds, stats.num_draft_tokens, stats.num_accepted_tokens) == (3, 13, 5)
    assert list(stats.acceptance_histogram) == [0, 1, 2, 0]
    assert list(stats.num_draft_tokens_per_position) == [3, 3, 1]
    assert list(stats.num_accepted_tokens_per_position) == [3, 2, 0]
    assert stats.num_fallback_rounds == 0, "the rounds had a draft"
    shares = [
        (
            proposer.drafter,
            proposer.num_draft_tokens,
            proposer.num_accepted_tokens,
            proposer.num_sole_accepted_tokens,
        )
        for proposer in stats.proposers
    ]
    assert shares == [("a", 6, 2, 0), ("b", 6, 4, 2), ("c", 0, 0, 0)]
    assert [(proposer.num_fallback_rounds, proposer.fallback_reason) for proposer in stats.proposers] == [
        *((0, ""), (0, ""), (2, "late"))
    ]


def test_what_each_drafter_proposed_is_counted() -> None:
    reader = InMemoryMetricReader()
    metrics = GatewayMetrics(make_telemetry("test", metric_reader=reader).meter)
    metrics.add_round("a+b+c", TREE)
    assert sums(reader, "specdec.proposer.draft_tokens", "drafter") == {"a": 3, "b": 3, "c": 0}
    assert sums(reader, "specdec.proposer.accepted_tokens", "drafter") == {"a": 1, "b": 2, "c": 0}
    assert sums(reader, "specdec.draft_tokens") == {"a+b+c": 5}


def test_a_prefill_alone_is_no_round() -> None:
    stats = tally_of(PREFILL)
    assert stats.num_rounds == stats.verify_ns == stats.transport_ns == stats.gateway_ns == 0
    assert list(stats.acceptance_histogram) == [0]
    assert not stats.num_draft_tokens_per_position


def test_plain_decoding_has_rounds_without_drafts() -> None:
    stats = tally_of(PREFILL, make_round(0, 0), make_round(0, 0), method="none")
    assert (stats.num_rounds, stats.num_draft_tokens, stats.num_fallback_rounds) == (2, 0, 0)
    assert list(stats.acceptance_histogram) == [2]


def test_the_commonest_fallback_reason_is_told() -> None:
    def missing(code: str, reason: str) -> Round:
        return Round(Draft(fallback_reason=reason, fallback_code=code), Verified(0, 9))

    late = [missing("deadline_exceeded", f"no draft within {time} s") for time in (0.25, 0.26, 0.27)]
    opening = [missing("opening", "still opening")] * 2
    stats = tally_of(*late[:1], make_round(2, 1), *opening[:1], *late[1:], *opening[1:])
    assert (stats.num_fallback_rounds, stats.fallback_reason) == (5, "no draft within 0.27 s")
    tie = tally_of(*late[:2], *opening)
    assert (tie.num_fallback_rounds, tie.fallback_reason) == (4, "no draft within 0.26 s")


def test_of_each_drafter_the_commonest_reason_is_told() -> None:
    def without_b(code: str) -> Round:
        proposals = (Proposal("a", frozenset({0})), Proposal("b", frozenset(), f"it is {code}", code))
        return Round(Draft((4,), proposals=proposals), Verified(1, 9))

    stats = tally_of(*(without_b(code) for code in ("late", "busy", "busy", "late", "busy", "late", "busy")))
    told = [
        (proposer.drafter, proposer.num_fallback_rounds, proposer.fallback_reason)
        for proposer in stats.proposers
    ]
    assert told == [("a", 0, ""), ("b", 7, "it is busy")]


def never_right(drafter: str) -> DrafterRecords:
    record = TrackRecord(drafter)
    while not record.verdict:
        record.judge(is_right=False)
    return DrafterRecords(lambda: [record])


def test_that_a_drafter_is_never_right_is_told_whether_it_was_asked_or_not() -> None:
    wrong = {"ngram": never_right("ngram")}
    verdict = wrong["ngram"].verdict
    asked, plain, paused, lost = (SpeculationTally("ngram", wrong) for _ in range(4))
    asked.add(make_round(4, 0))
    plain.add(make_round(0, 0))
    paused.add(make_round(0, 0, fallback_reason=verdict))
    lost.add(make_round(0, 0, fallback_reason="lost"))
    told = [(tally.stats().num_fallback_rounds, tally.stats().fallback_reason) for tally in (asked, plain)]
    assert told == [(0, verdict), (0, verdict)]
    assert (paused.stats().num_fallback_rounds, paused.stats().fallback_reason) == (1, verdict)
    assert lost.stats().fallback_reason == f"lost; {verdict}"


def test_of_several_drafters_the_one_that_is_never_right_is_named() -> None:
    records = {"a": never_right("a"), "b": DrafterRecords()}
    tally = SpeculationTally("a+b", records)
    tally.add(make_round(0, 0))
    assert tally.stats().fallback_reason == f"a: {records['a'].verdict}"
    proposals = (Proposal("a", frozenset({0})), Proposal("b", frozenset({1})))
    tally.add(Round(Draft((4, 5), proposals=proposals), Verified(0, 9)))
    stats = tally.stats()
    assert stats.fallback_reason == ""
    assert [part.fallback_reason for part in stats.proposers] == [records["a"].verdict, ""]


def test_a_clock_that_runs_apart_gives_no_negative_time() -> None:
    assert tally_of(PREFILL, make_round(1, 0, draft_ns=(10, 5), verify_ns=(10, 5))).transport_ns == 0


def test_gateway_time_is_what_neither_side_used() -> None:
    hour_ns = 3600 * 10**9
    assert tally_of(PREFILL, make_round(1, 0, verify_ns=(1, hour_ns))).gateway_ns == 0
    assert tally_of(PREFILL, make_round(1, 0, draft_ns=(1, hour_ns))).gateway_ns == 0
    assert tally_of(PREFILL, make_round(1, 0)).gateway_ns > 0


def points(reader: InMemoryMetricReader, name: str) -> list[Any]:
    """Return the data points of one instrument."""
    data = reader.get_metrics_data()
    if data is None:  # nothing was recorded yet
        return []
    return [
        point
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
        if metric.name == name
        for point in metric.data.data_points
    ]


def sums(reader: InMemoryMetricReader, name: str, label: str = "method") -> dict[Any, int]:
    """Return counter values by one attribute."""
    totals: Counter[Any] = Counter()
    for point in points(reader, name):
        totals[point.attributes[label]] += point.value
    return dict(totals)


def test_counters_sum_up_the_requests() -> None:
    requests = {
        "ngram": [PREFILL, make_round(4, 4), make_round(3, 1), make_round(0, 0, fallback_reason="lost")],
        "small": [PREFILL, make_round(2, 2), make_round(2, 0)],
        "none": [PREFILL, make_round(0, 0)],
    }
    reader = InMemoryMetricReader()
    metrics = GatewayMetrics(make_telemetry("test", metric_reader=reader).meter)
    stats = {}
    for method, rounds in requests.items():
        for _ in range(2):
            for round_ in rounds:
                metrics.add_round(method, round_)
        stats[method] = tally_of(*rounds, *rounds, method=method)

    drafting = ("ngram", "small")
    assert sums(reader, "specdec.rounds") == {name: entry.num_rounds for name, entry in stats.items()}
    assert sums(reader, "specdec.drafts") == {"ngram": 4, "small": 4}
    assert sums(reader, "specdec.draft_tokens") == {n: stats[n].num_draft_tokens for n in drafting}
    assert sums(reader, "specdec.accepted_tokens") == {n: stats[n].num_accepted_tokens for n in drafting}
    assert sums(reader, "specdec.fallback_rounds") == {"ngram": 2}
    for name in drafting:
        by_position = {
            point.attributes["position"]: point.value
            for point in points(reader, "specdec.accepted_tokens_per_position")
            if point.attributes["method"] == name
        }
        expected = stats[name].num_accepted_tokens_per_position
        assert by_position == {at: count for at, count in enumerate(expected) if count}


def test_a_fallback_is_counted_by_its_code_never_by_its_text() -> None:
    reader = InMemoryMetricReader()
    metrics = GatewayMetrics(make_telemetry("test", metric_reader=reader).meter)
    for text in ("no draft within 0.2 s", "no draft within 0.3 s"):
        draft = Draft(fallback_reason=text, fallback_code="deadline_exceeded")
        metrics.add_round("ngram", Round(draft, Verified(0, 7)))
    assert sums(reader, "specdec.fallback_rounds", "reason") == {"deadline_exceeded": 2}


def test_drafts_are_counted_at_every_position_they_reach() -> None:
    reader = InMemoryMetricReader()
    metrics = GatewayMetrics(make_telemetry("test", metric_reader=reader).meter)
    for round_ in (make_round(4, 2), make_round(2, 2), make_round(0, 0), TREE):
        metrics.add_round("ngram", round_)
    assert sums(reader, "specdec.draft_tokens_per_position", "position") == {0: 3, 1: 3, 2: 1, 3: 1}
    assert sums(reader, "specdec.accepted_tokens_per_position", "position") == {0: 3, 1: 3}


def test_a_drafter_a_client_made_up_is_no_label() -> None:
    reader = InMemoryMetricReader()
    metrics = GatewayMetrics(make_telemetry("test", metric_reader=reader).meter)
    metrics.add_round(OTHER, TREE)
    assert sums(reader, "specdec.proposer.draft_tokens", "drafter") == {OTHER: 6}


def test_buckets_of_genai_histograms_are_those_of_the_conventions() -> None:
    reader = InMemoryMetricReader()
    metrics = GatewayMetrics(make_telemetry("test", metric_reader=reader).meter)
    timing = gateway_pb2.GenerateTiming(ttft_ns=1, tpot_ns=1, total_ns=1)
    metrics.add_request("tiny", "ngram", "length", timing)
    bounds = {
        name: list(points(reader, f"gen_ai.server.{name}")[0].explicit_bounds)
        for name in ("request.duration", "time_to_first_token", "time_per_output_token")
    }
    assert bounds == {
        "request.duration": [
            *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
        ],
        "time_to_first_token": [
            *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
        ],
        "time_per_output_token": [*(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)],
    }


def test_requests_are_counted_by_outcome_and_timed() -> None:
    reader = InMemoryMetricReader()
    metrics = GatewayMetrics(make_telemetry("test", metric_reader=reader).meter)
    whole = gateway_pb2.GenerateTiming(ttft_ns=10**8, tpot_ns=10**7, total_ns=10**9)
    metrics.add_request("tiny", "ngram", "length", whole)
    metrics.add_request("tiny", "ngram", "length", whole)
    metrics.add_request("tiny", "ngram", "unavailable", gateway_pb2.GenerateTiming(total_ns=5 * 10**8))

    assert sums(reader, "specdec.requests", "outcome") == {"length": 2, "unavailable": 1}
    (duration,) = points(reader, "gen_ai.server.request.duration")
    assert (duration.count, duration.sum) == (3, 2.5)
    assert duration.attributes["gen_ai.request.model"] == "tiny"
    (ttft,) = points(reader, "gen_ai.server.time_to_first_token")
    (tpot,) = points(reader, "gen_ai.server.time_per_output_token")
    assert (ttft.count, ttft.sum) == (2, 0.2)
    assert (tpot.count, tpot.sum) == (2, 0.02)
