"""The capacity model: what it predicts where the answer is known by arithmetic."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specdec.bench.capacity import (
    APART,
    SHARED,
    TOGETHER,
    AnswerShape,
    Cluster,
    MethodCosts,
    Prediction,
    simulate,
)

COSTS = MethodCosts(
    name="ngram@3",
    pass_ms=lambda rows: 20.0 + rows / 4,
    draft_ms=5.0,
    num_draft_tokens=3,
    verify_transport_ms=1.0,
    draft_transport_ms=0.5,
    prefill_ms=30.0,
    prefill_token_ms=0.1,
)
PASS_MS = 21.0
"""A pass over the four tokens of one session."""
ROUND_MS = 5.0 + 0.5 + 1.0 + PASS_MS
ANSWER = AnswerShape(100, (1, 3, 0, 2))
"""Four rounds, ten tokens after the first."""


def predict(cluster: Cluster, num_answers: int, costs: MethodCosts = COSTS) -> Prediction:
    return simulate(costs, cluster, [ANSWER] * num_answers)


def test_one_session_takes_its_draft_its_transport_and_its_pass_every_round() -> None:
    found = predict(Cluster(), 3)
    assert found.ttft_ms == pytest.approx(40.0)
    assert found.tpot_ms == pytest.approx(4 * ROUND_MS / 10)
    assert found.total_ms == found.total_ms_p90 == pytest.approx(40.0 + 4 * ROUND_MS)
    assert found.tokens_per_s == pytest.approx(1000 * 11 / (40.0 + 4 * ROUND_MS))
    assert found.acceptance_length == 2.5
    assert found.wall_ms == pytest.approx(3 * (40.0 + 4 * ROUND_MS))
    assert found.drafter_busy == pytest.approx(4 * 5.0 / (40.0 + 4 * ROUND_MS))


def test_plain_decoding_asks_no_drafter() -> None:
    plain = replace(COSTS, num_draft_tokens=0, draft_ms=0.0)
    found = simulate(plain, Cluster(), [AnswerShape(100, (0,) * 10)])
    assert found.tpot_ms == pytest.approx(1.0 + 20.25)
    assert found.drafter_busy == 0


def test_an_answer_of_one_token_has_no_rounds() -> None:
    found = simulate(COSTS, Cluster(), [AnswerShape(100, ())])
    assert (found.total_ms, found.tpot_ms, found.acceptance_length) == (pytest.approx(40.0), 0.0, 1.0)


def test_sessions_share_passes_and_wait_for_each_other() -> None:
    alone, eight = predict(Cluster(), 8), predict(Cluster(concurrency=8), 64)
    assert 2 < eight.tokens_per_s / alone.tokens_per_s < 8
    assert eight.tpot_ms > alone.tpot_ms


def test_twice_the_system_with_plenty_of_sessions_gives_twice_the_tokens() -> None:
    one = predict(Cluster(concurrency=16), 128)
    two = predict(Cluster(num_verifiers=2, num_drafters=2, num_gateways=2, concurrency=32), 256)
    assert two.tokens_per_s == pytest.approx(2 * one.tokens_per_s, rel=0.02)
    assert two.tpot_ms == pytest.approx(one.tpot_ms, rel=0.02)


def test_a_further_verifier_helps_nobody_who_waits_for_the_drafter() -> None:
    slow = replace(COSTS, draft_ms=200.0, draft_growth=2.0)
    one = predict(Cluster(concurrency=16), 128, slow)
    two = predict(Cluster(num_verifiers=2, concurrency=16), 128, slow)
    assert two.tokens_per_s == pytest.approx(one.tokens_per_s, rel=0.1)
    assert one.drafter_busy > 0.85


def test_each_round_waits_for_the_network_to_both_services() -> None:
    found = predict(Cluster(verifier_rtt_ms=10.0, drafter_rtt_ms=4.0), 2)
    assert found.tpot_ms == pytest.approx(4 * (ROUND_MS + 14.0) / 10)
    assert found.ttft_ms == pytest.approx(50.0)


def test_a_link_that_is_full_limits_the_tokens() -> None:
    # 1 MB a token over 100 Mbit/s: 80 ms a token, the prompt's 100 tokens included.
    found = predict(Cluster(concurrency=16, link_mbit_s=100.0, state_bytes=1_000_000), 64)
    seconds_of_an_answer = (100 + 1 + 3 + 0 + 2) * 0.080
    assert found.tokens_per_s <= 11 / seconds_of_an_answer * 1.25
    free = predict(Cluster(concurrency=16, state_bytes=1_000_000), 64)
    assert found.tokens_per_s < free.tokens_per_s / 10


def test_a_draft_waits_until_the_state_of_the_last_round_is_there() -> None:
    found = simulate(
        COSTS, Cluster(link_mbit_s=8.0, state_bytes=1000), [AnswerShape(100, (3, 3, 3)), AnswerShape(1, (0,))]
    )
    # The prompt's state takes 100 ms and that of a round 4 ms, of which 0.5 are on the draft's way anyway.
    rounds_ms = 3 * ROUND_MS + 100.0 + 2 * 4.0 - 3 * 0.5
    assert found.wall_ms == pytest.approx(40.0 + rounds_ms + 30.1 + ROUND_MS + 0.5)


def test_services_on_one_processor_slow_each_other() -> None:
    busy = replace(COSTS, draft_ms=40.0)
    apart, shared = (
        predict(Cluster(num_drafters=2, placement=placement, concurrency=16), 128, busy)
        for placement in (APART, SHARED)
    )
    assert shared.tokens_per_s < 0.8 * apart.tokens_per_s
    # One session never computes in both services at a time.
    alone = [predict(Cluster(placement=each), 2).tpot_ms for each in (APART, TOGETHER, SHARED)]
    assert alone == [pytest.approx(4 * ROUND_MS / 10)] * 3


def test_drafters_on_one_processor_take_turns() -> None:
    slow = replace(COSTS, draft_ms=200.0, draft_growth=2.0)
    one, apart, together = (
        predict(Cluster(num_drafters=number, placement=placement, concurrency=16), 128, slow)
        for number, placement in ((1, APART), (2, APART), (2, TOGETHER))
    )
    assert apart.tokens_per_s > 1.7 * one.tokens_per_s
    assert together.tokens_per_s == pytest.approx(one.tokens_per_s, rel=0.1)


@pytest.mark.parametrize(("placement", "processors"), [(APART, 5), (TOGETHER, 3), (SHARED, 2)])
def test_a_cluster_counts_its_processors(placement: str, processors: int) -> None:
    assert Cluster(num_verifiers=2, num_drafters=3, placement=placement).num_processors == processors


def test_a_draft_made_ahead_saves_its_time_and_its_way() -> None:
    never, always = (
        simulate(COSTS, Cluster(ahead=ahead, drafter_rtt_ms=4.0), [AnswerShape(10, (3,) * 11)])
        for ahead in (1e-9, 1.0)
    )
    # The first draft has nothing to be ahead of.
    saved_ms = 10 * (5.0 + 0.5 + 4.0)
    assert never.wall_ms - always.wall_ms == pytest.approx(saved_ms)


def test_a_draft_ahead_that_outlasts_the_pass_is_waited_for() -> None:
    slow = replace(COSTS, draft_ms=50.0)
    found = simulate(slow, Cluster(ahead=1.0), [AnswerShape(10, (3,) * 3)])
    first_ms, later_ms = 50.0 + 0.5 + 1.0 + PASS_MS, 50.0 + 1.0 + PASS_MS
    # The draft ahead begins with the pass before it, 22 ms before the round.
    assert found.wall_ms == pytest.approx(31.0 + first_ms + 2 * (later_ms - 1.0 - PASS_MS))
