"""What becomes of a stream whose session ends while the engine is busy."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.target_state import ProjectionInfo, TargetStateSpec
from specdec.runtime.packed_model import PackedModel
from tests.state_probe import random_projection
from verifier_service.state_export import StateExport
from verifier_service.state_stream import StateChunk

PROJECTION = random_projection(2, 32, 48, torch.float32)
SPEC = TargetStateSpec((0, 2), projection=PROJECTION.info)


class BusyEngine:
    """Runs what it is given once it may."""

    def __init__(self) -> None:
        self.is_asked = asyncio.Event()
        self.may_run = asyncio.Event()
        self.may_run.set()

    async def __call__(self, function: Callable[[], Any], num_tokens: int = 0) -> Any:
        self.is_asked.set()
        await self.may_run.wait()
        return function()


@pytest.mark.parametrize("ends", [False, True], ids=["goes on", "ends"])
async def test_rows_projected_after_the_session_ended_are_not_sent(ends: bool, tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    packed, engine = PackedModel(model, kv_budget_bytes=1 << 20), BusyEngine()
    export = StateExport(
        packed.pool,
        packed.capture,
        dict.fromkeys(packed.pool.keys, "full_attention"),
        uri="",
        max_hidden_layers=2,
        run_on_engine=engine,
    )
    state = await export.open(SPEC, packed.pool.allocate(8))
    state.advance(8)
    engine.may_run.clear()
    engine.is_asked.clear()
    chunks = export.stream(state, 0, PROJECTION)
    next_chunk: asyncio.Future[StateChunk | None] = asyncio.ensure_future(anext(chunks, None))
    await asyncio.wait_for(engine.is_asked.wait(), 10)
    assert export.num_streams == 1
    if ends:
        export.close(state)
        packed.pool.free(state.allocation)
    engine.may_run.set()
    chunk = await asyncio.wait_for(next_chunk, 10)
    if ends:
        assert chunk is None
    else:
        assert chunk is not None
        assert (chunk.start, chunk.stop, list(chunk.rows)) == (0, 8, ["projected"])
        assert len(chunk.rows["projected"]) == 8 * 48 * 4
    await chunks.aclose()
    assert export.num_streams == 0


class WideCapture:
    """Hidden states of a target far wider than tests can run."""

    hidden_size = 16384

    def check(self, name: str) -> None:
        """Accept every layer."""


async def test_a_projection_too_large_to_keep_is_refused_with_the_session(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    packed, capture = PackedModel(model, kv_budget_bytes=1 << 20), WideCapture()
    export = StateExport(
        packed.pool,
        capture,  # type: ignore[arg-type]
        dict.fromkeys(packed.pool.keys, "full_attention"),
        uri="",
        max_hidden_layers=2,
        run_on_engine=BusyEngine(),
    )
    size = WideCapture.hidden_size
    wide = ProjectionInfo("0" * 64, 2 * size, 4 * size, 1e-6, "float32")
    with pytest.raises(InvalidArgumentError, match="8192 MiB; at most 1024 MiB"):
        await export.open(TargetStateSpec((0, 2), projection=wide), packed.pool.allocate(8))
    assert export.num_sessions == 0


@pytest.mark.parametrize(
    ("layers", "served", "refused"),
    [
        ([(0,), (1,), (0, 1)], (0, 1, 2), {}),
        ([(0,), (1,), (2,)], (0, 1), {2: "keeps at most 2"}),
        ([(0, 1), (2,), (3,)], (1, 2), {0: "keeps at most 2"}),
        ([(9,), (0,), (9, 1), (1,)], (1, 3), {0: "hidden.9", 2: "hidden.9"}),
        ([(9,)], (), {0: "hidden.9"}),
        ([], (), {}),
    ],
)
async def test_as_many_drafters_are_served_as_can_be(
    layers: list[tuple[int, ...]], served: tuple[int, ...], refused: dict[int, str], tiny_llama: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    packed = PackedModel(model, kv_budget_bytes=1 << 20)
    export = StateExport(
        packed.pool,
        packed.capture,
        dict.fromkeys(packed.pool.keys, "full_attention"),
        uri="",
        max_hidden_layers=2,
        run_on_engine=BusyEngine(),
    )
    specs = [TargetStateSpec(layer_ids) for layer_ids in layers]
    state, refusals = await export.open_for(specs, packed.pool.allocate(8))
    assert {index for index, refusal in enumerate(refusals) if not refusal} == set(served)
    assert all(fragment in refusals[index] for index, fragment in refused.items())
    assert export.num_sessions == bool(served)
    if state:
        assert set(state.spec.hidden_layer_ids) == {layer for index in served for layer in layers[index]}
