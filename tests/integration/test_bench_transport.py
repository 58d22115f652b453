"""`specdec bench transport` over a real verifier: sizes are what the geometry says, data is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec.bench import transport
from specdec.bench.transport import TransportConfig
from specdec.bench.transport_needs import HANDLE, STREAM
from specdec.contract.errors import FailedPreconditionError, UnavailableError
from tests.integration.gated_drafter import eventually
from tests.systems import running_verifier
from tests.tiny_models import save_tiny_model

PREFILL, ROUND, REPEATS = 40, 5, 3
NUM_ROUNDS = REPEATS + 5
"""Rounds of a session, those before the first measured one included."""
FLOAT_BYTES, HIDDEN_SIZE = 4, 32
HIDDEN = FLOAT_BYTES * HIDDEN_SIZE
KV = FLOAT_BYTES * (2 * 2 * 8 + 2 * 1 * 16)
"""K and V of a sliding layer with 2 heads of 8, and of a full layer with 1 head of 16."""


@pytest.fixture(scope="module")
def tiny_gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-gemma4", "gemma4")


def config(model: Path, shared_dir: Path) -> TransportConfig:
    return TransportConfig(
        model=str(model),
        shared_dir=str(shared_dir),
        prefill_tokens=PREFILL,
        round_tokens=ROUND,
        prefills=2,
        repeats=REPEATS,
    )


async def test_sizes_are_those_of_the_geometry_and_both_give_the_same(
    tiny_gemma: Path, tmp_path: Path
) -> None:
    progress: list[tuple[int, int]] = []
    async with running_verifier(tiny_gemma, shared_dir=str(tmp_path)) as (address, server):
        rows = await transport.measure(
            address, config(tiny_gemma, tmp_path), lambda done, total: progress.append((done, total))
        )
        verifier = server.servicer.verifier
        assert verifier
        await eventually(lambda: verifier.num_sessions == 0 and verifier.export.num_streams == 0)
        assert verifier.pool.free_tokens == verifier.pool.capacity_tokens
    assert [(row.state, row.transport, row.bytes_per_token) for row in rows] == [
        ("MTP", HANDLE, KV + HIDDEN),
        ("MTP", STREAM, KV + HIDDEN),
        ("DFlash", HANDLE, 3 * HIDDEN),
        ("DFlash", STREAM, 3 * HIDDEN),
        ("DFlash projected", STREAM, HIDDEN),
    ]
    length = PREFILL + NUM_ROUNDS * ROUND
    for row in rows:
        assert row.model == tiny_gemma.name
        assert row.bytes_per_round == ROUND * row.bytes_per_token
        assert row.prefill_bytes == PREFILL * row.bytes_per_token
        assert row.num_rounds == REPEATS
        assert 0 < row.round_us_p50 <= row.round_us_p90
        assert min(row.read_us_p50, row.prefill_ms_p50, row.again_ms_p50) > 0
        has_other = row.state != "DFlash projected"
        # Of the layer with a window of 16, the positions that its drafter still sees.
        num_gone = (length - 17) * (KV // 2) if row.state == "MTP" else 0
        assert row.num_compared_bytes == (length * row.bytes_per_token - num_gone if has_other else 0)
    assert progress == [(done, 5) for done in range(6)]


async def test_another_model_than_the_verifiers_is_refused(
    tiny_gemma: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    async with running_verifier(tiny_llama, shared_dir=str(tmp_path)) as (address, _):
        with pytest.raises(FailedPreconditionError, match="wants model"):
            await transport.measure(address, config(tiny_gemma, tmp_path))


async def test_a_verifier_without_handles_cannot_be_measured(tiny_gemma: Path, tmp_path: Path) -> None:
    async with running_verifier(tiny_gemma, target_state="stream") as (address, _):
        with pytest.raises(FailedPreconditionError, match="offers no handle"):
            await transport.measure(address, config(tiny_gemma, tmp_path))


async def test_no_verifier_is_a_typed_error(tiny_gemma: Path, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError):
        await transport.measure("127.0.0.1:1", config(tiny_gemma, tmp_path))
