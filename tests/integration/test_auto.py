"""Method `auto` on real services: the same text, drafters that open when they are wanted."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from specdec.client import GenerateOptions, Generation
from specdec.contract.sampling import SamplingParams
from tests.integration.gated_drafter import eventually
from tests.systems import System, running_system

PROMPT = [72, 101, 108, 108, 111, 32, 72, 101, 108, 108, 111, 32]
OPTIONS = GenerateOptions(max_new_tokens=120, ignore_eos=True)


async def answer(system: System, method: str = "", **fields: object) -> Generation:
    return await system.client.generate(PROMPT, replace(OPTIONS, method=method, **fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=1.0, seed=4)], ids=str)
async def test_the_text_is_the_target_s_and_every_round_has_a_method(
    sampling: SamplingParams, tiny_llama: Path, noisy_llama: Path
) -> None:
    async with running_system(tiny_llama, "ngram", f"noisy=causal-lm:{noisy_llama}") as system:
        plain = await answer(system, "none", sampling=sampling)
        answers = [await answer(system, sampling=sampling) for _ in range(6)]
        info = await system.client.info()
    assert info.default_method == "auto"
    assert not plain.speculation.methods
    tried = set[str]()
    for found in answers:
        assert found.token_ids == plain.token_ids
        assert found.speculation.method == "auto"
        assert sum(each.num_rounds for each in found.speculation.methods) == found.speculation.num_rounds
        tried |= {each.method for each in found.speculation.methods}
    assert {"ngram", "noisy", "noisy+ngram"} <= tried, "what nobody tries nobody knows"
    assert tried <= {"none", "ngram", "noisy", "noisy+ngram"}


async def test_with_a_size_of_the_request_the_drafters_stay(tiny_llama: Path, noisy_llama: Path) -> None:
    async with running_system(tiny_llama, "ngram", f"noisy=causal-lm:{noisy_llama}") as system:
        found = await answer(system, "auto", draft_depth=2)
        plain = await answer(system, "auto", draft_depth=0)
    assert found.speculation.method == "noisy+ngram"
    assert found.speculation.num_draft_tokens > 0
    assert plain.speculation.num_draft_tokens == 0
    assert found.token_ids == plain.token_ids


async def test_without_a_drafter_it_is_plain_decoding(tiny_llama: Path) -> None:
    async with running_system(tiny_llama) as system:
        await system.drafter.host.stop(grace_s=0)
        found = await answer(system)
        plain = await answer(system, "none")
    assert found.token_ids == plain.token_ids


async def test_sessions_of_drafters_end_with_the_request(tiny_llama: Path, noisy_llama: Path) -> None:
    async with running_system(tiny_llama, "ngram", f"noisy=causal-lm:{noisy_llama}") as system:
        await asyncio.gather(*(answer(system) for _ in range(4)))
        host = system.drafter.servicer.host
        assert host is not None
        await eventually(lambda: host.num_sessions == 0)
