"""`specdec bench load`: figures of made-up records, and runs over real systems of a tiny model."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from specdec.bench.cli import bench
from specdec.bench.load import Fate, LoadConfig, LoadRecord, arrivals
from specdec.bench.load_report import LoadOutcome, draw, verdicts
from specdec.bench.load_run import run_load
from specdec.bench.load_stats import Spread, caller_rows, load_row
from specdec.bench.report import RESULTS_FILE, TABLE_FILE
from specdec.bench.workload import Prompt
from specdec.contract.errors import InvalidArgumentError
from tests.systems import is_idle, running_system
from tests.tiny_chat import save_tiny_chat_model

PROMPTS = [Prompt(number, "a", f"w{number}") for number in range(3)]
CALLERS = ("many", "one", "other")


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_chat_model(tmp_path_factory.mktemp("models") / "chat")


def record(ended_s: float, **changes: Any) -> LoadRecord:
    """Return the record of an answer of 10 tokens that took 2 s, 1 s of which it waited."""
    made = LoadRecord(
        offered_per_s=4.0,
        caller="many",
        begun_s=ended_s - 2,
        ended_s=ended_s,
        fate=Fate.ANSWERED,
        num_tokens=10,
        waited_s=1.0,
        ttft_s=1.25,
        has_retry_info=False,
        error="",
    )
    return replace(made, **changes)


def test_requests_come_at_random_at_the_rate_and_mostly_from_one_caller() -> None:
    config = LoadConfig(bound_s=100.0, duration_s=900.0, heavy_share=0.6)
    made = arrivals(config, 2.0, CALLERS, PROMPTS)
    assert made == arrivals(config, 2.0, CALLERS, PROMPTS)
    assert made != arrivals(replace(config, seed=1), 2.0, CALLERS, PROMPTS)
    assert len(made) == pytest.approx(2200, rel=0.1)
    gaps = [after.at_s - before.at_s for before, after in pairwise(made)]
    assert min(gaps) > 0
    # As many gaps are longer than the mean as a Poisson process has.
    assert sum(gap > 0.5 for gap in gaps) / len(gaps) == pytest.approx(0.37, abs=0.05)
    shares = {caller: count / len(made) for caller, count in Counter(a.caller for a in made).items()}
    assert shares == pytest.approx({"many": 0.6, "one": 0.2, "other": 0.2}, abs=0.05)
    assert {a.prompt for a in made} == set(PROMPTS)


def test_only_what_ends_in_time_and_while_it_is_measured_is_goodput() -> None:
    config = LoadConfig(bound_s=10.0, duration_s=20.0)
    records = [
        record(5.0),  # while the system fills
        record(11.0),  # came while it filled, and ended later
        record(20.0),
        record(25.0, fate=Fate.LATE, num_tokens=7, ttft_s=9.0),
        record(26.0, fate=Fate.LATE, num_tokens=0, ttft_s=None, waited_s=10.0),
        record(27.0, fate=Fate.REFUSED, num_tokens=0, has_retry_info=True, caller="one"),
        record(28.0, fate=Fate.REFUSED, num_tokens=0, caller="one"),
        record(29.0, fate=Fate.FAILED, num_tokens=0),
        record(31.0, waited_s=3.0, caller="one"),  # came in time, and ended when nothing more came
    ]
    row = load_row(records, config, 4.0, 2.0)
    assert row.multiple == 2.0
    assert (row.num_offered, row.num_admitted, row.num_answered) == (7, 5, 2)
    assert (row.num_refused, row.num_told_when) == (2, 1)
    assert (row.num_late, row.num_late_begun, row.num_failed) == (2, 1, 1)
    assert row.goodput_tokens_per_s == 1.0
    assert row.waited_s == Spread(1.0, 10.0, 10.0)
    assert row.total_s == Spread(2.0, 2.0, 2.0)
    many, one, other = caller_rows(records, config, 4.0, CALLERS)
    assert (many.num_offered, many.num_answered, many.longest_wait_s) == (4, 1, 10.0)
    assert (one.num_offered, one.num_refused, one.longest_wait_s) == (3, 2, 3.0)
    assert (one.answered_share, one.share_of_answers) == (pytest.approx(1 / 3), 0.5)
    assert (other.num_offered, other.answered_share, other.share_of_answers) == (0, None, 0.0)


def test_a_load_without_a_request_has_no_times() -> None:
    row = load_row([], LoadConfig(), 0.001, None)
    assert (row.num_offered, row.multiple, row.goodput_tokens_per_s) == (0, None, 0.0)
    assert row.total_s == Spread(None, None, None)


def test_what_is_said_of_a_run_names_a_loss_of_goodput_and_who_got_nothing(tmp_path: Path) -> None:
    config = LoadConfig(bound_s=10.0, duration_s=20.0)
    good = [record(15.0), record(20.0)]
    bad = [record(15.0), record(20.0, caller="one", fate=Fate.LATE)]
    outcome = LoadOutcome(
        [load_row(good, config, 1.0, None), load_row(bad, config, 4.0, None)],
        caller_rows(bad, config, 4.0, CALLERS),
        None,
        [],
        {},
    )
    lost, starved = verdicts(outcome)
    assert "Goodput at 4.00 requests/s is 0.50 of its peak" in lost
    assert starved == "one got no answer at 4.00 requests/s, of 1 requests."
    assert draw(outcome, tmp_path).stat().st_size > 1000


@pytest.mark.parametrize(
    "values", [{"multiples": ()}, {"rates": (0.0,)}, {"multiples": (1.0, -2.0)}], ids=str
)
def test_loads_that_cannot_be_offered_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match="such as 0"):
        LoadConfig(**values).validate()


def _tokens(path: Path, names: tuple[str, ...]) -> list[str]:
    """Write a file of callers; return their tokens."""
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
    path.write_text("".join(f'[[tokens]]\nname = "{n}"\nsha256 = "{d}"\n' for n, d in digests.items()))
    return list(names)


async def test_a_system_that_is_asked_for_too_much_answers_every_caller_and_refuses_with_advice(
    chat_model: Path, tmp_path: Path
) -> None:
    tokens = _tokens(tmp_path / "tokens.toml", CALLERS)
    config = LoadConfig(
        multiples=(0.5, 4.0),
        method="none",
        max_new_tokens=64,
        concurrency=4,
        bound_s=3.0,
        duration_s=3.0,
        heavy_share=0.8,
    )
    async with running_system(
        chat_model,
        verifier_options={"max_sessions": 2},
        gateway_options={"max_waiting": 8, "auth_tokens": str(tmp_path / "tokens.toml")},
    ) as system:
        outcome = await asyncio.to_thread(run_load, config, system.address, tmp_path / "out", tokens)
        servicer = system.gateway.generations
        assert (servicer.num_requests, servicer.num_waiting) == (0, 0)
    results = json.loads((tmp_path / "out" / RESULTS_FILE).read_text())
    assert results["provenance"]["callers"] == ["caller-1", "caller-2", "caller-3"]
    assert results["provenance"]["bound_s"] == 3.0
    assert results["capacity"]["answers_per_s"] > 0
    half, fourfold = outcome.rows
    assert (half.multiple, fourfold.multiple) == (0.5, 4.0)
    assert fourfold.num_refused == fourfold.num_told_when > 0
    assert fourfold.num_failed == 0
    for row in outcome.rows:
        assert row.num_offered == row.num_answered + row.num_refused + row.num_late
        assert row.num_admitted == row.num_offered - row.num_refused
        assert row.total_s.p95 is not None
        assert row.total_s.p95 < config.bound_s + 0.5
    assert half.num_answered > 0
    assert fourfold.num_answered > 0
    lines = (tmp_path / "out" / "requests.jsonl").read_text().splitlines()
    assert len(lines) > sum(row.num_offered for row in outcome.rows)
    assert (tmp_path / "out" / TABLE_FILE).read_text().count("caller-1") == 2


async def test_the_command_shows_tables_of_a_running_gateway(chat_model: Path, tmp_path: Path) -> None:
    arguments = ["--rates", "5", "--bound-s", "3", "--duration-s", "1.5", "--max-new-tokens", "8"]
    async with running_system(chat_model, "ngram") as system:
        arguments += ["--gateway", system.address, "--out", str(tmp_path)]
        result = await asyncio.to_thread(CliRunner().invoke, bench, ["load", *arguments])
        assert await is_idle(system)
    assert result.exit_code == 0, result.output
    assert "Goodput at 5.00 requests/s is 1.00 of its peak" in result.output
    assert "caller-4" in result.output
    assert (tmp_path / "load.png").exists()
    rows = json.loads((tmp_path / RESULTS_FILE).read_text())["rows"]
    (row,) = rows
    assert row["multiple"] is None
    assert 0 < row["num_answered"] <= row["num_offered"]


def test_a_gateway_that_answers_nobody_is_an_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(bench, ["load", "--gateway", "127.0.0.1:1", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "does not answer" in result.output
