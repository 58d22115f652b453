"""Several replicas behind one gateway: who gets a session, who is noticed to be gone, who is never used."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from drafter_service.server import DrafterServer
from gateway.replicas import replica
from gateway.replicas.replica_set import ReplicaSet
from gateway.server import GatewayServer
from specdec.client import AsyncClient, GatewayInfo, GenerateOptions, VerifierInfo
from specdec.contract.errors import InvalidArgumentError, UnavailableError
from specdec.service.exporters import make_telemetry
from specdec.v1 import verifier_pb2, verifier_pb2_grpc
from tests.integration.gated_drafter import WAIT_S, Gate, eventually
from tests.systems import ANY_PORT, running_drafter, running_gateway, running_verifier
from tests.tiny_models import byte_tokenizer, save_tiny_model
from tests.unit.test_stats import points
from verifier_service.config import VerifierConfig
from verifier_service.server import VerifierServer

OPTIONS = GenerateOptions(method="none", max_new_tokens=4)
SERVING = health_pb2.HealthCheckResponse.SERVING
EVERY_BYTE = list(range(256))
"""A prompt after which prompt lookup of single tokens always has a guess."""


class Cluster:
    """Two verifiers and two drafters, each with a counter of its rounds, behind one gateway."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.verifiers: list[VerifierServer] = []
        self.drafters: list[DrafterServer] = []
        self.verifier_rounds: list[InMemoryMetricReader] = []
        self.drafter_rounds: list[InMemoryMetricReader] = []
        self.client: AsyncClient

    async def info(self) -> GatewayInfo:
        return await self.client.info()

    async def sessions(self) -> tuple[list[int], list[int]]:
        """Return the sessions per verifier and per drafter, as the gateway counts them."""
        info = await self.info()
        return [r.num_sessions for r in info.verifiers], [r.num_sessions for r in info.drafters]

    @asynccontextmanager
    async def held_sessions(self, count: int) -> AsyncIterator[None]:
        """Hold requests in mid-stream, all started at once, until the gate is opened."""
        options = GenerateOptions(method="gated", max_new_tokens=6, ignore_eos=True)
        tasks = [asyncio.create_task(self.client.generate([5, 6, 7], options)) for _ in range(count)]
        try:
            yield
        finally:
            self.gate.open()
            for result in await asyncio.gather(*tasks):
                assert result.usage.output_tokens == 6


@asynccontextmanager
async def running_cluster(model: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster()
    async with AsyncExitStack() as stack:
        addresses: tuple[list[str], list[str]] = [], []
        for _ in range(2):
            cluster.verifier_rounds.append(InMemoryMetricReader())
            telemetry = make_telemetry("verifier", metric_reader=cluster.verifier_rounds[-1])
            at, verifier = await stack.enter_async_context(running_verifier(model, telemetry=telemetry))
            cluster.verifiers.append(verifier)
            addresses[0].append(at)
            cluster.drafter_rounds.append(InMemoryMetricReader())
            telemetry = make_telemetry("drafter", metric_reader=cluster.drafter_rounds[-1])
            at, drafter = await stack.enter_async_context(
                running_drafter("ngram", "gated", telemetry=telemetry, families=cluster.gate.families)
            )
            cluster.drafters.append(drafter)
            addresses[1].append(at)
        gateway_at, _ = await stack.enter_async_context(
            running_gateway(
                model,
                verifier=",".join(addresses[0]),
                drafter=",".join(addresses[1]),
                draft_timeout_s=WAIT_S,
            )
        )
        cluster.client = await stack.enter_async_context(AsyncClient(gateway_at, timeout_s=60))
        stack.callback(cluster.gate.open)
        await eventually(lambda: all_ready(cluster.client))
        yield cluster


async def all_ready(client: AsyncClient) -> bool:
    info = await client.info()
    return all(replica.ready for replica in (*info.verifiers, *info.drafters))


def num_rounds(reader: InMemoryMetricReader, name: str) -> int:
    return sum(point.value for point in points(reader, name))


def num_drafters(gateway: GatewayServer) -> int:
    """Return how many drafter services a gateway may use."""
    assert gateway.generations.backends
    return gateway.generations.backends.drafters.num_ready


class TestSpreading:
    async def test_sessions_go_to_the_least_busy(self, tiny_llama: Path) -> None:
        async with running_cluster(tiny_llama) as cluster:

            async def are_even() -> bool:
                return await cluster.sessions() == ([2, 2], [2, 2])

            async with cluster.held_sessions(4):
                await eventually(are_even)
                served = [verifier.servicer.verifier for verifier in cluster.verifiers]
                await eventually(lambda: [verifier.num_sessions for verifier in served if verifier] == [2, 2])
                hosts = [drafter.servicer.host for drafter in cluster.drafters]
                await eventually(lambda: [host.num_sessions for host in hosts if host] == [2, 2])

            async def are_none() -> bool:
                return await cluster.sessions() == ([0, 0], [0, 0])

            await eventually(are_none)

    async def test_the_drafter_beside_the_verifier_goes_first(self, tiny_llama: Path) -> None:
        gate = Gate()
        options = GenerateOptions(method="gated", max_new_tokens=6, ignore_eos=True)
        async with (
            running_verifier(tiny_llama, listen="127.0.0.2:0") as (verifier_at, _),
            running_drafter("gated", families=gate.families) as (far_at, _),
            running_drafter("gated", families=gate.families, listen="127.0.0.2:0") as (near_at, near),
            running_gateway(
                tiny_llama, verifier=verifier_at, drafter=f"{far_at},{near_at}", draft_timeout_s=WAIT_S
            ) as (gateway_at, _),
            AsyncClient(gateway_at, timeout_s=60) as client,
        ):
            await eventually(lambda: all_ready(client))

            async def sessions_are(far: int, near: int) -> bool:
                return [drafter.num_sessions for drafter in (await client.info()).drafters] == [far, near]

            first = [asyncio.create_task(client.generate([5, 6, 7], options)) for _ in range(3)]
            await eventually(lambda: sessions_are(0, 3))
            await near.host.stop(grace_s=0)
            more = asyncio.create_task(client.generate([5, 6, 7], options))
            await eventually(lambda: sessions_are(1, 0))
            gate.open()
            for result in await asyncio.gather(*first, more):
                assert result.usage.output_tokens == 6

    async def test_a_session_stays_with_its_pair(self, tiny_llama: Path) -> None:
        async with running_cluster(tiny_llama) as cluster:
            options = GenerateOptions(method="ngram", draft_depth=4, max_new_tokens=40, ignore_eos=True)
            result = await cluster.client.generate([5, 6, 7, 5, 6, 7, 5, 6], options)
            for readers, name in (
                (cluster.verifier_rounds, "specdec.verifier.rounds"),
                (cluster.drafter_rounds, "specdec.drafter.rounds"),
            ):
                rounds = sorted(num_rounds(reader, name) for reader in readers)
                assert rounds[0] == 0
                assert rounds[1] >= result.speculation.num_rounds - 1 > 2

    async def test_info_shows_every_replica(self, tiny_llama: Path) -> None:
        async with running_cluster(tiny_llama) as cluster:
            info = await cluster.info()
            assert [replica.ready for replica in (*info.verifiers, *info.drafters)] == [True] * 4
            assert [replica.reason for replica in (*info.verifiers, *info.drafters)] == [""] * 4
            assert len({replica.uri for replica in (*info.verifiers, *info.drafters)}) == 4
            assert info.methods == ("none", "auto", "gated", "ngram")
            assert info.model
            for replica in info.verifiers:
                assert isinstance(replica.info, VerifierInfo)
                assert replica.info.model == info.model


class TestHealth:
    async def test_info_tells_the_load_of_now(self, tiny_llama: Path) -> None:
        async with running_cluster(tiny_llama) as cluster:

            async def shows_sessions() -> bool:
                infos = [replica.info for replica in (await cluster.info()).verifiers]
                assert all(isinstance(info, VerifierInfo) for info in infos)
                return all(i.num_sessions == 1 and i.kv_free_tokens < i.kv_capacity_tokens for i in infos)  # type: ignore[union-attr]

            async with cluster.held_sessions(2):
                await eventually(shows_sessions)

    async def test_a_stopped_replica_is_not_used_until_it_is_back(self, tiny_llama: Path) -> None:
        async with running_verifier(tiny_llama) as (stays_at, _), AsyncExitStack() as other:
            goes_at, _ = await other.enter_async_context(running_verifier(tiny_llama))
            async with (
                running_gateway(tiny_llama, verifier=f"{goes_at},{stays_at}") as (gateway_at, _),
                AsyncClient(gateway_at) as client,
            ):
                await eventually(lambda: all_ready(client))

                async def is_lost() -> bool:
                    return not (await client.info()).verifiers[0].ready

                await other.aclose()
                await eventually(is_lost)
                lost, kept = (await client.info()).verifiers
                # Cut off, told of the drain first, or tried again by now.
                ended = "the server ended the health watch"
                assert "UNAVAILABLE" in lost.reason or lost.reason in (ended, "not serving yet")
                assert lost.info
                assert kept.ready
                for _ in range(3):
                    await client.generate([1, 2], OPTIONS)

                reader = InMemoryMetricReader()
                telemetry = make_telemetry("verifier", metric_reader=reader)
                async with running_verifier(tiny_llama, listen=goes_at, telemetry=telemetry):
                    await eventually(lambda: all_ready(client))
                    assert num_rounds(reader, "specdec.verifier.rounds") == 0

                    async def is_used() -> bool:
                        await client.generate([1, 2], OPTIONS)
                        return num_rounds(reader, "specdec.verifier.rounds") > 0

                    await eventually(is_used)

    async def test_a_gateway_waits_for_a_drafter_as_long_as_it_is_told(self, tiny_llama: Path) -> None:
        async with running_verifier(tiny_llama) as (verifier_at, _), AsyncExitStack() as stack:
            async with running_drafter("ngram") as (drafter_at, _):
                pass  # nobody is there any more

            def gateway(wait_s: float) -> AbstractAsyncContextManager[tuple[str, GatewayServer]]:
                options = {"verifier": verifier_at, "drafter": drafter_at, "drafter_wait_s": wait_s}
                return running_gateway(tiny_llama, **options)

            async with asyncio.timeout(WAIT_S):
                _, impatient = await stack.enter_async_context(gateway(0.05))
            assert num_drafters(impatient) == 0
            starting = asyncio.create_task(stack.enter_async_context(gateway(60.0)))
            ended, _ = await asyncio.wait({starting}, timeout=0.3)
            assert not ended
            await stack.enter_async_context(running_drafter("ngram", listen=drafter_at))
            _, patient = await starting
            assert num_drafters(patient) == 1

    async def test_a_replica_that_is_not_serving_gets_nothing(self, tiny_llama: Path) -> None:
        config = VerifierConfig(model=str(tiny_llama), listen=ANY_PORT, dtype="float32", kv_cache_mib=1.0)
        server = VerifierServer(config, make_telemetry("verifier"))
        loading_at = await server.host.start()
        await server.load()
        try:
            async with (
                running_verifier(tiny_llama) as (ready_at, _),
                running_gateway(tiny_llama, verifier=f"{loading_at},{ready_at}") as (gateway_at, _),
                AsyncClient(gateway_at) as client,
            ):
                for _ in range(3):
                    await client.generate([1, 2], OPTIONS)
                loading, ready = (await client.info()).verifiers
                assert (loading.ready, ready.ready) == (False, True)
                assert loading.reason == "not serving yet"
                assert loading.info is None
                server.host.set_serving()
                await eventually(lambda: all_ready(client))
        finally:
            await server.host.stop(0)
            await server.close()

    async def test_a_draining_replica_gets_nothing_new(self, tiny_llama: Path) -> None:
        async with running_cluster(tiny_llama) as cluster, cluster.held_sessions(2):

            async def are_even() -> bool:
                return await cluster.sessions() == ([1, 1], [1, 1])

            async def is_draining() -> bool:
                return not (await cluster.info()).verifiers[0].ready

            await eventually(are_even)
            stopping = asyncio.create_task(cluster.verifiers[0].host.stop(WAIT_S))
            await eventually(is_draining)
            for _ in range(2):
                await cluster.client.generate([1, 2], OPTIONS)
            # What runs there goes on: held_sessions checks that every answer is whole.
            assert (await cluster.sessions())[0] == [1, 1]
            cluster.gate.open()
            async with asyncio.timeout(WAIT_S / 2):
                await stopping

    async def test_no_replica_is_named_with_its_reason(
        self, tiny_llama: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "gateway")
        async with AsyncExitStack() as verifier:
            verifier_at, _ = await verifier.enter_async_context(running_verifier(tiny_llama))
            async with (
                running_gateway(tiny_llama, verifier=verifier_at) as (gateway_at, _),
                AsyncClient(gateway_at) as client,
            ):
                await client.generate([1, 2], OPTIONS)
                await verifier.aclose()

                async def is_lost() -> bool:
                    return not (await client.info()).verifiers[0].ready

                await eventually(is_lost)
                with pytest.raises(UnavailableError, match=verifier_at) as caught:
                    await client.generate([1, 2], OPTIONS)
                assert caught.value.reason == "NO_REPLICA"
                assert caught.value.retry_after_s
        records = [vars(record) for record in caplog.records if record.message == "replica lost"]
        assert {record["peer_service"] for record in records} == {"specdec.v1.VerifierService"}
        assert not any("service" in record for record in records), "it is the gateway's own in its records"

    @pytest.mark.parametrize(
        ("code", "answer"),
        [
            (grpc.StatusCode.OK, None),
            (grpc.StatusCode.UNIMPLEMENTED, None),
            (None, InvalidArgumentError("of no use")),
            (None, ValueError("nonsense")),
        ],
        ids=["it ends", "no health service", "refused", "nonsense"],
    )
    async def test_a_watch_that_ended_begins_again_after_a_pause(
        self,
        code: grpc.StatusCode | None,
        answer: Exception | None,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        caplog.set_level(logging.INFO, "gateway")
        pause_s = 0.1
        monkeypatch.setattr(replica, "_RETRY_S", pause_s)
        monkeypatch.setattr(replica, "_REFUSED_RETRY_S", pause_s)
        health = ShortWatches(code)

        async def get_info(channel: grpc.aio.Channel) -> object:
            assert answer
            raise answer

        server = grpc.aio.server()
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        port = server.add_insecure_port(ANY_PORT)
        await server.start()
        # Without a name of a service the channel itself watches nothing.
        watching = ReplicaSet("", [f"127.0.0.1:{port}"], get_info=get_info, check=lambda info: None)
        try:
            await eventually(lambda: len(health.begun) >= 3)
            assert min(after - before for before, after in pairwise(health.begun)) > 0.9 * pause_s
            assert not watching.num_ready
            assert watching.replicas[0].reason != "not serving yet"
            messages = {record.message for record in caplog.records}
            assert "replica not reachable" in messages
            assert "replica lost" not in messages, "it was never there"
        finally:
            await watching.close()
            await server.stop(0)


class ShortWatches(health_pb2_grpc.HealthServicer):
    """Health whose watches end with a code at once; None: they go on, SERVING."""

    def __init__(self, code: grpc.StatusCode | None) -> None:
        self._code = code
        self.begun: list[float] = []

    async def Watch(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> None:
        self.begun.append(time.monotonic())
        if self._code is None:
            await context.write(health_pb2.HealthCheckResponse(status=SERVING))
            await asyncio.Event().wait()
        elif self._code is not grpc.StatusCode.OK:
            await context.abort(self._code)


class TestFitting:
    async def test_a_verifier_with_another_vocabulary_is_never_used(
        self, tiny_llama: Path, tmp_path: Path
    ) -> None:
        stranger = save_tiny_model(tmp_path / "stranger")
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["stranger"])
        tokenizer.save_pretrained(stranger)
        async with (
            running_verifier(stranger) as (stranger_at, other),
            running_verifier(tiny_llama) as (good_at, _),
            running_gateway(tiny_llama, verifier=f"{stranger_at},{good_at}") as (gateway_at, _),
            AsyncClient(gateway_at) as client,
        ):

            async def is_refused() -> bool:
                return "vocabularies differ" in (await client.info()).verifiers[0].reason

            await eventually(is_refused)
            results = await asyncio.gather(*(client.generate([1, 2], OPTIONS) for _ in range(4)))
            assert {result.model_id for result in results} == {tiny_llama.name}
            refused, used = (await client.info()).verifiers
            assert (refused.ready, used.ready) == (False, True)
            assert other.servicer.verifier
            assert other.servicer.verifier.num_sessions == 0

    async def test_a_session_goes_where_its_drafter_is(self, tiny_llama: Path) -> None:
        async with (
            running_verifier(tiny_llama) as (verifier_at, _),
            running_drafter("lookup=ngram") as (first_at, _),
            running_drafter("ngram") as (second_at, _),
            running_gateway(tiny_llama, verifier=verifier_at, drafter=f"{first_at},{second_at}") as (
                gateway_at,
                _,
            ),
            AsyncClient(gateway_at) as client,
        ):
            await eventually(lambda: all_ready(client))
            for method in ("ngram", "lookup", "ngram"):
                options = GenerateOptions(method=method, draft_depth=4, max_new_tokens=12, ignore_eos=True)
                result = await client.generate(EVERY_BYTE, options)
                assert result.speculation.method == method
                assert result.speculation.num_draft_tokens > 0
                assert result.speculation.num_fallback_rounds == 0

    async def test_unix_sockets_work_throughout(self, tiny_llama: Path) -> None:
        # A socket's path may have 107 bytes, less than pytest's own folders need.
        with tempfile.TemporaryDirectory() as folder:
            verifier_uri, drafter_uri, gateway_uri = (
                f"unix:{folder}/{name}.sock" for name in ("verifier", "drafter", "gateway")
            )
            async with (
                running_verifier(tiny_llama, listen=verifier_uri),
                running_drafter("ngram", listen=drafter_uri),
                running_gateway(tiny_llama, verifier=verifier_uri, drafter=drafter_uri, listen=gateway_uri),
                AsyncClient(gateway_uri) as client,
            ):
                options = GenerateOptions(method="ngram", draft_depth=4, max_new_tokens=12, ignore_eos=True)
                result = await client.generate(EVERY_BYTE, options)
                assert len(result.token_ids) == 12
                assert result.speculation.num_draft_tokens > 0
                info = await client.info()
                assert [replica.uri for replica in (*info.verifiers, *info.drafters)] == [
                    verifier_uri,
                    drafter_uri,
                ]


async def test_replicas_are_asked_how_busy_they_are_once_for_all_who_ask(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "LOAD_INTERVAL_S", 3600.0)
    asked = 0

    async def get_info(channel: grpc.aio.Channel) -> object:
        nonlocal asked
        asked += 1
        stub: Any = verifier_pb2_grpc.VerifierServiceStub(channel)
        return await stub.GetInfo(verifier_pb2.VerifierServiceGetInfoRequest())

    async with running_verifier(tiny_llama) as (address, _):
        replicas = ReplicaSet[Any](
            "specdec.v1.VerifierService", [address], get_info=get_info, check=lambda info: None
        )
        await replicas.wait_until_ready()
        asked_before = asked
        await asyncio.gather(*(replicas.refresh() for _ in range(20)))
        await replicas.refresh()
        assert asked == asked_before + 1
        await until_asked_again(replicas, lambda: asked > asked_before + 1)
        await replicas.close()


async def until_asked_again(replicas: ReplicaSet[Any], was_asked: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not was_asked():
            await replicas.refresh()
            await asyncio.sleep(0.05)
