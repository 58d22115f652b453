"""Draft trees on a Verify stream: the same tokens as one at a time, and the longest right path accepted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from specdec.contract.draft_tree import DraftTree
from specdec.contract.sampling import SamplingParams
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.v1 import verifier_pb2
from tests.raw_streams import output_of, run_session, until, verify_stream
from tests.systems import running_verifier
from tests.tiny_models import VOCAB_SIZE, save_tiny_model
from tests.trees import one_path, random_tree

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=1.0, top_p=0.9, seed=3),
    SamplingParams(presence_penalty=2.0, frequency_penalty=1.0),
    SamplingParams(temperature=1.2, repetition_penalty=1.5, min_p=0.01, seed=2**64 - 1),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["llama", "gemma3", "gemma4"])
async def address(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[str]:
    """Run a verifier of each family in turn, two of them with windows of 16 tokens; yield its address, and
    check at the end that its pool is whole.
    """
    model = save_tiny_model(tmp_path_factory.mktemp("target"), request.param)
    async with running_verifier(model) as (address, server):
        yield address
        verifier = server.servicer.verifier
        assert verifier is not None
        await until(lambda: verifier.num_sessions == 0)
        assert verifier.pool.free_tokens == verifier.pool.capacity_tokens


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
async def test_any_tree_commits_the_same_tokens(sampling: SamplingParams, address: str) -> None:
    options = {"max_new_tokens": 90, "ignore_eos": True, "sampling": sampling.to_proto()}
    plain = await run_session(address, PROMPT, num_top_logprobs=2, **options)
    output = [result.bonus_token_id for result in plain]
    rng = random.Random(str(sampling))
    async with verify_stream(address) as stream:
        result = await stream.open(PROMPT, num_top_logprobs=2, draft_nodes=40, **options)
        logprobs, num_moved = list(result.logprobs), 0
        while not result.finish_reason:
            done = len(stream.token_ids) - len(PROMPT)
            right = output[done : done + rng.randrange(6)]
            tree = random_tree(rng, right, num_wrong=rng.choice([0, 3, 30]), vocab_size=VOCAB_SIZE)
            result = await stream.round(tree.token_ids, parents=tree.parent_indices)
            logprobs += result.logprobs
            num_moved += bool(result.accepted_node_indices)
            # By chance a wrong node may be right where the right path ends.
            assert result.num_accepted_tokens >= min(len(right), len(output) - done - 1)
        assert stream.token_ids[len(PROMPT) :] == output
        assert num_moved > 0
    for ours, theirs in zip(
        logprobs, (logprob for result in plain for logprob in result.logprobs), strict=True
    ):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert [top.token_id for top in ours.top] == [top.token_id for top in theirs.top]


async def test_trees_of_many_sessions_share_passes(address: str) -> None:
    batch_sizes: list[int] = []

    async def session(sampling: SamplingParams, prompt: list[int]) -> None:
        options = {"max_new_tokens": 60, "ignore_eos": True, "sampling": sampling.to_proto()}
        output = await output_of(address, prompt, **options)
        rng = random.Random(str(sampling))
        async with verify_stream(address) as stream:
            result = await stream.open(prompt, draft_nodes=12, **options)
            while not result.finish_reason:
                done = len(stream.token_ids) - len(prompt)
                right = output[done : done + rng.randrange(4)]
                tree = random_tree(rng, right, num_wrong=rng.choice([0, 3, 8]), vocab_size=VOCAB_SIZE)
                result = await stream.round(tree.token_ids, parents=tree.parent_indices)
                batch_sizes.append(result.timings.batch_size)
            assert stream.token_ids[len(prompt) :] == output

    # Prompts of different lengths: their blocks and windows end at different depths of the trees.
    prompts = [PROMPT * (1 + index) for index in range(len(SAMPLINGS))]
    await asyncio.gather(*map(session, SAMPLINGS, prompts))
    assert max(batch_sizes) > 1


async def test_a_tree_with_one_path_equals_the_chain_bit_for_bit(address: str) -> None:
    options = {"max_new_tokens": 40, "ignore_eos": True, "num_top_logprobs": 5}
    output = await output_of(address, PROMPT, max_new_tokens=40, ignore_eos=True)
    answers: list[list[bytes]] = []
    for is_tree in (False, True):
        async with verify_stream(address) as stream:
            result = await stream.open(PROMPT, **options)
            answers.append([])
            while not result.finish_reason:
                done = len(stream.token_ids) - len(PROMPT)
                draft = [*output[done : done + done % 4], 3]
                result = await stream.round(draft, parents=one_path(draft) if is_tree else ())
                result.ClearField("timings")
                answers[-1].append(result.SerializeToString(deterministic=True))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 9])
async def test_nodes_deeper_than_what_remains_are_left_out(max_new_tokens: int, address: str) -> None:
    output = await output_of(address, PROMPT, max_new_tokens=20, ignore_eos=True)
    tree = random_tree(random.Random(1), output[1:20], num_wrong=20, vocab_size=VOCAB_SIZE)
    async with verify_stream(address) as stream:
        result = await stream.open(PROMPT, max_new_tokens=max_new_tokens, ignore_eos=True)
        if not result.finish_reason:
            result = await stream.round(tree.token_ids, parents=tree.parent_indices)
        assert stream.token_ids[len(PROMPT) :] == output[:max_new_tokens]
    assert result.finish_reason == verifier_pb2.FINISH_REASON_LENGTH


@pytest.mark.parametrize("has_room", [False, True])
async def test_nodes_behind_the_last_token_need_room_that_was_asked_for(has_room: bool, address: str) -> None:
    prompt = [(7 * i) % 250 for i in range(BLOCK_TOKENS - 6)]  # one block holds it and six tokens more
    options = {"max_new_tokens": 6, "ignore_eos": True}
    output = await output_of(address, prompt, **options)
    wrong = [token for token in range(30) if token != output[1]]
    tree = DraftTree.of([*wrong, *output[1:]], [*[-1] * len(wrong), -1, *range(len(wrong), len(wrong) + 4)])
    async with verify_stream(address) as stream:
        await stream.open(prompt, draft_nodes=len(tree) if has_room else 0, **options)
        result = await stream.round(tree.token_ids, parents=tree.parent_indices)
        assert result.num_accepted_tokens == (4 if has_room else 0)
        while not result.finish_reason:
            result = await stream.round()
        assert stream.token_ids[len(prompt) :] == output


async def test_room_for_nodes_is_no_reason_to_refuse_what_fits_without(tiny_llama: Path) -> None:
    async with running_verifier(tiny_llama, kv_cache_mib=2 * BLOCK_TOKENS * 512 / 2**20) as (small, server):
        assert server.servicer.verifier.pool.capacity_tokens == 2 * BLOCK_TOKENS
        options = {"max_new_tokens": 2 * BLOCK_TOKENS - len(PROMPT), "draft_nodes": 64}
        assert len(await output_of(small, PROMPT, ignore_eos=True, **options)) == options["max_new_tokens"]
