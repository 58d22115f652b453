"""What the capacity model takes from a trace and from measured passes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from specdec.bench.capacity import AnswerShape
from specdec.bench.capacity_costs import (
    DEFAULT_TRACE,
    answer_shapes,
    method_costs,
    read_pass_line,
    read_trace,
    rising,
)
from specdec.bench.trace import ArmTrace, PromptTrace, RoundCosts, Trace
from specdec.contract.errors import InvalidArgumentError

PLAIN = ArmTrace(
    "none", 0, 0, {1: RoundCosts(0, 20, 1, 0, 0.5), 4: RoundCosts(0, 26, 2, 0, 0.5)}, [[0, 0], [0]]
)
DRAFTED = ArmTrace(
    "ngram", 3, 0, {1: RoundCosts(2, 22, 1.5, 3, 0.75), 4: RoundCosts(3, 40, 4, 3, 1)}, [[3, 1], [0]]
)
TRACE = Trace({}, [DRAFTED, PLAIN], [PromptTrace(100, 35.0), PromptTrace(200, 45.0)])


def test_the_costs_are_those_of_a_request_that_runs_alone() -> None:
    plain, drafted = method_costs(TRACE)
    assert (plain.name, drafted.name) == ("none", "ngram@3")
    assert drafted.draft_ms == 2
    assert drafted.num_draft_tokens == 3
    assert drafted.pass_ms(4) == 22
    assert plain.pass_ms(1) == 20
    assert plain.verify_transport_ms == drafted.verify_transport_ms == 1.5
    assert drafted.draft_transport_ms == 0.75
    assert drafted.prefill_ms == pytest.approx(25.0)
    assert drafted.prefill_token_ms == pytest.approx(0.1)


def test_given_passes_may_be_those_of_all_methods() -> None:
    plain, drafted = method_costs(TRACE, lambda rows: 30 + rows, keeps_own_pass=False)
    assert (plain.pass_ms(1), drafted.pass_ms(4)) == (31, 34)


def test_a_pass_of_several_takes_what_loaded_rounds_say_and_goes_on_rising() -> None:
    _, drafted = method_costs(TRACE)
    # Two requests, for there are two prompts, with four tokens each took 40 ms, all their waits included.
    assert drafted.pass_ms(8) == pytest.approx(40.0)
    assert drafted.pass_ms(32) > drafted.pass_ms(24) > 40.0


def test_measured_passes_replace_those_of_the_trace(tmp_path: Path) -> None:
    rows = [
        {"num_tokens": 4, "compute_ms_p50": 21.0, "shape": "chain"},
        {"num_tokens": 16, "compute_ms_p50": 27.0, "shape": "chain"},
        {"num_tokens": 16, "compute_ms_p50": 99.0, "shape": "tree"},
    ]
    (tmp_path / "pass.json").write_text(json.dumps({"rows": rows}))
    passes = read_pass_line(tmp_path / "pass.json")
    assert (passes(4), passes(10), passes(16)) == (21.0, 24.0, 27.0)
    assert passes(32) == pytest.approx(35.0)
    _, drafted = method_costs(TRACE, passes)
    # A round of one request is as it was recorded; only what further tokens add is of the passes.
    assert (drafted.pass_ms(4), drafted.pass_ms(16)) == (22.0, 28.0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"arms": [], "provenance": {}}', '{"rows": [{}]}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(InvalidArgumentError, match="bench trace"):
        read_trace(tmp_path / "file")
    with pytest.raises(InvalidArgumentError, match="bench pass"):
        read_pass_line(tmp_path / "file")


def test_a_curve_that_rises_is_above_no_point() -> None:
    line = rising([(1, 20.0), (4, 26.0), (8, 24.0), (16, 40.0)])
    assert [line(size) for size in (1, 4, 8, 12, 16)] == [20.0, 24.0, 24.0, 32.0, 40.0]


def test_answers_are_those_recorded_or_as_long_as_asked_for() -> None:
    recorded = answer_shapes(TRACE, "ngram@3", 3, None, None)
    assert recorded == [AnswerShape(100, (3, 1)), AnswerShape(200, (0,)), AnswerShape(100, (3, 1))]
    longer, plain = answer_shapes(TRACE, "ngram@3", 2, 50, 12)
    assert longer == AnswerShape(50, (3, 1, 3, 0))
    assert longer.num_tokens == plain.num_tokens == 12


def test_a_trace_without_prompts_takes_a_prompt_for_a_pass() -> None:
    plain, _ = method_costs(replace(TRACE, prompts=[]))
    assert plain.prefill_ms == 20
    assert plain.prefill_ms + 100 * plain.prefill_token_ms == pytest.approx(plain.pass_ms(100))
    assert answer_shapes(replace(TRACE, prompts=[]), "none", 1, None, None)[0].prompt_tokens == 100


def test_the_default_trace_knows_its_machine_and_every_size() -> None:
    trace = read_trace(DEFAULT_TRACE)
    assert trace.provenance["hardware"]["cpu"]
    names = [each.name for each in method_costs(trace)]
    assert names[0] == "none"
    assert len(set(names)) == len(names) > 5
