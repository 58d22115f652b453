"""A drafter that uses the target's embedding and LM head gets them, wherever it runs."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from specdec.client import GenerateOptions
from specdec.contract.errors import UnavailableError
from specdec.contract.target_state import TargetStateSpec
from specdec.local.processes import free_ports
from specdec.state.reader import StateReader
from specdec.state.weights import TargetWeights
from tests.state_probe import ProbeSession, StateProbe, state_reader, state_session
from tests.systems import running_system, running_verifier

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
PLAIN = GenerateOptions(max_new_tokens=24, ignore_eos=True, method="none")
READING = GenerateOptions(max_new_tokens=24, ignore_eos=True, method="probe", draft_depth=4)


@dataclass
class Seen:
    """What a drafter computed of the target's weights and of its last hidden state."""

    weights: list[TargetWeights] = field(default_factory=list)
    picks: list[int] = field(default_factory=list)
    anchors: list[int] = field(default_factory=list)

    def look(self, session: ProbeSession) -> None:
        """Pick the token after the last position that may be read: the anchor, which is committed."""
        assert session.target_weights is not None
        assert session.view is not None
        hidden = session.view.last_hidden(session.view.length - 1)
        self.weights.append(session.target_weights)
        self.picks.append(int(session.target_weights.logits(hidden).argmax()))
        self.anchors.append(session.token_ids[-1])


@pytest.mark.parametrize("mode", ["handle", "stream"])
async def test_hidden_states_and_weights_give_the_targets_own_pick(
    mode: str, tiny_llama: Path, tmp_path: Path
) -> None:
    seen = Seen()
    probe = StateProbe(TargetStateSpec(last_hidden_state=True), needs_weights=True, after_reading=seen.look)
    here = {"shared_dir": str(tmp_path)}
    async with running_system(
        tiny_llama,
        "probe",
        families=probe.families,
        verifier_options=here,
        drafter_options={**here, "target_state": mode, "target": str(tiny_llama)},
    ) as system:
        plain = await system.client.generate(PROMPT, PLAIN)
        result = await system.client.generate(PROMPT, READING)
        assert result.token_ids == plain.token_ids
        assert result.speculation.num_fallback_rounds == 0
        assert len(seen.picks) > 10
        assert seen.picks == seen.anchors
        reference = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        assert len({id(weights) for weights in seen.weights}) == 1
        assert torch.equal(seen.weights[0].lm_head, reference.lm_head.weight)
        assert torch.equal(seen.weights[0].embedding, reference.model.embed_tokens.weight)
        verifier = system.verifier.servicer.verifier
        assert verifier is not None
        shared = verifier.loaded.model.get_input_embeddings().weight
        # Mapped, it is the verifier's own memory.
        shared.data[5] += 1
        assert torch.equal(seen.weights[0].embedding[5], shared[5]) == (mode == "handle")


async def test_first_rounds_at_once_map_the_weights_once(tiny_llama: Path, tmp_path: Path) -> None:
    seen = Seen()
    probe = StateProbe(TargetStateSpec(last_hidden_state=True), needs_weights=True, after_reading=seen.look)
    here = {"shared_dir": str(tmp_path)}
    async with running_system(
        tiny_llama, "probe", families=probe.families, verifier_options=here, drafter_options=here
    ) as system:
        answers = (system.client.generate(PROMPT, READING) for _ in range(4))
        assert len({answer.token_ids for answer in await asyncio.gather(*answers)}) == 1
    assert len(seen.weights) > 10
    assert len({id(weights) for weights in seen.weights}) == 1


async def test_another_verifier_at_the_address_has_its_own_weights(
    tiny_llama: Path, noisy_llama: Path, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    spec, read = TargetStateSpec(last_hidden_state=True), []
    async with state_reader("handle", tmp_path) as reader:
        for model in (tiny_llama, noisy_llama):
            session = reader.open(spec, 64)
            async with running_verifier(model, listen=address, shared_dir=str(tmp_path)):
                read.append(await weights_of(reader, address))
                async with state_session(address, PROMPT, spec) as (_, ref):
                    await session.view(ref)
                    assert await reader.weights(address) is read[-1]
            await session.close()
    for weights, model in zip(read, (tiny_llama, noisy_llama), strict=True):
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        assert torch.equal(weights.lm_head, reference.lm_head.weight)


async def weights_of(reader: StateReader, address: str) -> TargetWeights:
    """Return the weights as soon as the reader has found that a verifier listens at the address again."""
    async with asyncio.timeout(20):
        while True:
            with suppress(UnavailableError):
                return await reader.weights(address)
            await asyncio.sleep(0.02)


async def test_a_drafter_that_can_get_none_says_how_it_could(tiny_llama: Path, tmp_path: Path) -> None:
    probe = StateProbe(TargetStateSpec(last_hidden_state=True), needs_weights=True)
    async with running_system(
        tiny_llama,
        "probe",
        families=probe.families,
        verifier_options={"shared_dir": str(tmp_path)},
        drafter_options={"shared_dir": str(tmp_path), "target_state": "stream"},
    ) as system:
        plain = await system.client.generate(PROMPT, PLAIN)
        result = await system.client.generate(PROMPT, READING)
    assert result.token_ids == plain.token_ids
    assert "--target MODEL" in result.speculation.fallback_reason
    assert result.speculation.num_draft_tokens == 0


async def test_weights_are_moved_once_however_many_ask_and_go_away(tiny_llama: Path, tmp_path: Path) -> None:
    async with running_verifier(tiny_llama, shared_dir=str(tmp_path)) as (_, server):
        verifier = server.servicer.verifier
        assert verifier is not None
        num_files = len(state_files(tmp_path))
        impatient = [asyncio.ensure_future(verifier.weights()) for _ in range(3)]
        await asyncio.sleep(0)
        for task in impatient[:2]:
            task.cancel()
        await asyncio.gather(*impatient, return_exceptions=True)
        first, second = await asyncio.gather(verifier.weights(), verifier.weights())
        assert first is second
        assert len(state_files(tmp_path)) == num_files + 1
    assert not state_files(tmp_path)


def state_files(directory: Path) -> list[Path]:
    """Return the files of shared memory below a directory."""
    return list(directory.rglob("*.state"))
