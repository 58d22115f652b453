"""Sessions that outgrow the KV pool: the youngest gives way, and the oldest goes on, over raw streams."""

from __future__ import annotations

import asyncio
import threading
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from specdec.contract.errors import AbortedError, InvalidArgumentError, ResourceExhaustedError
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.service.exporters import make_telemetry
from specdec.v1 import common_pb2
from tests.raw_streams import VerifyStream, until, verify_stream
from tests.systems import running_verifier
from tests.unit.test_stats import points
from verifier_service.verifier import Verifier

BLOCK_MIB = 0.03125
"""KV of a block of the tiny llama."""
PROMPTS = [[5 + number, 6, 7] for number in range(6)]
LENGTH = 4 * BLOCK_TOKENS
"""Tokens of a session at its end, prompt included."""


async def finish(stream: VerifyStream) -> list[int]:
    """Run rounds to the end of a session that is open; return its tokens."""
    while not (await stream.round()).finish_reason:
        pass
    return stream.token_ids


async def run(address: str, prompt: list[int], length: int = LENGTH, **fields: Any) -> tuple[list[int], int]:
    """Generate to the end, and begin again where a session was preempted or refused; return the tokens, and
    how often it was preempted."""
    committed, num_preempted = list(prompt), 0
    while True:
        async with verify_stream(address) as stream:
            try:
                first = await stream.open(
                    committed,
                    max_new_tokens=length - len(committed),
                    ignore_eos=True,
                    prompt_length=len(prompt),
                    **fields,
                )
                committed = await finish(stream) if not first.finish_reason else stream.token_ids
                return committed, num_preempted
            except ResourceExhaustedError:
                await asyncio.sleep(0.005)
            except AbortedError:
                num_preempted += 1
                committed = getattr(stream, "token_ids", committed)


async def alone(model: Path, prompt: list[int], length: int) -> list[int]:
    """Return what a verifier with room generates."""
    async with running_verifier(model) as (address, _):
        return (await run(address, prompt, length))[0]


def held_tokens(verifier: Verifier) -> int:
    return verifier.pool.capacity_tokens - verifier.pool.free_tokens


async def test_a_session_takes_blocks_as_it_grows_and_gives_them_back(tiny_llama: Path) -> None:
    async with running_verifier(tiny_llama, kv_cache_mib=8 * BLOCK_MIB) as (address, server):
        verifier = server.servicer.verifier
        assert verifier
        async with verify_stream(address) as stream:
            await stream.open(PROMPTS[0], max_new_tokens=LENGTH - 3, ignore_eos=True)
            held = [held_tokens(verifier)]
            while len(stream.token_ids) < LENGTH:
                await stream.round()
                held.append(held_tokens(verifier))
        assert sorted(held) == held
        assert sorted(set(held)) == [number * BLOCK_TOKENS for number in (1, 2, 3, 4)]
        await until(lambda: not held_tokens(verifier))


async def test_the_youngest_gives_way_and_the_oldest_goes_on(tiny_llama: Path) -> None:
    reader = InMemoryMetricReader()
    telemetry = make_telemetry("test", metric_reader=reader)
    length = 3 * BLOCK_TOKENS
    async with (
        running_verifier(tiny_llama, kv_cache_mib=4 * BLOCK_MIB, telemetry=telemetry) as (address, server),
        AsyncExitStack() as stack,
    ):
        verifier = server.servicer.verifier
        assert verifier
        old, young, late = [await stack.enter_async_context(verify_stream(address)) for _ in range(3)]
        for stream, prompt in zip((old, young), PROMPTS, strict=False):
            await stream.open([9, *prompt], max_new_tokens=length - 4, ignore_eos=True)
        with pytest.raises(ResourceExhaustedError, match="128 are kept for those who run") as full:
            await late.open(PROMPTS[2], max_new_tokens=length - 3, ignore_eos=True)
        assert (full.value.reason, bool(full.value.retry_after_s)) == ("KV_POOL_FULL", True)
        while len(young.token_ids) <= BLOCK_TOKENS + 1:
            await young.round()
        assert held_tokens(verifier) == 3 * BLOCK_TOKENS
        assert await finish(old) == (await alone(tiny_llama, [9, *PROMPTS[0]], length))
        with pytest.raises(AbortedError) as preempted:
            await young.round()
        assert preempted.value.reason == "SESSION_PREEMPTED"
        (counted,) = points(reader, "specdec.verifier.preempted_sessions")
        assert counted.value == 1
        # What it computed is kept while there is room, and it goes on as it would have.
        old.call.cancel()
        await until(lambda: not held_tokens(verifier))
        again = await stack.enter_async_context(verify_stream(address))
        await again.open(
            young.token_ids, max_new_tokens=length - len(young.token_ids), ignore_eos=True, prompt_length=4
        )
        assert again.opened.num_reused_tokens == BLOCK_TOKENS
        assert await finish(again) == (await alone(tiny_llama, [9, *PROMPTS[1]], length))
        again.call.cancel()
        await until(lambda: not verifier.num_sessions and not held_tokens(verifier))


async def test_who_needs_a_block_and_is_the_youngest_gives_way_itself(tiny_llama: Path) -> None:
    async with running_verifier(tiny_llama, kv_cache_mib=4 * BLOCK_MIB) as (address, server):
        verifier = server.servicer.verifier
        assert verifier
        async with verify_stream(address) as old, verify_stream(address) as young:
            await old.open(PROMPTS[0], max_new_tokens=LENGTH - 3, ignore_eos=True)
            await young.open(PROMPTS[1], max_new_tokens=LENGTH - 3, ignore_eos=True)
            with pytest.raises(AbortedError):
                await finish(young)
            assert len(young.token_ids) == 3 * BLOCK_TOKENS + 1
            await finish(old)
        await until(lambda: not verifier.num_sessions and not held_tokens(verifier))


async def test_who_has_finished_gives_way_first_and_loses_nothing(tiny_llama: Path) -> None:
    reader = InMemoryMetricReader()
    telemetry = make_telemetry("test", metric_reader=reader)
    async with running_verifier(tiny_llama, kv_cache_mib=4 * BLOCK_MIB, telemetry=telemetry) as (address, _):
        async with verify_stream(address) as done, verify_stream(address) as runs:
            await done.open(PROMPTS[0], max_new_tokens=8, ignore_eos=True)
            await runs.open(PROMPTS[1], max_new_tokens=LENGTH - 3, ignore_eos=True)
            await finish(done)
            await finish(runs)
        assert not points(reader, "specdec.verifier.preempted_sessions")


async def test_a_draft_takes_nobody_elses_blocks_and_is_cut_where_there_are_none(tiny_llama: Path) -> None:
    length = 3 * BLOCK_TOKENS
    async with running_verifier(tiny_llama, kv_cache_mib=4 * BLOCK_MIB) as (address, _):
        right, _ = await run(address, PROMPTS[0], length)
        async with verify_stream(address) as old, verify_stream(address) as young:
            await old.open(PROMPTS[0], max_new_tokens=length - 3, ignore_eos=True)
            await young.open(PROMPTS[1], max_new_tokens=length - 3, ignore_eos=True)
            while len(old.token_ids) < 2 * BLOCK_TOKENS - 3:
                await old.round()
            while len(young.token_ids) <= BLOCK_TOKENS + 1:
                await young.round()
            result = await old.round(right[len(old.token_ids) :][:10])
            assert result.num_accepted_tokens == 3, "as many as find room"
            await young.round()
            result = await old.round(right[len(old.token_ids) :][:10])
            assert result.num_accepted_tokens == 10, "its own next token needs a block: the other one's"
            with pytest.raises(AbortedError):
                await young.round()


async def test_a_pass_under_way_keeps_its_blocks_and_its_result_is_told(tiny_llama: Path) -> None:
    async with running_verifier(tiny_llama, kv_cache_mib=4 * BLOCK_MIB) as (address, server):
        verifier = server.servicer.verifier
        assert verifier
        async with verify_stream(address) as old, verify_stream(address) as young:
            await old.open(PROMPTS[0], max_new_tokens=LENGTH - 3, ignore_eos=True)
            await young.open(PROMPTS[1], max_new_tokens=LENGTH - 3, ignore_eos=True)
            while len(young.token_ids) < 3 * BLOCK_TOKENS:
                await young.round()
            while len(old.token_ids) <= BLOCK_TOKENS - 1:
                await old.round()
            await old.round()
            # The engine is busy when both ask, so that the younger one's round waits in it for its pass.
            holds = threading.Event()
            busy = asyncio.ensure_future(verifier._run_on_engine(holds.wait))
            await until(lambda: verifier.engine.step_under_way()[0] > 0)
            num_before = len(young.token_ids)
            last = asyncio.ensure_future(young.round())
            await until(lambda: verifier.num_waiting == 1)
            grows = asyncio.ensure_future(old.round())
            await until(lambda: any(session.is_preempted for session in verifier.room.sessions))
            assert held_tokens(verifier) == 4 * BLOCK_TOKENS, "its pass is to come"
            holds.set()
            await asyncio.gather(busy, last, grows)
            assert len(young.token_ids) == num_before + 1
            with pytest.raises(AbortedError):
                await young.round()
            assert await finish(old) == await alone(tiny_llama, PROMPTS[0], LENGTH)


async def test_what_never_fits_is_refused_whatever_is_free(tiny_llama: Path) -> None:
    async with running_verifier(tiny_llama, kv_cache_mib=3 * BLOCK_MIB) as (address, _):
        async with verify_stream(address) as stream:
            with pytest.raises(InvalidArgumentError, match="the whole pool holds 192") as raised:
                await stream.open(PROMPTS[0], max_new_tokens=3 * BLOCK_TOKENS, ignore_eos=True)
            assert raised.value.reason == "EXCEEDS_KV_POOL"
        tokens, num_preempted = await run(address, PROMPTS[0], 3 * BLOCK_TOKENS)
        assert (len(tokens), num_preempted) == (3 * BLOCK_TOKENS, 0)


@pytest.mark.parametrize("sampling", [None, common_pb2.SamplingParams(temperature=0.9, seed=4)])
async def test_many_sessions_in_a_pool_for_one_all_come_to_their_end(
    sampling: common_pb2.SamplingParams | None, tiny_llama: Path
) -> None:
    async with (
        running_verifier(tiny_llama, kv_cache_mib=64 * BLOCK_MIB) as (roomy, _),
        running_verifier(tiny_llama, kv_cache_mib=4 * BLOCK_MIB, prefill_chunk_tokens=32) as (
            address,
            server,
        ),
    ):
        expected = [(await run(roomy, prompt, sampling=sampling))[0] for prompt in PROMPTS]
        outcomes = await asyncio.gather(*(run(address, prompt, sampling=sampling) for prompt in PROMPTS))
        assert [tokens for tokens, _ in outcomes] == expected
        assert sum(num_preempted for _, num_preempted in outcomes) > 0
        verifier = server.servicer.verifier
        assert verifier
        await until(lambda: not verifier.num_sessions and not held_tokens(verifier))
        assert not verifier.room.sessions
