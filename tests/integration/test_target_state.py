"""A drafter reads what the target computed, the same whichever way it comes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from specdec.client import GenerateOptions
from specdec.contract.target_state import StateStorage, TargetStateSpec, hidden_name, key_name, value_name
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.state.view import Projection
from tests.raw_streams import until
from tests.refusals import shared
from tests.slow import quick_only
from tests.state_probe import (
    Followed,
    Reading,
    StateProbe,
    all_of,
    assert_never_changed,
    assert_same,
    follow,
    random_projection,
    scattered,
    state_reader,
)
from tests.systems import running_system, running_verifier
from tests.tiny_models import FAMILIES, QUICK_FAMILIES, save_tiny_model
from verifier_service.server import VerifierServer

PROMPTS = {
    "short": [5, 6, 7, 5, 6, 7, 5, 6],
    "past a block": [(7 * i) % 250 for i in range(BLOCK_TOKENS + 9)],
    "in two chunks": [(11 * i + i // 9) % 250 for i in range(2 * BLOCK_TOKENS + 25)],
}
HIDDEN_SIZE = 32
TOLERANCE = 2e-3
MODES = [("handle", StateStorage.SHARED_MEMORY), ("stream", StateStorage.STREAM)]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.04}
"""What a projection of the same hidden states may differ by when other positions are computed beside it."""


@dataclass(frozen=True)
class Target:
    """A verifier of one family, and the same model as transformers runs it."""

    family: str
    address: str
    server: VerifierServer
    shared_dir: Path
    reference: PreTrainedModel


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=quick_only(FAMILIES, QUICK_FAMILIES))
async def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Target]:
    folder = tmp_path_factory.mktemp("target-state")
    model = save_tiny_model(folder / "model", request.param)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    async with running_verifier(model, kv_cache_mib=1.0, shared_dir=str(folder)) as (address, server):
        yield Target(request.param, address, server, folder, reference)


def computed_by_transformers(model: PreTrainedModel, token_ids: list[int]) -> dict[str, Tensor]:
    """Return every tensor that a drafter could ask for, from one plain pass over all tokens."""
    cache = DynamicCache()  # without the model's configuration it also keeps what is outside the window
    with torch.inference_mode():
        output = model.get_decoder()(
            torch.tensor([token_ids]), past_key_values=cache, use_cache=True, output_hidden_states=True
        )
    *inner, last = output.hidden_states[1:]
    assert torch.equal(last, output.last_hidden_state)
    tensors = {hidden_name(layer): hidden[0] for layer, hidden in enumerate(inner)}
    tensors["last_hidden"] = last[0]
    for index, layer in enumerate(cache.layers):
        tensors[key_name(index)] = layer.keys[0].transpose(0, 1)
        tensors[value_name(index)] = layer.values[0].transpose(0, 1)
    return tensors


def assert_right(reading: Reading, model: PreTrainedModel, token_ids: list[int]) -> None:
    """Check that the reading is what transformers computes for the tokens."""
    computed = computed_by_transformers(model, token_ids[: reading.length])
    # Of the last layer transformers keeps the normed state only.
    last = hidden_name(model.config.num_hidden_layers - 1)
    with torch.inference_mode():
        normed = model.get_decoder().norm(reading.tensors[last])
    for name, tensor in (reading.tensors | {last: normed}).items():
        wanted = computed["last_hidden" if name == last else name][reading.first.get(name, 0) :]
        assert tensor.shape == wanted.shape, name
        torch.testing.assert_close(tensor, wanted, atol=TOLERANCE, rtol=TOLERANCE, msg=f"{name} differs")


@shared
@pytest.mark.parametrize("is_scattered", [False, True], ids=["run", "scattered"])
@pytest.mark.parametrize("with_trees", [False, True], ids=["chains", "trees"])
@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
async def test_handle_and_stream_give_the_same_bits_and_they_are_right(
    target: Target, prompt: list[int], with_trees: bool, is_scattered: bool
) -> None:
    verifier = target.server.servicer.verifier
    assert verifier is not None
    spec = all_of(target.family)
    async with (
        state_reader("handle", target.shared_dir) as by_handle,
        state_reader("stream", target.shared_dir) as by_stream,
    ):
        with scattered(verifier.pool) if is_scattered else nullcontext():
            followed = await follow(
                target.address, prompt, spec, [by_handle, by_stream], with_trees=with_trees
            )
    assert bool(followed.num_moved) == with_trees
    mapped, streamed = followed.readings
    assert followed.num_accepted > 0
    assert followed.num_refused > 0
    assert mapped[-1].length == len(followed.token_ids) - 1
    assert mapped[0].length == len(prompt)
    for reading, other in zip(mapped, streamed, strict=True):
        assert_same(reading, other)
    assert_never_changed(mapped)
    # What every round saw is a prefix of what the last one saw.
    assert_right(mapped[-1], target.reference, followed.token_ids)
    assert mapped[-1].tensors.keys() == {
        *map(hidden_name, spec.hidden_layer_ids),
        "last_hidden",
        *map(key_name, spec.kv_layer_ids),
        *map(value_name, spec.kv_layer_ids),
    }
    await until(lambda: verifier.pool.free_tokens == verifier.pool.capacity_tokens)


async def follow_projected(
    address: str, shared_dir: Path, prompt: list[int], dtype: torch.dtype
) -> tuple[Followed, Projection]:
    """Follow a session that is read by handle, streamed raw, and streamed as the verifier projects it."""
    projection = random_projection(2, HIDDEN_SIZE, 48, dtype)
    spec = TargetStateSpec((0, 2), True, (1,), True, projection.info)
    async with (
        state_reader("handle", shared_dir) as by_handle,
        state_reader("stream", shared_dir) as raw,
        state_reader("stream", shared_dir, stream_projected=True) as projected,
    ):
        readers = [by_handle, raw, projected]
        return await follow(address, prompt, spec, readers, projection=projection), projection


def assert_projections_agree(followed: Followed, dtype: torch.dtype) -> None:
    """Check that a projection made here equals one made there, and that all else is equal bit for bit."""
    for mapped, raw, projected in zip(*followed.readings, strict=True):
        assert_same(mapped, raw)
        wanted, actual = mapped.tensors.pop("projected"), projected.tensors.pop("projected")
        assert_same(mapped, projected)
        assert wanted.dtype == actual.dtype == dtype
        assert wanted.shape == actual.shape == (mapped.length, 48)
        assert wanted.abs().amax() > 0.5
        torch.testing.assert_close(actual, wanted, atol=ROUNDING[dtype], rtol=ROUNDING[dtype])


@shared
@pytest.mark.parametrize("is_scattered", [False, True], ids=["run", "scattered"])
async def test_the_verifier_projects_as_the_drafter_would(target: Target, is_scattered: bool) -> None:
    verifier = target.server.servicer.verifier
    assert verifier is not None
    prompt = PROMPTS["in two chunks"] * 2  # more positions than are projected in one step
    with scattered(verifier.pool) if is_scattered else nullcontext():
        followed, projection = await follow_projected(
            target.address, target.shared_dir, prompt, torch.float32
        )
    last = followed.readings[0][-1]
    computed = computed_by_transformers(target.reference, followed.token_ids[: last.length])
    features = torch.cat([computed[hidden_name(layer)] for layer in (0, 2)], dim=-1)
    product = features @ projection.fc.T
    wanted = product / (product.square().mean(-1, keepdim=True) + 1e-6).sqrt() * projection.norm
    torch.testing.assert_close(last.tensors["projected"], wanted, atol=TOLERANCE, rtol=TOLERANCE)
    assert_projections_agree(followed, torch.float32)
    # The verifier keeps projections: a second session finds it there.
    assert verifier.export.projection(projection.info.sha256).info == projection.info


@pytest.mark.parametrize("family", ["llama", "gemma4"])
async def test_bfloat16_state_is_the_same_either_way(family: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", family)
    options = {"dtype": "bfloat16", "kv_cache_mib": 1.0, "shared_dir": str(tmp_path)}
    async with running_verifier(model, **options) as (address, _):
        spec = all_of(family)
        async with (
            state_reader("handle", tmp_path) as by_handle,
            state_reader("stream", tmp_path) as streamed,
        ):
            followed = await follow(address, PROMPTS["past a block"], spec, [by_handle, streamed])
        for mapped, mirrored in zip(*followed.readings, strict=True):
            assert_same(mapped, mirrored)
            assert {tensor.dtype for tensor in mapped.tensors.values()} == {torch.bfloat16}
        assert_never_changed(followed.readings[0])
        followed, _ = await follow_projected(address, tmp_path, PROMPTS["past a block"], torch.bfloat16)
        assert_projections_agree(followed, torch.bfloat16)


@pytest.mark.parametrize(("mode", "storage"), MODES)
async def test_a_generation_with_a_drafter_that_reads_state(
    mode: str, storage: StateStorage, tiny_llama: Path, tmp_path: Path
) -> None:
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    probe = StateProbe(all_of("llama"))
    options = {"shared_dir": str(tmp_path)}
    async with running_system(
        tiny_llama,
        "probe",
        families=probe.families,
        verifier_options=options,
        drafter_options={**options, "target_state": mode},
    ) as system:
        prompt = PROMPTS["past a block"]
        plain = await system.client.generate(prompt, GenerateOptions(method="none", max_new_tokens=60))
        probe.expected = plain.token_ids
        result = await system.client.generate(
            prompt, GenerateOptions(method="probe", draft_depth=4, max_new_tokens=60)
        )
    assert result.token_ids == plain.token_ids
    assert result.speculation.num_fallback_rounds == 0
    assert 0 < result.speculation.num_accepted_tokens < result.speculation.num_draft_tokens
    (session,) = probe.sessions
    assert session.storages == {storage}
    assert len(session.readings) > 3
    assert session.readings[0].length == len(prompt)
    assert_never_changed(session.readings)
    assert_right(session.readings[-1], reference, [*prompt, *result.token_ids])
