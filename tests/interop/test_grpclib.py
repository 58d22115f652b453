"""The gateway seen by grpclib: gRPC in pure Python over another HTTP/2 stack (h2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpclib import GRPCError, Status
from grpclib.client import Channel, UnaryStreamMethod, UnaryUnaryMethod

from specdec.client import GenerateOptions
from specdec.v1 import gateway_pb2
from tests.integration.gated_drafter import Gate, eventually
from tests.refusals import generate_request, sampling
from tests.systems import System

SERVICE = "specdec.v1.GatewayService"


@asynccontextmanager
async def channel_to(address: str) -> AsyncIterator[Channel]:
    host, _, port = address.rpartition(":")
    async with Channel(host, int(port)) as channel:
        yield channel


def generate(channel: Channel) -> UnaryStreamMethod[Any, Any]:
    return UnaryStreamMethod(
        channel, f"/{SERVICE}/Generate", gateway_pb2.GenerateRequest, gateway_pb2.GenerateResponse
    )


def num_sessions(system: System) -> int:
    assert system.verifier.servicer.verifier
    return system.verifier.servicer.verifier.num_sessions


async def test_the_gateway_is_healthy(system: System) -> None:
    async with channel_to(system.address) as channel:
        check: UnaryUnaryMethod[Any, Any] = UnaryUnaryMethod(
            channel,
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest,
            health_pb2.HealthCheckResponse,
        )
        response = await check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=20)
        assert response.status == health_pb2.HealthCheckResponse.SERVING


async def test_an_answer_is_streamed(system: System) -> None:
    request = generate_request(max_new_tokens=6, ignore_eos=True)
    async with channel_to(system.address) as channel:
        messages = await generate(channel)(request, timeout=20)
    assert messages[0].HasField("started")
    tokens = [token.token_id for message in messages for token in message.chunk.tokens]
    options = GenerateOptions(method="none", max_new_tokens=6, ignore_eos=True)
    expected = await system.client.generate(list(request.token_ids.token_ids), options)
    assert tokens == list(expected.token_ids)
    assert messages[-1].finished.usage.output_tokens == 6


async def test_a_stream_that_is_cancelled_frees_its_session(gated: tuple[System, Gate]) -> None:
    system, gate = gated
    async with channel_to(system.address) as channel, generate(channel).open(timeout=60) as stream:
        await stream.send_message(generate_request(method="gated"), end=True)
        first = await stream.recv_message()
        assert first is not None
        assert first.HasField("started")
        await gate.reached()
        assert num_sessions(system) == 1
        await stream.cancel()
        await eventually(lambda: num_sessions(system) == 0)


async def test_a_deadline_ends_a_call_and_frees_its_session(gated: tuple[System, Gate]) -> None:
    system, gate = gated
    async with channel_to(system.address) as channel:
        calling = asyncio.ensure_future(generate(channel)(generate_request(method="gated"), timeout=2))
        await gate.reached()
        assert num_sessions(system) == 1
        # grpclib also keeps a clock of its own, and may be first to say so.
        with pytest.raises((GRPCError, asyncio.TimeoutError)) as raised:
            await calling
    if isinstance(raised.value, GRPCError):
        assert raised.value.status is Status.DEADLINE_EXCEEDED
    await eventually(lambda: num_sessions(system) == 0)


async def test_error_details_name_the_field(system: System) -> None:
    async with channel_to(system.address) as channel:
        with pytest.raises(GRPCError) as raised:
            await generate(channel)(generate_request(**sampling(temperature=-1.0)), timeout=20)
    error = raised.value
    assert error.status is Status.INVALID_ARGUMENT
    assert error.message is not None
    assert "temperature is -1" in error.message
    details = {type(detail): detail for detail in error.details or ()}
    assert details[error_details_pb2.BadRequest].field_violations[0].field == "temperature"
    assert details[error_details_pb2.ErrorInfo].domain == "specdec.v1"
