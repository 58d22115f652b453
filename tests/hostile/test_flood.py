"""A gigabyte of drafts, seen by real processes: no memory is taken, and the output stays the target's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from gateway.config import GatewayConfig
from specdec.client import AsyncClient, GenerateOptions
from specdec.contract.errors import InvalidArgumentError
from specdec.local.launcher import LocalSystem
from specdec.transport.channel import MAX_MESSAGE_BYTES
from specdec.v1 import drafter_pb2
from tests.hostile.liar import NAME, Liar, Part, Requests, running_liar
from tests.integration.gated_drafter import eventually_offers
from tests.refusals import PROMPT
from tests.systems import running_gateway, running_verifier

GIGABYTE = 2**30
LARGEST_PROMPT_BYTES = GatewayConfig().max_prompt_bytes
MAX_GROWTH_BYTES = 256 * 2**20
"""A few messages in the hands of gRPC and of the allocator, however many come."""
PADDING_FIELD = b"\xfa\x3f"
"""Key of a field nobody knows, of bytes."""


def padded(message: drafter_pb2.DraftManyResponse, num_bytes: int) -> bytes:
    """Return a message of exactly that size: a field that nobody knows follows its content."""
    said: bytes = message.SerializeToString()
    size = num_bytes - len(said) - len(PADDING_FIELD) - 4
    varint = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128, size >> 21])
    return said + PADDING_FIELD + varint + bytes(size)


class Floods(Liar):
    """Answers every round with a wrong draft in a message as large as is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0
        """Bytes that were taken."""

    async def session(self, requests: Requests, context: Part) -> None:
        async for request in requests:
            if request.HasField("open"):
                await context.write(await self.open(request.open))
                continue
            result = drafter_pb2.DraftResult(draft_token_ids=[1])
            answer = context.message(drafter_pb2.DraftResponse(result=result))
            await context.write(padded(answer, MAX_MESSAGE_BYTES))
            self.num_bytes += MAX_MESSAGE_BYTES


class SaysOn(Floods):
    """Goes on with such answers, which nobody asked for."""

    async def session(self, requests: Requests, context: Part) -> None:
        async for request in requests:
            await context.write(await self.open(request.open))
            result = drafter_pb2.DraftResult(draft_token_ids=[1])
            answer = padded(context.message(drafter_pb2.DraftResponse(result=result)), MAX_MESSAGE_BYTES)
            while True:
                await context.write(answer)
                self.num_bytes += MAX_MESSAGE_BYTES


class SendsTooMuch(Liar):
    """Answers a round with one message of many times the limit."""

    async def round(self, message: drafter_pb2.DraftRound) -> Any:
        return bytes(16 * MAX_MESSAGE_BYTES)


@asynccontextmanager
async def flooded_system(model: Path, liar: Liar) -> AsyncIterator[tuple[LocalSystem, AsyncClient]]:
    """Run a gateway and a verifier in processes of their own, with a liar as their drafter."""
    async with running_liar(liar) as liar_at:
        system = LocalSystem(
            str(model),
            dtype="float32",
            extra_args={
                "gateway": ["--drafter", liar_at, "--draft-timeout-s", "20"],
                "verifier": ["--kv-cache-mib", "4"],
            },
            env={"OMP_NUM_THREADS": "1"},
        )
        await asyncio.to_thread(system.__enter__)  # the gateway asks the liar while it starts
        try:
            async with AsyncClient(system.gateway, timeout_s=120) as client:
                yield system, client
        finally:
            await asyncio.to_thread(system.__exit__)


@asynccontextmanager
async def memory_of(system: LocalSystem, *names: str) -> AsyncIterator[dict[str, int]]:
    """Measure, by service, how many bytes its resident memory grew at most while the block ran."""
    processes = {name: psutil.Process(system.pids[name]) for name in names}
    before = {name: process.memory_info().rss for name, process in processes.items()}
    growth = dict.fromkeys(names, 0)

    async def watch() -> None:
        while True:
            for name, process in processes.items():
                growth[name] = max(growth[name], process.memory_info().rss - before[name])
            await asyncio.sleep(0.02)

    watching = asyncio.ensure_future(watch())
    try:
        yield growth
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


def options(method: str, num_tokens: int) -> GenerateOptions:
    return GenerateOptions(
        max_new_tokens=num_tokens,
        ignore_eos=True,
        method=method,
        draft_depth=None if method == "none" else 4,
    )


@pytest.mark.slow
async def test_a_gigabyte_of_drafts_takes_no_memory(tiny_llama: Path) -> None:
    liar = Floods()
    async with flooded_system(tiny_llama, liar) as (system, client):
        num_tokens = GIGABYTE // MAX_MESSAGE_BYTES + 20
        expected = await client.generate(PROMPT, options("none", num_tokens))
        async with memory_of(system, "gateway", "verifier") as growth:
            result = await client.generate(PROMPT, options(NAME, num_tokens))
        assert result.token_ids == expected.token_ids
        assert liar.num_bytes >= GIGABYTE
        assert result.speculation.num_draft_tokens >= num_tokens - 3
        assert max(growth.values()) < MAX_GROWTH_BYTES, growth
        info = await client.info()
        assert info.verifiers[0].info is not None
        assert info.verifiers[0].info.num_sessions == 0


async def test_whoever_says_on_unasked_is_not_listened_to(tiny_llama: Path) -> None:
    liar = SaysOn()
    async with (
        running_liar(liar) as liar_at,
        running_verifier(tiny_llama) as (verifier_at, _),
        running_gateway(tiny_llama, verifier=verifier_at, drafter=liar_at, draft_timeout_s=20) as (at, _),
        AsyncClient(at, timeout_s=60) as client,
    ):
        await eventually_offers(client, NAME)
        expected = await client.generate(PROMPT, options("none", 40))
        result = await client.generate(PROMPT, options(NAME, 40))
        assert result.token_ids == expected.token_ids
        assert "nobody asked for" in result.speculation.fallback_reason
        # What came before the gateway left, and what was on its way: not a message a round.
        assert liar.num_bytes < 20 * MAX_MESSAGE_BYTES


async def test_a_message_far_above_the_limit_costs_its_draft_only(tiny_llama: Path) -> None:
    async with (
        running_liar(SendsTooMuch()) as liar_at,
        running_verifier(tiny_llama) as (verifier_at, _),
        running_gateway(tiny_llama, verifier=verifier_at, drafter=liar_at, draft_timeout_s=20) as (at, _),
        AsyncClient(at, timeout_s=60) as client,
    ):
        await eventually_offers(client, NAME)
        expected = await client.generate(PROMPT, options("none", 20))
        result = await client.generate(PROMPT, options(NAME, 20))
    assert result.token_ids == expected.token_ids
    assert "larger than max" in result.speculation.fallback_reason


@pytest.mark.slow
async def test_a_message_far_above_the_limit_is_refused_unread(tiny_llama: Path) -> None:
    async with flooded_system(tiny_llama, SendsTooMuch()) as (system, client):
        expected = await client.generate(PROMPT, options("none", 20))
        async with memory_of(system, "gateway", "verifier") as growth:
            result = await client.generate(PROMPT, options(NAME, 20))
        assert result.token_ids == expected.token_ids
        assert "larger than max" in result.speculation.fallback_reason
        assert max(growth.values()) < MAX_GROWTH_BYTES, growth


@pytest.mark.slow
async def test_long_prompts_take_no_more_memory_than_one(tiny_llama: Path) -> None:
    """Tokenising takes hundreds of times a text's memory: several long texts at once would exhaust it."""
    longest = ["word " * (LARGEST_PROMPT_BYTES // 5)] * 4
    too_long = ["a" * (GatewayConfig().max_message_bytes - 2**10)] * 6
    async with flooded_system(tiny_llama, Liar()) as (system, client):

        async def refusal(prompt: str) -> str:
            with pytest.raises(InvalidArgumentError) as caught:
                await client.generate(prompt, GenerateOptions(method="none", raw=True))
            return caught.value.reason

        async with memory_of(system, "gateway") as growth:
            refusals = await asyncio.gather(*map(refusal, [*longest, *too_long]))
        assert refusals == ["PROMPT_TOO_LONG"] * 10
        assert growth["gateway"] < 768 * 2**20, growth
        assert (await client.generate(PROMPT, options("none", 4))).usage.output_tokens == 4
