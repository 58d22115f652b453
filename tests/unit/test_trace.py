"""Traces of a benchmark: what each round accepted, and a file that says what was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec.bench.records import Answer, RequestRecord
from specdec.bench.trace import PromptTrace, RoundCosts, Trace, accepted_by_round, make_trace
from specdec.client import Speculation, Token
from specdec.contract.errors import InvalidArgumentError


def tokens(origins: str) -> list[Token]:
    """Return tokens, d for one that was drafted and t for one of the target's own."""
    return [Token(token_id=at, text="", is_draft=origin == "d") for at, origin in enumerate(origins)]


def record(method: str, concurrency: int, accepted: tuple[int, ...] = (), **failed: str) -> RequestRecord:
    rounds = Speculation(
        method,
        len(accepted),
        6,
        sum(accepted),
        draft_ms=4.0,
        verify_ms=20.0,
        transport_ms=2.0,
        gateway_ms=0.5,
    )
    answer = Answer((1,), 7, 31.0, 1.0, "length", rounds, accepted=accepted)
    return RequestRecord(method, concurrency, 1, "qa", 1.0, 1.0, None if failed else answer, **failed)


@pytest.mark.parametrize(
    ("origins", "accepted"), [("t", ()), ("ttt", (0, 0)), ("tddtt", (2, 0)), ("tddtd", (2,)), ("", ())]
)
def test_rounds_end_with_a_token_of_the_target(origins: str, accepted: tuple[int, ...]) -> None:
    """The first token is the prefill's; what no token of the target follows is no whole round."""
    assert accepted_by_round(tokens(origins)) == accepted


def test_a_trace_has_the_costs_of_every_load_and_the_rounds_of_the_least(tmp_path: Path) -> None:
    records = [
        record(name, concurrency, accepted)
        for concurrency in (4, 1)
        for name, accepted in (("none", (0, 0)), ("ngram/7@2", (2, 0)))
    ]
    trace = make_trace({"commit": "c"}, records)
    assert [(arm.method, arm.draft_depth, arm.draft_nodes) for arm in trace.arms] == [
        ("none", 0, 0),
        ("ngram", 2, 7),
    ]
    assert trace.arms[1].accepted == [[2, 0]]
    assert trace.arms[1].costs == {at: RoundCosts(2.0, 10.0, 1.0, 3.0, 0.25) for at in (1, 4)}
    assert trace.prompts == [PromptTrace(7, 31.0)]
    trace.write(tmp_path / "trace.json")
    assert Trace.read(tmp_path / "trace.json") == trace


def test_a_run_with_failures_makes_no_trace() -> None:
    with pytest.raises(InvalidArgumentError, match=r"ngram/0@2 failed.*gone"):
        make_trace({}, [record("ngram/0@2", 1, error="gone")])
