"""Peers that begin messages and do not end them: few of them take memory, and none for long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specdec.client import AsyncClient
from specdec.service.first_message import MAX_AT_A_TIME
from specdec.service.host import ServiceHost
from specdec.transport.channel import aio_channel
from specdec.v1 import gateway_pb2, gateway_pb2_grpc
from tests.raw_streams import until
from tests.zero_window import deaf_peer

GENERATE = "/specdec.v1.GatewayService/Generate"
GET_INFO = "/specdec.v1.GatewayService/GetInfo"
CHECK = "/grpc.health.v1.Health/Check"


class Servicer(gateway_pb2_grpc.GatewayServiceServicer):
    """Answers at once, and counts what it answers."""

    def __init__(self) -> None:
        self.num_answered = 0

    async def GetInfo(self, request: Any, context: Any) -> gateway_pb2.GatewayServiceGetInfoResponse:  # noqa: N802
        self.num_answered += 1
        return gateway_pb2.GatewayServiceGetInfoResponse(methods=["none"], protocol_version=2)

    async def Generate(self, request: Any, context: Any) -> None:  # noqa: N802
        self.num_answered += 1


@asynccontextmanager
async def serving(timeout_s: float) -> AsyncIterator[tuple[ServiceHost, Servicer]]:
    servicer = Servicer()
    host = ServiceHost(
        "specdec.v1.GatewayService",
        lambda server: gateway_pb2_grpc.add_GatewayServiceServicer_to_server(servicer, server),
        "127.0.0.1:0",
    )
    host.first_messages.timeout_s = timeout_s
    await host.start()
    host.set_serving()
    yield host, servicer
    await host.stop(grace_s=0)


@pytest.mark.parametrize("method", [GENERATE, GET_INFO, CHECK])
async def test_messages_that_do_not_end_are_given_up(method: str) -> None:
    async with serving(timeout_s=1.0) as (host, servicer), deaf_peer(host.address) as peer:
        calls = [peer.call_in_part(method, b"\x0a", 1000) for _ in range(5)]
        await until(lambda: host.first_messages.turns.num_waiting == 5)
        await until(lambda: len(peer.ended) == 5)
        assert {dict(peer.ended[call])["grpc-status"] for call in calls} == {"4"}
        assert host.first_messages.turns.num_waiting == servicer.num_answered == 0


async def test_others_of_the_host_wait_for_their_turn_and_are_served() -> None:
    async with serving(timeout_s=3.0) as (host, servicer), deaf_peer(host.address) as peer:
        for _ in range(MAX_AT_A_TIME):
            peer.call_in_part(GENERATE, b"\x0a", 1000)
        await until(lambda: host.first_messages.turns.num_waiting == MAX_AT_A_TIME)
        await asyncio.sleep(1.0)  # the others' time is up before that of those who come now
        async with AsyncClient(host.address) as client:
            infos = await asyncio.gather(*(client.info() for _ in range(40)))
        assert {info.methods for info in infos} == {("none",)}
        assert servicer.num_answered == 40


async def test_large_messages_that_do_not_end_take_the_memory_of_a_few() -> None:
    """Forty calls send all but a byte of 8 MB each, as far as they are let; two at a time may."""
    size, num_calls = 8_000_000, 40
    async with serving(timeout_s=60.0) as (host, _), deaf_peer(host.address) as peer:
        host.first_messages.turns.max_at_a_time = 2
        before = psutil.Process().memory_info().rss
        calls = [peer.call_in_part(GENERATE, b"", size) for _ in range(num_calls)]
        num_sent = await peer.push(calls, size - 1)
        assert host.first_messages.turns.num_waiting == num_calls
        assert num_sent >= 2 * (size - 1)
        assert num_sent + psutil.Process().memory_info().rss - before < 0.5 * num_calls * size
        async with aio_channel(host.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            with pytest.raises(grpc.aio.AioRpcError):  # it waits for its turn as well
                await stub.Check(health_pb2.HealthCheckRequest(), timeout=0.5)
