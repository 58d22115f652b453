"""`specdec bench capacity`: its table, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from specdec.bench.capacity_check import CheckRow, table
from specdec.bench.cli import bench
from specdec.bench.terminal import table_console
from specdec.bench.trace import ArmTrace, PromptTrace, RoundCosts, Trace

ROUND_MS = 20.0 + 1.0
"""A plain round of the trace below."""


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A trace of `none`, and of ngram with two sizes, the larger of which is accepted no further."""
    accepted = [[1, 1, 1, 1, 1]] * 2
    arms = [
        ArmTrace("none", 0, 0, {1: RoundCosts(0, 20, 1, 0)}, [[0] * 10] * 2),
        ArmTrace("ngram", 2, 0, {1: RoundCosts(2, 20, 2, 2)}, accepted),
        ArmTrace("ngram", 6, 0, {1: RoundCosts(5, 22, 2, 6)}, accepted),
    ]
    provenance = {"model": "tiny", "hardware": {"cpu": "an abacus"}}
    path = tmp_path / "trace.json"
    Trace(provenance, arms, [PromptTrace(10, 30.0), PromptTrace(20, 40.0)]).write(path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(bench, ["capacity", *map(str, arguments)])


def rows(*arguments: object) -> list[dict[str, Any]]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["trace"]["model"] == "tiny"
    assert document["provenance"]["command"]
    found: list[dict[str, Any]] = document["rows"]
    return found


def test_the_table_has_plain_decoding_and_the_best_size_of_each_method(trace: Path) -> None:
    result = run("--trace", trace, "--concurrency", "1", "--price", "3.6")
    assert result.exit_code == 0, result.output
    assert "ngram@2" in result.stdout
    assert "ngram@6" not in result.stdout
    assert "tiny on an abacus" in result.stdout
    # The plain round of 21 ms, and two processors at 0.001 a second.
    assert f"{ROUND_MS:.1f}" in result.stdout
    assert "price" in result.stdout


def test_the_default_needs_no_file() -> None:
    result = run("--concurrency", "1", "--answers", "2")
    assert result.exit_code == 0, result.output
    assert "none" in result.stdout
    assert "ngram-lm" in result.stdout


def test_named_sizes_are_all_shown_beside_plain_decoding(trace: Path) -> None:
    found = rows("--trace", trace, "--methods", "ngram@6,ngram@2", "--concurrency", "1")
    assert [row["method"] for row in found] == ["none", "ngram@2", "ngram@6"]
    assert found[1]["tpot_ms"] == pytest.approx((2 + 20 + 2) / 2)


def test_systems_of_several_sizes_are_rows_with_the_price_of_their_tokens(trace: Path) -> None:
    options = ("--methods", "ngram@2", "--verifiers", "1,4", "--placement", "shared", "--price", "3.6")
    found = [row for row in rows("--trace", trace, *options) if row["method"] != "none"]
    sizes = [(row["num_verifiers"], row["num_drafters"], row["concurrency"]) for row in found]
    assert sizes == [(1, 1, 1), (1, 1, 8), (4, 4, 4), (4, 4, 32)]
    for row in found:
        tokens_per_hour = 3600 * row["tokens_per_s"]
        price = 3.6 * row["num_verifiers"] * 1e6 / tokens_per_hour
        assert row["price_per_million_tokens"] == pytest.approx(price)


def test_costs_that_are_given_replace_those_of_the_trace(trace: Path) -> None:
    given = ("--pass-ms", "1:30,65:33.2", "--draft-ms", "4", "--transport-ms", "0.5")
    found = rows("--trace", trace, "--methods", "ngram@2", "--concurrency", "1", *given)
    assert found[0]["tpot_ms"] == pytest.approx(30.5)
    assert found[1]["tpot_ms"] == pytest.approx((4 + 0.5 + 30.1 + 0.5) / 2)


def test_the_network_adds_to_every_round(trace: Path) -> None:
    network = ("--verifier-rtt-ms", "3", "--drafter-rtt-ms", "4")
    found = rows("--trace", trace, "--methods", "ngram@2", "--concurrency", "1", *network)
    assert found[0]["tpot_ms"] == pytest.approx(ROUND_MS + 3)
    assert found[1]["tpot_ms"] == pytest.approx((2 + 20 + 2 + 7) / 2)


def test_lengths_may_be_given(trace: Path) -> None:
    found = rows("--trace", trace, "--concurrency", "1", "--prompt-tokens", "100", "--answer-tokens", "101")
    # A token of a prompt takes a millisecond there, after 20 without any.
    assert found[0]["ttft_ms"] == pytest.approx(120.0)
    assert found[0]["total_ms"] == pytest.approx(120.0 + 100 * ROUND_MS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "mtp@4"), "it has none, ngram@2, ngram@6"),
        (("--pass-ms", "1-28"), "not a list of points"),
        (("--pass-ms", "1:nan"), "not a list of points"),
        (("--pass-ms", "1:-5"), "not a list of points"),
        (("--verifiers", "0"), "must be"),
        (("--verifiers", ","), "must be lists of integers"),
        (("--concurrency", ""), "must be lists of integers"),
        (("--ahead", "2"), "ahead"),
    ],
)
def test_bad_input_is_refused(trace: Path, arguments: tuple[str, ...], message: str) -> None:
    result = run("--trace", trace, *arguments)
    assert result.exit_code != 0
    assert message in result.output


def test_the_check_shows_medians_and_the_range_of_its_repeats() -> None:
    console = table_console()
    with console.capture() as capture:
        console.print(table([CheckRow("ngram@4", 2, 4, 104.0, [90.0, 100.0, 130.0], 9.0, [10.0, 8.0, 12.0])]))
    shown = capture.get()
    assert "1.04" in shown
    assert "90.0 to 130.0" in shown
    assert "0.90" in shown


def test_loaded_rounds_of_the_trace_stand_beside_what_is_predicted_of_them(tmp_path: Path) -> None:
    plain = {1: RoundCosts(0, 20, 1, 0), 8: RoundCosts(0, 24, 2, 0)}
    arms = [
        ArmTrace("none", 0, 0, plain, [[0] * 10] * 2),
        ArmTrace("ngram", 2, 0, {1: RoundCosts(2, 20, 2, 2), 8: RoundCosts(3, 30, 3, 2)}, [[1] * 5] * 2),
    ]
    Trace({"model": "tiny"}, arms, [PromptTrace(10, 30.0)] * 2).write(tmp_path / "trace.json")
    found = rows("--trace", tmp_path / "trace.json", "--recorded", "--pass-ms", "1:20,65:20")
    # There are two prompts, so two requests at most: each waits a millisecond for the other's transport.
    assert [(row["method"], row["concurrency"], row["recorded_ms"]) for row in found] == [
        ("none", 2, 26.0),
        ("ngram@2", 2, 36.0),
    ]
    assert found[0]["predicted_ms"] == pytest.approx(22.0, rel=0.1)
    result = run("--trace", tmp_path / "trace.json", "--recorded", "--pass-ms", "1:20,65:20")
    assert "within 15%" in result.stdout
