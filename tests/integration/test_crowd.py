"""More requests at once than the verifier has KV for: all finish, and each answer is what it is alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from specdec.client import GenerateOptions
from specdec.contract.sampling import SamplingParams
from tests.integration.gated_drafter import eventually
from tests.integration.test_waiting import nothing_is_held
from tests.systems import System, running_system
from tests.tiny_models import save_tiny_model

_BYTES_PER_TOKEN = 512
"""KV of a token of the tiny Llama in fp32."""
_SPARE_TOKENS = 64
"""What a session may need besides its text: the nodes of a draft, and the rest of its last block."""


@dataclass(frozen=True)
class Crowd:
    """Requests that come at once: some have the same prompt and seed, and are answered alike."""

    num_requests: int
    num_tokens: int
    """Length of each answer."""
    num_fitting: int
    """How many of the requests the pool has room for."""
    num_kinds: int = 4
    """How many different requests there are."""

    def options(self, number: int) -> GenerateOptions:
        """Return what a request asks for: by turns greedy and sampled, and with drafts and without."""
        kind = number % self.num_kinds
        return GenerateOptions(
            method="ngram" if number // self.num_kinds % 2 else "none",
            max_new_tokens=self.num_tokens,
            ignore_eos=True,
            sampling=SamplingParams(temperature=0.9, seed=kind) if kind % 2 else SamplingParams(),
        )

    def prompt(self, number: int) -> list[int]:
        return [5 + number % self.num_kinds, 6, 7]

    @asynccontextmanager
    async def system(self, folder: Path) -> AsyncIterator[System]:
        """Run a system with a pool for so many of the requests."""
        longest = self.num_tokens + _SPARE_TOKENS
        model = save_tiny_model(folder, max_position_embeddings=longest)
        kv_cache_mib = self.num_fitting * longest * _BYTES_PER_TOKEN / 2**20
        async with running_system(model, "ngram", verifier_options={"kv_cache_mib": kv_cache_mib}) as system:
            yield system


@pytest.mark.parametrize(
    "crowd",
    [
        Crowd(num_requests=12, num_tokens=96, num_fitting=2),
        pytest.param(
            Crowd(num_requests=40, num_tokens=2048, num_fitting=6),
            marks=[pytest.mark.slow, pytest.mark.timeout(1200)],
        ),
    ],
    ids=["small", "long"],
)
async def test_a_crowd_is_answered_as_each_would_be_alone(crowd: Crowd, tmp_path: Path) -> None:
    async with crowd.system(tmp_path) as system:
        verifier = system.verifier.servicer.verifier
        assert verifier
        assert crowd.num_fitting <= verifier.pool.capacity_tokens // crowd.num_tokens < crowd.num_requests / 3

        async def ask(number: int, options: GenerateOptions) -> tuple[int, ...]:
            answer = await system.client.generate(crowd.prompt(number), options, timeout_s=None)
            return answer.token_ids

        alone = [
            await ask(kind, replace(crowd.options(kind), method="none")) for kind in range(crowd.num_kinds)
        ]
        together = await asyncio.gather(
            *(ask(number, crowd.options(number)) for number in range(crowd.num_requests))
        )
        assert {len(token_ids) for token_ids in together} == {crowd.num_tokens}
        assert together == [alone[number % crowd.num_kinds] for number in range(crowd.num_requests)]
        await eventually(lambda: nothing_is_held(system))
