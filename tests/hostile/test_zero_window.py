"""Peers that read nothing of what they asked for: they wait, and nobody else does."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specdec.client import AsyncClient, GenerateOptions
from specdec.contract.errors import DeadlineExceededError
from specdec.local.launcher import SystemConfig, service_specs
from specdec.local.processes import ServiceGroup
from specdec.service import health
from specdec.service.host import ServiceHost
from specdec.transport.channel import aio_channel
from specdec.v1 import gateway_pb2, target_state_pb2
from tests.leftovers import nothing_left_behind
from tests.raw_streams import until
from tests.state_probe import all_of, state_session
from tests.systems import running_system, running_verifier
from tests.zero_window import DeafPeer, deaf_peer

SERVICE = "specdec.v1.TestService"
WATCH = "/grpc.health.v1.Health/Watch"
PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
ANY_PORT = "127.0.0.1:0"


def watch_of(service: str = SERVICE) -> bytes:
    return health_pb2.HealthCheckRequest(service=service).SerializeToString()


@asynccontextmanager
async def watching(address: str, service: str = SERVICE) -> AsyncIterator[Any]:
    """Watch as one who reads."""
    async with aio_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        yield stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=30)


async def test_a_watcher_that_reads_nothing_holds_nobody_up() -> None:
    async with nothing_left_behind():
        host = ServiceHost(SERVICE, lambda _: None, ANY_PORT, health_listen=ANY_PORT)
        await host.start()
        async with deaf_peer(host.address) as deaf, deaf_peer(host.health_address) as other:
            for peer in (deaf, other):
                for name in (SERVICE, "", health.LIVENESS, "unknown"):
                    peer.call(WATCH, watch_of(name))
            await until(lambda: host.num_watches == 8)
            async with watching(host.address) as watch, watching(host.health_address) as late:
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                host.set_serving()
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
                assert (await late.read()).status in (1, 2)
                begun = time.monotonic()
                await host.stop(grace_s=60)
                assert time.monotonic() - begun < 30
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
                assert await watch.read() is grpc.aio.EOF


async def test_a_host_has_so_many_watches_and_others_have_theirs() -> None:
    host = ServiceHost(SERVICE, lambda _: None, ANY_PORT)
    host.limit_watches(2)
    await host.start()
    async with deaf_peer(host.address) as deaf:
        for _ in range(5):
            deaf.call(WATCH, watch_of())
        await until(lambda: len(deaf.ended) == 3)
        assert {dict(trailers)["grpc-status"] for trailers in deaf.ended.values()} == {"8"}
        assert host.num_watches == 2
        async with watching(host.address) as refused:
            with pytest.raises(grpc.aio.AioRpcError, match="2 times already") as raised:
                await refused.read()
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await until(lambda: host.num_watches == 0)
    async with watching(host.address) as watch:
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    await host.stop(grace_s=0)


async def test_a_client_may_ping_as_often_as_it_likes_while_a_call_is_silent() -> None:
    host = ServiceHost(SERVICE, lambda _: None, ANY_PORT)
    await host.start()
    async with deaf_peer(host.address) as peer:
        peer.call(WATCH, watch_of())
        await until(lambda: host.num_watches == 1)
        for _ in range(100):
            peer.ping()
            await asyncio.sleep(0.01)
        assert not peer.is_closed
        assert host.num_watches == 1
    await host.stop(grace_s=0)


def deaf_generate(peer: DeafPeer) -> None:
    request = gateway_pb2.GenerateRequest(
        token_ids=gateway_pb2.TokenIds(token_ids=PROMPT), max_new_tokens=30, ignore_eos=True
    )
    peer.call("/specdec.v1.GatewayService/Generate", request.SerializeToString())


async def test_a_client_that_reads_nothing_keeps_others_and_the_drain_from_nothing(tiny_llama: Path) -> None:
    async with running_system(tiny_llama, "ngram") as system, deaf_peer(system.address) as deaf:
        servicer = system.gateway.generations
        for _ in range(3):
            deaf_generate(deaf)
        await until(lambda: servicer.num_requests == 3)
        options = GenerateOptions(max_new_tokens=20, ignore_eos=True)
        assert len((await system.client.generate(PROMPT, options)).token_ids) == 20
        async with AsyncClient(system.address) as client:
            assert (await client.info()).methods == ("none", "auto", "ngram")
        begun = time.monotonic()
        await system.gateway.host.stop(grace_s=0.5)
        assert time.monotonic() - begun < 20
        await until(lambda: servicer.num_requests == 0)
        verifier = system.verifier.servicer.verifier
        assert verifier is not None
        await until(lambda: verifier.num_sessions == 0)


async def test_a_request_that_nobody_reads_ends_when_its_time_is_over(tiny_llama: Path) -> None:
    async with running_system(tiny_llama, "ngram", gateway_options={"max_request_s": 1.0}) as system:
        async with deaf_peer(system.address) as deaf:
            deaf_generate(deaf)
            await until(lambda: system.gateway.generations.num_requests == 1)
            await until(lambda: system.gateway.generations.num_requests == 0)
        options = GenerateOptions(max_new_tokens=20, ignore_eos=True)
        assert len((await system.client.generate(PROMPT, options)).token_ids) == 20


async def test_a_request_that_takes_too_long_says_so(tiny_llama: Path) -> None:
    async with running_system(tiny_llama, "ngram", gateway_options={"max_request_s": 0.2}) as system:
        options = GenerateOptions(max_new_tokens=500, ignore_eos=True, method="none")
        with pytest.raises(DeadlineExceededError, match=r"longer than 0\.2 s") as raised:
            await system.client.generate(PROMPT, options)
        assert raised.value.reason == "REQUEST_TOO_LONG"
        verifier = system.verifier.servicer.verifier
        assert verifier is not None
        await until(lambda: verifier.num_sessions == 0)


async def test_state_that_a_deaf_peer_asks_for_ends_with_its_session(tiny_llama: Path) -> None:
    async with running_verifier(tiny_llama) as (address, server):
        verifier = server.servicer.verifier
        assert verifier is not None
        async with deaf_peer(address) as deaf:
            async with state_session(address, PROMPT, all_of("llama")) as (verify, ref):
                request = target_state_pb2.StreamTargetStateRequest(session_id=ref.session_id)
                deaf.call("/specdec.v1.VerifierService/StreamTargetState", request.SerializeToString())
                await until(lambda: verifier.export.num_streams == 1)
                assert (await verify.round()).committed_length == len(PROMPT) + 2
            server.servicer.write_timeout_s = 0.5
            begun = time.monotonic()
            await server.host.stop(grace_s=0.5)
            assert time.monotonic() - begun < 20
            await until(lambda: verifier.num_sessions == verifier.export.num_streams == 0)


@pytest.mark.parametrize("name", ["verifier", "drafter"])
async def test_a_process_with_deaf_watchers_becomes_ready_for_others_and_drains(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    config = SystemConfig(model=str(tiny_llama), dtype="float32", drafters=("ngram",))
    specs = [spec for spec in service_specs(config) if spec.name == name]
    group = ServiceGroup(specs, tmp_path, env={"OMP_NUM_THREADS": "1"}, ready_timeout_s=60)
    await asyncio.to_thread(group.start)
    try:
        (process,) = group.services
        async with deaf_peer(process.spec.address) as deaf:
            for _ in range(20):
                deaf.call(WATCH, watch_of(""))
            async with watching(process.spec.address, "") as watch:
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
                os.kill(process.pid, signal.SIGTERM)
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            await until(lambda: process.exit_code is not None, 30)
            assert process.exit_code == 0
    finally:
        await asyncio.to_thread(group.stop, 5)
