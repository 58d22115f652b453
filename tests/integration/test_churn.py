"""Sessions that come, go and break off in any order: nothing leaks, and no session sees another."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from specdec.runtime.kv_pool import KvPool
from specdec.runtime.kv_slots import BLOCK_TOKENS, KvAllocation
from tests.raw_streams import draft_stream, output_of, run_session, tokens_of, until, verify_stream
from tests.systems import running_drafter, running_verifier
from tests.tiny_models import VOCAB_SIZE

NUM_WARM_UP_SESSIONS = 100
NUM_SESSIONS = 500
NUM_WORKERS = 8
MAX_GROWTH_BYTES = 30 * 2**20


async def one_session(verifier: str, drafter: str, rng: random.Random) -> bool:
    """Run a session with random drafts that breaks off at a random moment; return whether it ended before."""
    prompt = [rng.randrange(250) for _ in range(rng.choice((1, 3, 40, 150)))]
    max_new_tokens = rng.randrange(1, 30)
    num_rounds = rng.randrange(12)
    async with verify_stream(verifier) as target, draft_stream(drafter) as draft:
        if rng.random() < 0.15:
            # Breaks off while the prompt is read.
            opening = asyncio.ensure_future(target.open(prompt, max_new_tokens=max_new_tokens))
            await asyncio.sleep(rng.random() * 0.003)
            opening.cancel()
            await asyncio.wait([opening])
            return False
        result = await target.open(prompt, max_new_tokens=max_new_tokens, ignore_eos=True)
        await draft.open("model", prompt, max_length=len(prompt) + max_new_tokens)
        num_sent = len(prompt)
        for _ in range(num_rounds):
            if result.finish_reason:
                return True
            new = target.token_ids[num_sent:]
            num_sent = len(target.token_ids)
            proposal = await draft.round(new, num_sent, rng.randrange(1, 6))
            if proposal and rng.random() < 0.3:
                proposal[rng.randrange(len(proposal))] = rng.randrange(VOCAB_SIZE)
            result = await target.round(proposal)
        return bool(result.finish_reason)


async def churn(verifier: str, drafter: str, num_sessions: int, seed: int) -> int:
    """Run sessions, several at a time, and return how many reached their end."""
    rngs = iter([random.Random(seed * num_sessions + index) for index in range(num_sessions)])

    async def work() -> int:
        return sum([await one_session(verifier, drafter, rng) for rng in rngs])

    return sum(await asyncio.gather(*(work() for _ in range(NUM_WORKERS))))


@pytest.mark.slow
async def test_nothing_leaks_over_500_sessions_with_random_cancels(tiny_llama: Path) -> None:
    async with (
        running_verifier(tiny_llama) as (verifier_at, verifier_server),
        running_drafter(f"model=causal-lm:{tiny_llama}") as (drafter_at, drafter_server),
    ):
        verifier, drafter = verifier_server.servicer.verifier, drafter_server.servicer.host
        assert verifier is not None
        assert drafter is not None
        expected = await output_of(verifier_at, [5, 6, 7], max_new_tokens=30, ignore_eos=True)
        await churn(verifier_at, drafter_at, NUM_WARM_UP_SESSIONS, seed=1)
        gc.collect()
        before = psutil.Process().memory_info().rss

        num_finished = await churn(verifier_at, drafter_at, NUM_SESSIONS, seed=2)
        assert 50 < num_finished < NUM_SESSIONS - 100, "both endings must occur often"

        await until(lambda: verifier.num_sessions == 0 and drafter.num_sessions == 0)
        assert verifier.pool.free_tokens == verifier.pool.capacity_tokens
        gc.collect()
        assert psutil.Process().memory_info().rss - before < MAX_GROWTH_BYTES
        assert await output_of(verifier_at, [5, 6, 7], max_new_tokens=30, ignore_eos=True) == expected
        # The draft model's pool is whole if one session can have all of it.
        async with draft_stream(drafter_at) as draft:
            await draft.open("model", [5, 6, 7], max_length=512)


def take_every_other_block(pool: KvPool) -> list[KvAllocation]:
    """Leave a pool holes of one block only, so that every longer allocation is scattered."""
    blocks = [pool.allocate(1) for _ in range(pool.free_tokens // BLOCK_TOKENS)]
    blocks.sort(key=lambda allocation: allocation.blocks)
    for allocation in blocks[::2]:
        pool.free(allocation)
    return blocks[1::2]


def assert_scattered(pool: KvPool) -> None:
    """Check that the pool has no two free blocks side by side."""
    allocation = pool.allocate(BLOCK_TOKENS + 1)
    assert allocation.slot_ids is not None
    pool.free(allocation)


async def test_sessions_in_a_fragmented_pool_are_answered_as_each_alone(tiny_llama: Path) -> None:
    lengths = [1, 15, 16, 17, 33, 70, 100, 140]
    prompts = [[(7 * i + length) % 250 for i in range(length)] for length in lengths]
    options = {"max_new_tokens": 40, "ignore_eos": True}
    async with running_verifier(tiny_llama, kv_cache_mib=1.0, prefill_chunk_tokens=32) as (address, server):
        verifier = server.servicer.verifier
        assert verifier is not None
        alone = [await output_of(address, prompt, **options) for prompt in prompts]
        await until(lambda: verifier.num_sessions == 0)
        held = take_every_other_block(verifier.pool)
        assert_scattered(verifier.pool)
        together = await asyncio.gather(
            *(redrafted(address, prompt, output) for prompt, output in zip(prompts, alone, strict=True))
        )
        assert list(together) == alone
        assert_scattered(verifier.pool)
        for allocation in held:
            verifier.pool.free(allocation)
        await until(lambda: verifier.num_sessions == 0)
        assert verifier.pool.free_tokens == verifier.pool.capacity_tokens


async def redrafted(address: str, prompt: Sequence[int], output: Sequence[int]) -> list[int]:
    """Run a session whose every second draft is right and every other half right; return its output."""
    drafts: list[list[int]] = []
    position = 1
    while position < len(output):
        right = list(output[position : position + 3])
        is_wrong = len(drafts) % 2
        drafts.append([*right[:1], (right[-1] + 1) % VOCAB_SIZE, 7] if is_wrong else right)
        position += 2 if is_wrong else 4
    results = await run_session(address, prompt, drafts=drafts, max_new_tokens=40, ignore_eos=True)
    return tokens_of(results, drafts)
