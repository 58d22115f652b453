"""`specdec bench transport`: which layers, how rows become tables, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from specdec.bench import transport, transport_needs, transport_report
from specdec.bench.cli import bench
from specdec.bench.geometry import GEOMETRIES, prepared_model
from specdec.bench.transport_needs import HANDLE, STREAM
from specdec.bench.transport_report import TransportRow
from specdec.contract.errors import InvalidArgumentError

ROWS = [
    TransportRow("m", "DFlash", HANDLE, 100, 500, 25.4, 60.0, 12.0, 102_400, 0.4, 0.1, 50, 102_400),
    TransportRow("m", "DFlash", STREAM, 100, 500, 812.6, 999.9, 9.0, 102_400, 12.345, 10.0, 50, 102_400),
]


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(30, (0, 7, 14, 21, 28)), (6, (0, 1, 2, 3, 4)), (4, (0, 1, 2)), (2, (0,))],
)
def test_layers_are_spread_over_all_but_the_last(num_layers: int, expected: tuple[int, ...]) -> None:
    assert transport_needs.dflash_layers(num_layers) == expected


def test_one_layer_is_too_few() -> None:
    with pytest.raises(InvalidArgumentError, match="single layer"):
        transport_needs.dflash_layers(1)


def test_a_percentile_is_one_of_the_values() -> None:
    assert transport.percentile(range(1, 11), 0.9) == 9
    assert transport.percentile([7], 0.9) == 7


def test_the_tables_say_the_same(tmp_path: Path) -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(transport_report.table(ROWS, round_tokens=5, prefill_tokens=1024))
    shown = console.export_text()
    written = transport_report.markdown(ROWS)
    for figure in ("25", "813", "1000", "102400", "12.35"):
        assert f" {figure} " in shown
        assert f" {figure} " in written
    assert "rounds of 5 new tokens, prefill of 1024" in shown
    assert len({line.count("|") for line in written.splitlines()[: len(ROWS) + 2]}) == 1

    transport_report.write(tmp_path / "out", ROWS, {"models": ["m"]})
    results = json.loads((tmp_path / "out" / transport_report.RESULTS_FILE).read_text())
    assert results["provenance"]["models"] == ["m"]
    assert [TransportRow(**row) for row in results["rows"]] == ROWS
    assert (tmp_path / "out" / transport_report.TABLE_FILE).read_text() == written


def test_a_model_that_is_no_geometry_is_served_as_it_is() -> None:
    with prepared_model("default") as model:
        assert model == "default"


def test_the_31b_geometry_has_the_state_sizes_of_the_model() -> None:
    config = GEOMETRIES["gemma4-31b-geometry"]()
    kv_elements = {
        kind: 2 * layer.num_key_value_heads * layer.head_dim
        for kind, layer in zip(config.layer_types, config.per_layer_config, strict=True)
    }
    assert kv_elements == {"sliding_attention": 2 * 16 * 256, "full_attention": 2 * 4 * 512}
    assert 2 * sum(kv_elements.values()) == 24_576  # bytes per token in bf16
    assert 2 * config.hidden_size * len(transport_needs.dflash_layers(config.num_hidden_layers)) == 53_760


@pytest.mark.parametrize("arguments", [["--models", ","], ["--verifier", "localhost:1", "--models", "a,b"]])
def test_models_that_cannot_be_measured_are_refused(tmp_path: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(bench, ["transport", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2 or "--models must name" in result.output
    assert not list(tmp_path.iterdir())
