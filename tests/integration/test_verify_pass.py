"""`specdec bench pass` drives a real verifier and leaves it as it was."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from specdec.bench import noise_cost, verify_pass
from specdec.contract.errors import FailedPreconditionError, InvalidArgumentError
from tests.integration.gated_drafter import eventually
from tests.peers_environment import NEEDS_OPENVINO
from tests.systems import running_verifier


async def test_rows_are_measured_in_the_order_asked_for(tiny_llama: Path, tmp_path: Path) -> None:
    progress: list[tuple[int, int]] = []
    async with running_verifier(tiny_llama) as (address, server):
        figures = await asyncio.to_thread(
            verify_pass.measure,
            address,
            sizes=[1, 5, 3],
            context_tokens=40,
            repeats=4,
            on_progress=lambda done, total: progress.append((done, total)),
        )
        verifier = server.servicer.verifier
        assert verifier
        await eventually(lambda: verifier.num_sessions == 0)
        assert verifier.pool.free_tokens == verifier.pool.capacity_tokens
    rows = figures.rows
    assert [row.num_tokens for row in rows] == [1, 5, 3]
    assert rows[0].relative_to_first == 1.0
    assert (rows[0].peer_ms_p50, rows[0].relative_to_peer, figures.peers) == ({}, {}, {})
    assert len(verify_pass.table(rows).columns) == 6
    for row in rows:
        assert 0 < row.compute_ms_p50 <= row.total_ms_p50 <= row.round_trip_ms_p50
    assert progress[-1][0] == progress[-1][1] == len(progress)

    verify_pass.write(tmp_path / "out", rows, {"model": "tiny"})
    written = json.loads((tmp_path / "out" / verify_pass.RESULTS_FILE).read_text())
    assert written["provenance"]["model"] == "tiny"
    assert [row["num_tokens"] for row in written["rows"]] == [1, 5, 3]


async def test_sizes_as_trees_too(tiny_llama: Path, tmp_path: Path) -> None:
    async with running_verifier(tiny_llama) as (address, _):
        figures = await asyncio.to_thread(
            verify_pass.measure, address, sizes=[1, 9], context_tokens=40, repeats=3, with_trees=True
        )
    rows = figures.rows
    assert [(row.num_tokens, row.shape) for row in rows] == [(1, "chain"), (9, "chain"), (9, "tree")]
    verify_pass.write(tmp_path, rows, {})
    assert (tmp_path / verify_pass.FIGURE_FILE).stat().st_size > 0


async def test_transformers_runs_the_same_passes_by_turns(tiny_llama: Path) -> None:
    async with running_verifier(tiny_llama) as (address, _):
        figures = await asyncio.to_thread(
            verify_pass.measure,
            address,
            sizes=[1, 4],
            context_tokens=20,
            repeats=3,
            model=str(tiny_llama),
            peers=["transformers"],
        )
    check_peer(figures, "transformers")
    assert figures.peers["transformers"]["precision"] == "float32"
    assert [column.header for column in verify_pass.table(figures.rows).columns][-1] == "step x transformers"


@pytest.mark.slow
@NEEDS_OPENVINO
async def test_openvino_and_transformers_run_the_same_passes_by_turns(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE_DIR", str(tmp_path))
    async with running_verifier(tiny_llama) as (address, _):
        figures = await asyncio.to_thread(
            verify_pass.measure,
            address,
            sizes=[1, 4],
            context_tokens=20,
            repeats=3,
            model=str(tiny_llama),
            peers=["openvino", "transformers"],
        )
    for peer in ("openvino", "transformers"):
        check_peer(figures, peer)
    assert [column.header for column in verify_pass.table(figures.rows).columns][-4:] == [
        "openvino ms",
        "step x openvino",
        "transformers ms",
        "step x transformers",
    ]


def check_peer(figures: verify_pass.PassFigures, peer: str) -> None:
    for row in figures.rows:
        ratio = row.compute_ms_p50 / row.peer_ms_p50[peer]
        assert 0.2 * ratio < row.relative_to_peer[peer] < 5 * ratio


async def test_the_peer_must_run_the_verifiers_model(tiny_llama: Path, noisy_llama: Path) -> None:
    async with running_verifier(tiny_llama) as (address, _):
        with pytest.raises(FailedPreconditionError, match="--model"):
            await asyncio.to_thread(
                verify_pass.measure,
                address,
                sizes=[1],
                context_tokens=5,
                repeats=1,
                model=str(noisy_llama),
                peers=["transformers"],
            )


async def test_a_refusal_is_a_typed_error(tiny_llama: Path) -> None:
    async with running_verifier(tiny_llama) as (address, _):
        with pytest.raises(InvalidArgumentError, match="context"):
            await asyncio.to_thread(verify_pass.measure, address, sizes=[1], context_tokens=5000, repeats=1)


def test_the_noise_of_a_round_is_timed() -> None:
    assert min(noise_cost.measure(num_positions=2, vocab_size=100, repeats=3)) > 0
