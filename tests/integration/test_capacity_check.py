"""`specdec bench capacity-check` over real services of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from specdec.bench.cli import bench


@pytest.mark.slow
def test_a_check_over_real_services(tiny_llama: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(tiny_llama), "--dtype", "float32", "--methods", "ngram", "--concurrency", "2"]
    arguments += ["--limit", "2", "--max-new-tokens", "8", "--repeats", "1", "--draft-depth", "2"]
    result = CliRunner().invoke(bench, ["capacity-check", *arguments, "--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    assert "ngram@2" in result.stdout
    document = json.loads((tmp_path / "new" / "capacity-check.json").read_text())
    systems = [(row["method"], row["num_drafters"], row["concurrency"]) for row in document["rows"]]
    sizes = [(1, 1), (1, 2), (2, 2)]
    assert systems == [(method, *size) for size in sizes for method in ("none", "ngram@2")]
    for row in document["rows"]:
        assert row["predicted_tokens_per_s"] > 0
        assert min(row["tokens_per_s"]) > 0
