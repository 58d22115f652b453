"""What one connection may have: calls at a time, and a time without calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specdec.client import AsyncClient, Client, GenerateOptions
from specdec.contract.errors import ResourceExhaustedError
from specdec.service.host import ServiceHost
from specdec.transport.channel import aio_channel
from specdec.transport.server import SPARE_STREAMS, ConnectionLimits
from specdec.transport.tls import PemFiles
from specdec.v1 import (
    drafter_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    target_state_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
)
from tests.certificates import Authority, Folder
from tests.leftovers import connections_to
from tests.raw_streams import DraftStream, VerifyStream, until
from tests.refusals import PROMPT
from tests.state_probe import all_of, ref_of
from tests.systems import running_drafter, running_gateway, running_verifier
from tests.zero_window import DeafPeer, deaf_peer
from verifier_service.state_stream import MAX_STREAMS_PER_SESSION

GENERATE = "/specdec.v1.GatewayService/Generate"
WATCH = "/grpc.health.v1.Health/Watch"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""How a connection begins: the preface, and settings of which none is set."""


class Servicer(gateway_pb2_grpc.GatewayServiceServicer):
    """Answers GetInfo at once, and Generate when it is let."""

    def __init__(self) -> None:
        self.let = asyncio.Event()

    async def GetInfo(self, request: Any, context: Any) -> gateway_pb2.GatewayServiceGetInfoResponse:  # noqa: N802
        return gateway_pb2.GatewayServiceGetInfoResponse(methods=["none"], protocol_version=2)

    async def Generate(self, request: Any, context: Any) -> None:  # noqa: N802
        await context.write(gateway_pb2.GenerateResponse(started=gateway_pb2.GenerateStarted(seed=7)))
        await self.let.wait()
        await context.write(gateway_pb2.GenerateResponse(finished=gateway_pb2.GenerateFinished()))


@asynccontextmanager
async def serving(limits: ConnectionLimits) -> AsyncIterator[tuple[ServiceHost, Servicer]]:
    servicer = Servicer()
    register = partial(gateway_pb2_grpc.add_GatewayServiceServicer_to_server, servicer)
    host = ServiceHost("specdec.v1.GatewayService", register, "127.0.0.1:0", limits=limits)
    await host.start()
    host.set_serving()
    yield host, servicer
    await host.stop(grace_s=0)


async def most_streams(address: str) -> int:
    """Return how many calls at a time a server lets a connection have."""
    async with deaf_peer(address) as peer:
        await until(lambda: peer.max_streams < 2**31)
        return peer.max_streams


class TestStreams:
    async def test_each_service_lets_a_connection_have_what_its_sessions_need(self, tiny_llama: Path) -> None:
        async with (
            running_verifier(tiny_llama, max_sessions=5) as (verifier_at, _),
            running_drafter(max_sessions=7) as (drafter_at, _),
            running_gateway(tiny_llama, verifier=verifier_at) as (gateway_at, _),
        ):
            assert await most_streams(gateway_at) == 128
            assert await most_streams(verifier_at) == 5 * MAX_STREAMS_PER_SESSION + SPARE_STREAMS
            assert await most_streams(drafter_at) == 7 + SPARE_STREAMS

    async def test_more_sessions_than_any_message_can_say_are_no_reason_to_fail(self) -> None:
        async with running_drafter(max_sessions=2**31 - 1) as (drafter_at, _):
            assert await most_streams(drafter_at) == 2**31 - 1

    async def test_calls_past_the_limit_are_refused_and_others_go_on(self) -> None:
        async with serving(ConnectionLimits(max_streams=8)) as (host, _), deaf_peer(host.address) as peer:
            await until(lambda: peer.max_streams == 8)
            peer.ignore_max_streams()
            calls = [peer.call_in_part(GENERATE, b"\x0a", 1000) for _ in range(100)]
            await until(lambda: len(peer.ended) == 92)
            assert host.first_messages.turns.num_waiting == 8
            assert not any(peer.ended.get(call) for call in calls), "they were reset, not answered"
            assert not peer.is_closed
            async with AsyncClient(host.address) as client:
                assert (await client.info()).methods == ("none",)

    async def test_calls_past_the_limit_of_a_client_that_heeds_it_wait(self) -> None:
        async with (
            serving(ConnectionLimits(max_streams=8)) as (host, servicer),
            AsyncClient(host.address) as client,
        ):
            await client.info()  # a client learns of the limit when it has connected
            answers = [asyncio.ensure_future(client.generate(PROMPT)) for _ in range(20)]
            servicer.let.set()
            assert [answer.seed for answer in await asyncio.gather(*answers)] == [7] * 20

    async def test_a_full_verifier_answers_on_the_connection_that_has_all_its_sessions(
        self, tiny_llama: Path
    ) -> None:
        """A gateway has one channel to each replica: sessions, their state, health and questions share it."""
        async with (
            running_verifier(tiny_llama, max_sessions=3) as (address, server),
            aio_channel(address) as channel,
        ):
            stub: Any = verifier_pb2_grpc.VerifierServiceStub(channel)
            sessions = [VerifyStream(stub.Verify(timeout=60)) for _ in range(3)]
            streams = []
            for session in sessions:
                spec = all_of("llama").to_proto()
                ref = ref_of(await session.open(PROMPT, target_state_spec=spec, ignore_eos=True))
                request = target_state_pb2.StreamTargetStateRequest(session_id=ref.session_id)
                streams += [stub.StreamTargetState(request) for _ in range(MAX_STREAMS_PER_SESSION)]
            for stream in streams:
                assert await stream.read() is not grpc.aio.EOF
            await assert_answers(channel, stub.GetInfo(verifier_pb2.VerifierServiceGetInfoRequest()))
            for _ in range(2 * SPARE_STREAMS):
                with pytest.raises(ResourceExhaustedError):
                    await VerifyStream(stub.Verify(timeout=60)).open(PROMPT)
            for session in sessions:
                assert (await session.round()).committed_length == len(PROMPT) + 2
                session.call.cancel()
            verifier = server.servicer.verifier
            assert verifier is not None
            await until(lambda: verifier.num_sessions == verifier.export.num_streams == 0)

    async def test_a_full_drafter_answers_on_the_connection_that_has_all_its_sessions(self) -> None:
        async with running_drafter(max_sessions=3) as (address, _), aio_channel(address) as channel:
            stub: Any = drafter_pb2_grpc.DrafterServiceStub(channel)
            sessions = [DraftStream(stub.Draft(timeout=60)) for _ in range(3)]
            for session in sessions:
                await session.open("ngram", PROMPT)
            for _ in range(2 * SPARE_STREAMS):
                with pytest.raises(ResourceExhaustedError):
                    await DraftStream(stub.Draft(timeout=60)).open("ngram", PROMPT)
            for session in sessions:
                await session.round([5], len(PROMPT) + 1)
                session.call.cancel()


async def assert_answers(channel: grpc.aio.Channel, question: Awaitable[Any]) -> None:
    """Check that a question, and one about health, are answered."""
    health: Any = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(20):
        await question
        response = await health.Check(health_pb2.HealthCheckRequest())
    assert response.status == health_pb2.HealthCheckResponse.SERVING


async def connection(stack: AsyncExitStack, address: str, sent: bytes) -> asyncio.StreamReader:
    """Return what comes from a connection that sends these bytes and nothing else."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    stack.callback(writer.close)
    writer.write(sent)
    return reader


async def peer_of(stack: AsyncExitStack, address: str) -> DeafPeer:
    return await stack.enter_async_context(deaf_peer(address))


@asynccontextmanager
async def tls_host(folder: Path) -> AsyncIterator[ServiceHost]:
    """Run a server over TLS."""
    authority = Authority()
    files = Folder(folder).write(authority.issue(), authority).path
    tls = PemFiles(None, files / "key.pem", files / "cert.pem")
    host = ServiceHost("any", lambda _: None, "127.0.0.1:0", tls=tls)
    await host.start()
    yield host
    await host.stop(grace_s=0)


class TestIdle:
    @pytest.mark.parametrize("sent", [b"", PREFACE], ids=["nothing", "a preface"])
    async def test_a_connection_without_calls_ends(self, sent: bytes) -> None:
        async with serving(ConnectionLimits(idle_s=1.0)) as (host, _), AsyncExitStack() as stack:
            reader = await connection(stack, host.address, sent)
            async with asyncio.timeout(20):
                await reader.read()

    async def test_a_connection_that_only_pings_ends_and_one_with_a_call_does_not(self) -> None:
        async with serving(ConnectionLimits(idle_s=1.0)) as (host, servicer), AsyncExitStack() as stack:
            busy, idle = await peer_of(stack, host.address), await peer_of(stack, host.address)
            busy.call(WATCH, health_pb2.HealthCheckRequest().SerializeToString())
            client = await stack.enter_async_context(AsyncClient(host.address))
            answer = asyncio.ensure_future(client.generate(PROMPT))

            def has_ended() -> bool:
                if not idle.is_closed:
                    idle.ping()
                return idle.is_closed

            for _ in range(3):
                await until(has_ended)
                idle = await peer_of(stack, host.address)
            assert not busy.is_closed
            assert not answer.done()
            servicer.let.set()
            assert (await answer).seed == 7

    async def test_a_connection_over_tls_that_never_comes_about_ends(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("specdec.transport.server.HANDSHAKE_TIMEOUT_S", 1.0)
        async with tls_host(tmp_path) as host, AsyncExitStack() as stack:
            reader = await connection(stack, host.address, b"")
            async with asyncio.timeout(20):
                assert await reader.read() == b""

    async def test_clients_let_their_connection_go_and_call_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in ("transport.channel", "client.over_grpc"):
            monkeypatch.setattr(f"specdec.{module}.CLIENT_IDLE_S", 1.0)  # gRPC takes nothing shorter
        async with serving(ConnectionLimits()) as (host, servicer):
            servicer.let.set()
            with Client(host.address) as blocking:
                async with AsyncClient(host.address) as client:
                    for _ in range(3):
                        await client.info()
                        assert (await client.generate(PROMPT)).seed == 7
                        await asyncio.to_thread(blocking.info)
                        assert (await asyncio.to_thread(blocking.generate, PROMPT)).seed == 7
                        assert len(connections_to(host.address)) == 2
                        await until(lambda: not connections_to(host.address))

    async def test_clients_whose_connection_was_ended_call_again(self) -> None:
        async with serving(ConnectionLimits(idle_s=1.0)) as (host, servicer):
            servicer.let.set()
            with Client(host.address) as blocking:
                async with AsyncClient(host.address) as client:
                    seen: set[int] = set()
                    for _ in range(3):
                        assert (await client.generate(PROMPT)).seed == 7
                        assert (await asyncio.to_thread(blocking.generate, PROMPT)).seed == 7
                        seen |= (now := connections_to(host.address))
                        await until(lambda now=now: not now & connections_to(host.address))
                    assert len(seen) == 6

    async def test_a_system_with_idle_connections_answers(self, tiny_llama: Path) -> None:
        options = GenerateOptions(max_new_tokens=6, ignore_eos=True, method="ngram", draft_depth=4)
        async with (
            running_verifier(tiny_llama) as (verifier_at, _),
            running_drafter() as (drafter_at, _),
            running_gateway(tiny_llama, verifier=verifier_at, drafter=drafter_at, connection_idle_s=1.0) as (
                address,
                _,
            ),
            AsyncClient(address) as client,
        ):
            for _ in range(3):
                answer = await client.generate(PROMPT, options)
                assert (answer.num_failovers, answer.speculation.fallback_reason) == (0, "")
                now = connections_to(address)
                await until(lambda now=now: not now & connections_to(address))
