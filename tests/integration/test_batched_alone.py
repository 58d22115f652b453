"""What a session gets does not depend on who shares its steps: batched with others, prefill chunks and rounds
mixed, each gets exactly the tokens it gets alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from specdec.contract.draft_tree import DraftTree
from specdec.contract.sampling import SamplingParams
from specdec.runtime.loading import load_causal_lm
from tests.slow import quick_only
from tests.state_probe import scattered
from tests.tiny_models import FAMILIES, QUICK_FAMILIES, VOCAB_SIZE, save_tiny_model
from tests.trees import random_tree
from verifier_service.config import VerifierConfig
from verifier_service.session import OpenRequest
from verifier_service.target_model import PrefillChunk, TargetModel, VerifyItem
from verifier_service.verifier import Verifier

MAX_CHUNK_TOKENS = 64
EDGES = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129]
"""Prompt lengths at and around the sliding window (16) and the blocks of the pool (64)."""

samplings = st.one_of(
    st.just(SamplingParams()),
    st.builds(SamplingParams, temperature=st.just(1.0), seed=st.integers(0, 2**32)),
    st.builds(
        SamplingParams,
        temperature=st.just(0.7),
        top_p=st.just(0.9),
        top_k=st.just(50),
        seed=st.integers(0, 9),
    ),
)


@dataclass(frozen=True)
class Plan:
    """One session: what is asked for, and the seed of its drafts and pauses."""

    prompt_length: int
    max_new_tokens: int
    sampling: SamplingParams
    seed: int

    def request(self) -> OpenRequest:
        prompt = tuple(Random(self.seed).randrange(VOCAB_SIZE - 4) for _ in range(self.prompt_length))
        return OpenRequest(prompt, self.max_new_tokens, self.sampling, ignore_eos=self.seed % 2 == 0)


plans = st.builds(
    Plan, st.sampled_from(EDGES), st.integers(1, 40), samplings, st.integers(min_value=0, max_value=2**32)
)


MIXED = [
    Plan(1, 40, SamplingParams(), 2),
    Plan(15, 40, SamplingParams(temperature=1.0, seed=3), 4),
    Plan(63, 40, SamplingParams(), 6),
    Plan(129, 20, SamplingParams(temperature=1.0, seed=5), 8),
    Plan(100, 40, SamplingParams(), 10),
]
"""Short prompts decode while long ones are read."""


@dataclass(frozen=True)
class Setup:
    verifier: Verifier
    steps: list[tuple[int, int]]
    """Rounds and prefill chunks of every step so far."""


@pytest.fixture(scope="module", params=quick_only(FAMILIES, QUICK_FAMILIES))
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    folder = save_tiny_model(tmp_path_factory.mktemp("batched"), request.param)
    config = VerifierConfig(
        model=str(folder),
        dtype="float32",
        kv_cache_mib=8.0,
        prefill_chunk_tokens=MAX_CHUNK_TOKENS,
        max_batch_tokens=2 * MAX_CHUNK_TOKENS,
        target_state="stream",
    )
    steps: list[tuple[int, int]] = []
    run_step = TargetModel.step

    def step(self: TargetModel, items: Sequence[Any]) -> Sequence[Any]:
        counts = [sum(isinstance(item, kind) for item in items) for kind in (VerifyItem, PrefillChunk)]
        steps.append((counts[0], counts[1]))
        return run_step(self, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TargetModel, "step", step)
        verifier = Verifier(load_causal_lm(str(folder), dtype="float32", device="cpu"), config)
    yield Setup(verifier, steps)
    verifier.close()


async def decode(verifier: Verifier, plan: Plan, expected: Sequence[int] | None) -> list[int]:
    """Return a session's output. With `expected`, drafts are made of it, chains and trees, right up to some
    point, with pauses between the rounds; without it, there are neither drafts nor pauses.
    """
    random = Random(plan.seed)
    if expected is not None:
        await asyncio.sleep(random.choice([0, 0.002, 0.01]))
    async with verifier.open(plan.request()) as session:
        await verifier.prefill(session)
        while not session.finish_reason:
            draft: list[int] = []
            if expected is not None:
                done = session.committed_length - plan.prompt_length
                draft = [*expected[done : done + random.choice([0, 1, 2, 4, 8, 20])]]
                if random.random() < 0.6:
                    right = random.randint(0, len(draft))
                    draft[right:] = [random.randrange(VOCAB_SIZE) for _ in range(random.randint(1, 9))]
                await asyncio.sleep(random.choice([0, 0, 0.001, 0.004]))
            tree = DraftTree.of(draft)
            if expected is not None and random.random() < 0.5:
                tree = random_tree(random, draft, num_wrong=random.choice([1, 5, 30]), vocab_size=VOCAB_SIZE)
            await verifier.verify(session, session.committed_length, tree.token_ids, tree.parent_indices)
        return session.token_ids[plan.prompt_length :]


@pytest.mark.parametrize("num_examples", quick_only([2, 8], [2]))
def test_a_session_gets_in_a_batch_what_it_gets_alone(num_examples: int, setup: Setup) -> None:
    verifier, config = setup.verifier, setup.verifier.config
    shared_steps: list[tuple[int, int]] = []

    async def together(sessions: Sequence[Plan], expected: Sequence[list[int]]) -> list[list[int]]:
        return await asyncio.gather(
            *(decode(verifier, plan, ids) for plan, ids in zip(sessions, expected, strict=True))
        )

    @settings(max_examples=num_examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        sessions=st.lists(plans, min_size=2, max_size=6),
        chunk=st.sampled_from([5, 16, 33, MAX_CHUNK_TOKENS]),
        is_scattered=st.booleans(),
    )
    @example(sessions=MIXED, chunk=5, is_scattered=True)
    @example(sessions=MIXED, chunk=33, is_scattered=False)
    def check(sessions: list[Plan], chunk: int, is_scattered: bool) -> None:
        verifier.config = config
        alone = [asyncio.run(decode(verifier, plan, None)) for plan in sessions]
        verifier.config = replace(config, prefill_chunk_tokens=chunk)
        num_steps_before = len(setup.steps)
        with scattered(verifier.pool) if is_scattered else nullcontext():
            assert asyncio.run(together(sessions, alone)) == alone
        assert verifier.pool.free_tokens == verifier.pool.capacity_tokens
        shared_steps.extend(setup.steps[num_steps_before:])

    check()
    assert any(num_rounds > 1 for num_rounds, _ in shared_steps)
    assert any(num_chunks > 1 for _, num_chunks in shared_steps)
    assert any(num_rounds and num_chunks for num_rounds, num_chunks in shared_steps)
