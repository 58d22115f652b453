"""`specdec bench telemetry`: ratios by hand-made samples, and a run over real systems of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest
from click.testing import CliRunner

from specdec.bench.cli import bench
from specdec.bench.telemetry_cost import TelemetryConfig
from specdec.bench.telemetry_report import CONTROL, OFF, ON, RequestTime, ratio


def samples(*factors: tuple[float, ...]) -> list[RequestTime]:
    """Return samples of prompts of very different speed; `factors` says for each restart how much longer ON
    takes.
    """
    return [
        RequestTime(restart, arm, question_id, base_ms * (factor if arm == ON else 1.0))
        for restart, of_restart in enumerate(factors)
        for question_id, factor in enumerate(of_restart)
        for base_ms in [10.0 * (1 + question_id) * (2 + restart)]
        for arm in (OFF, CONTROL, ON)
    ]


def test_the_ratio_is_of_pairs_not_of_means() -> None:
    found = ratio(samples((1.01, 1.02, 1.03), (1.02, 1.02, 1.02)), ON)
    assert found.median == pytest.approx(1.02)
    assert 1.01 <= found.low <= found.median <= found.high <= 1.03
    assert found.num_pairs == 6


def test_the_same_twice_is_one() -> None:
    found = ratio(samples((1.5, 1.5), (1.5, 1.5)), CONTROL)
    assert (found.median, found.low, found.high) == (1.0, 1.0, 1.0)


def test_restarts_that_differ_widen_the_interval() -> None:
    alike = ratio(samples(*[(0.99, 1.0, 1.01, 1.02)] * 4), ON)
    apart = ratio(samples((0.99,) * 4, (1.0,) * 4, (1.01,) * 4, (1.02,) * 4), ON)
    assert apart.high - apart.low > alike.high - alike.low


def test_drafters_are_those_of_the_method() -> None:
    assert TelemetryConfig(method="mtp+ngram").drafters == ("mtp", "ngram")
    assert TelemetryConfig(method="none").drafters == ("ngram",)


@pytest.mark.slow
def test_a_run_over_real_systems(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")  # the caller's own settings change nothing
    arguments = ["--model", str(tiny_llama), "--dtype", "float32", "--out", str(tmp_path / "new")]
    arguments += ["--prompts", "2", "--restarts", "1", "--max-new-tokens", "8", "--scrape-interval-s", "0.5"]
    result = CliRunner().invoke(bench, ["telemetry", *arguments])
    assert result.exit_code == 0, result.output
    written = json.loads((tmp_path / "new" / "telemetry.json").read_text())
    taken = {(sample["arm"], sample["question_id"]) for sample in written["samples"]}
    assert len(taken) == len(written["samples"]) == 6
    assert all(sample["tpot_ms"] > 0 for sample in written["samples"])
    assert written["provenance"]["draft_depth"] == 3
    for name, label in (("control_over_off", "off again / off"), ("on_over_off", "on / off")):
        assert written[name]["low"] <= written[name]["median"] <= written[name]["high"]
        assert f"{label}: {written[name]['median']:.4f}" in result.output
    costs = {(cost["arm"], cost["service"]): cost["cpu_ms_per_token"] for cost in written["costs"]}
    assert len(costs) == 9
    assert all(cost > 0 for cost in costs.values())
    assert f"CPU ms a token, gateway: {costs['off', 'gateway']:.3f} off" in result.output
    usual_ms = median(sample["tpot_ms"] for sample in written["samples"] if sample["arm"] == "off")
    assert result.output.count(f"of a TPOT of {usual_ms:.1f} ms") == 3
