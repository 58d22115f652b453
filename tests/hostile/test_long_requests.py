"""Requests that are longer than a gateway takes: they are not received, and both ends say so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.config import GatewayConfig
from specdec.client import AsyncClient, Client
from specdec.contract.errors import InvalidArgumentError, ResourceExhaustedError, from_rpc_error
from specdec.contract.methods import MAX_DRAFTERS
from specdec.contract.output_format import MAX_CHOICES, MAX_CHOICES_BYTES
from specdec.contract.request_limits import (
    MAX_CACHE_KEY_LENGTH,
    MAX_LISTS_BYTES,
    MAX_STOP_STRING_LENGTH,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
)
from specdec.contract.sampling import MAX_ALLOWED_TOKEN_IDS, MAX_LOGIT_BIASES
from specdec.service.host import ServiceHost
from specdec.v1 import common_pb2, gateway_pb2, gateway_pb2_grpc
from tests.systems import running_gateway, running_verifier


async def refusal(address: str, request: gateway_pb2.GenerateRequest) -> Any:
    """Return the error that a gateway answers a client in any language with."""
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            _ = [message async for message in gateway_pb2_grpc.GatewayServiceStub(channel).Generate(request)]
    return from_rpc_error(raised.value)


def text_of(num_bytes: int) -> gateway_pb2.GenerateRequest:
    return gateway_pb2.GenerateRequest(text="x" * num_bytes)


def fullest(prompt: str) -> gateway_pb2.GenerateRequest:
    """Return a request that has as much of everything as a request may have."""
    most = 2**32 - 1
    return gateway_pb2.GenerateRequest(
        text=prompt,
        sampling=common_pb2.SamplingParams(
            temperature=1e6,
            top_k=most,
            top_p=1.0,
            min_p=1.0,
            repetition_penalty=1e6,
            presence_penalty=2.0,
            frequency_penalty=2.0,
            logit_bias={most - i: 100.0 for i in range(MAX_LOGIT_BIASES)},
            allowed_token_ids=[most - i for i in range(MAX_ALLOWED_TOKEN_IDS)],
            seed=2**64 - 1,
        ),
        max_new_tokens=most,
        stop_token_ids=[most] * MAX_STOP_TOKEN_IDS,
        stop_strings=["\U0001f600" * MAX_STOP_STRING_LENGTH] * MAX_STOP_STRINGS,
        ignore_eos=True,
        method="+".join(["x" * 64] * MAX_DRAFTERS),
        draft_depth=most,
        num_top_logprobs=20,
        min_draft_confidence=1.0,
        draft_nodes=most,
        cache_salt="\U0001f600" * MAX_CACHE_KEY_LENGTH,
        output_format=common_pb2.OutputFormat(
            choices=common_pb2.Choices(texts=["x" * (MAX_CHOICES_BYTES // MAX_CHOICES)] * MAX_CHOICES)
        ),
    )


def blocking_generate(address: str, prompt: str) -> None:
    with Client(address) as client:
        client.generate(prompt)


async def assert_too_long(generate: Callable[[], Awaitable[Any]]) -> None:
    with pytest.raises(InvalidArgumentError, match="shorten") as raised:
        await generate()
    assert (raised.value.reason, raised.value.field) == ("PROMPT_TOO_LONG", "prompt")


def test_the_longest_lists_find_room() -> None:
    assert set(fullest("x").DESCRIPTOR.fields_by_name) - {"chat", "token_ids"} == {
        field.name for field, _ in fullest("x").ListFields()
    }
    num_ids = MAX_ALLOWED_TOKEN_IDS + MAX_STOP_TOKEN_IDS  # each takes a byte more where they are not packed
    assert fullest("").ByteSize() + num_ids < MAX_LISTS_BYTES


async def test_a_prompt_too_long_is_told_the_same_by_both_ends(tiny_llama: Path) -> None:
    limit = 2**16
    async with (
        running_verifier(tiny_llama) as (verifier_at, _),
        running_gateway(tiny_llama, verifier=verifier_at, max_prompt_bytes=limit) as (address, gateway),
        AsyncClient(address) as client,
    ):
        for size in (limit + 1, 2 * limit):
            error = await refusal(address, text_of(size))
            assert isinstance(error, InvalidArgumentError)
            assert (error.reason, error.field) == ("PROMPT_TOO_LONG", "prompt")
        # The lists are what this is refused for: it was received.
        assert isinstance(await refusal(address, fullest("x" * 2 * limit)), InvalidArgumentError)

        received = GatewayConfig(max_prompt_bytes=limit).max_message_bytes
        error = await refusal(address, text_of(received))
        assert isinstance(error, ResourceExhaustedError)
        assert f"vs. {received}" in error.message
        for size in (limit + 1, received, 4 * received, 10 * 2**20):
            for generate in (client.generate, partial(asyncio.to_thread, blocking_generate, address)):
                await assert_too_long(partial(generate, "x" * size))
        assert gateway.generations.num_requests == 0
        assert (await client.generate("Hi", max_new_tokens=2)).usage.output_tokens


async def test_a_gateway_receives_the_longest_prompt_that_it_is_told_to_take(tiny_llama: Path) -> None:
    async with (
        running_verifier(tiny_llama) as (verifier_at, _),
        running_gateway(tiny_llama, verifier=verifier_at, max_prompt_bytes=12 * 2**20) as (address, _),
    ):
        message = gateway_pb2.ChatMessage(role="robot", content="x" * 10 * 2**20)
        chat = gateway_pb2.Chat(messages=[message])
        error = await refusal(address, gateway_pb2.GenerateRequest(chat=chat))
        assert error.field == "chat.messages.role", "its size is none to refuse it for"


async def test_a_port_for_health_receives_nothing_large() -> None:
    host = ServiceHost("any", lambda _: None, "127.0.0.1:0", health_listen="127.0.0.1:0")
    await host.start()
    async with grpc.aio.insecure_channel(host.health_address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="larger than max"):
            await stub.Check(health_pb2.HealthCheckRequest(service="x" * 10_000))
    await host.stop(0)
