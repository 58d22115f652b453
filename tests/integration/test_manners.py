"""How the services behave towards operators and clients: health, reflection, drain, deadlines, overload."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from drafter_service.config import DrafterConfig
from drafter_service.server import DrafterServer
from drafter_service.service import SERVICE_NAME as DRAFTER
from gateway.config import GatewayConfig
from gateway.server import GatewayServer
from gateway.service import SERVICE_NAME as GATEWAY
from specdec.client import AsyncClient, Client, GenerateOptions
from specdec.contract.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
    from_rpc_error,
)
from specdec.contract.protocol import PROTOCOL_VERSION
from specdec.service.exporters import make_telemetry
from specdec.service.health import LIVENESS
from specdec.service.host import ServiceHost
from specdec.service.shared_call import serve_many
from specdec.transport.channel import MAX_MESSAGE_BYTES, aio_channel, client_options
from specdec.transport.server import server_options
from specdec.transport.tls import PemFiles
from specdec.v1 import (
    drafter_pb2,
    drafter_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    verifier_pb2,
    verifier_pb2_grpc,
)
from tests.certificates import Authority, Folder
from tests.integration.gated_drafter import WAIT_S, eventually, eventually_offers, gated_system
from tests.leftovers import connections_to
from tests.raw_streams import draft_stream, verify_stream
from tests.state_probe import StateProbe, all_of
from tests.systems import (
    ANY_PORT,
    is_idle,
    running_drafter,
    running_gateway,
    running_system,
    running_verifier,
)
from verifier_service.config import VerifierConfig
from verifier_service.server import VerifierServer
from verifier_service.service import SERVICE_NAME as VERIFIER

PROMPT = [5, 6, 7]
GATED = GenerateOptions(method="gated", max_new_tokens=6, ignore_eos=True)
PLAIN = GenerateOptions(method="none", max_new_tokens=6, ignore_eos=True)
SERVICES = [VERIFIER, DRAFTER, GATEWAY]
Status = health_pb2.HealthCheckResponse

_STUBS: dict[str, tuple[Any, Any, str, Any]] = {
    VERIFIER: (
        verifier_pb2_grpc.VerifierServiceStub,
        verifier_pb2.VerifierServiceGetInfoRequest,
        "Verify",
        verifier_pb2.VerifyRequest,
    ),
    DRAFTER: (
        drafter_pb2_grpc.DrafterServiceStub,
        drafter_pb2.DrafterServiceGetInfoRequest,
        "Draft",
        drafter_pb2.DraftRequest,
    ),
    GATEWAY: (
        gateway_pb2_grpc.GatewayServiceStub,
        gateway_pb2.GatewayServiceGetInfoRequest,
        "Generate",
        gateway_pb2.GenerateRequest,
    ),
}


@asynccontextmanager
async def unloaded(service: str, model: Path) -> AsyncIterator[tuple[str, Any]]:
    """Start a server of a service whose model is never loaded."""
    telemetry = make_telemetry("test")
    async with AsyncExitStack() as stack:
        server: Any
        if service == VERIFIER:
            config = VerifierConfig(listen=ANY_PORT, model=str(model), dtype="float32", kv_cache_mib=1.0)
            server = VerifierServer(config, telemetry)
        elif service == DRAFTER:
            server = DrafterServer(DrafterConfig(listen=ANY_PORT), telemetry)
        else:
            verifier_at, _ = await stack.enter_async_context(running_verifier(model))
            server = GatewayServer(
                GatewayConfig(listen=ANY_PORT, verifier=verifier_at, drafter="", tokenizer=str(model)),
                telemetry,
            )
        address = await server.host.start()
        try:
            yield address, server
        finally:
            await server.host.stop(0)
            await server.close()


async def health(channel: grpc.aio.Channel, service: str) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    response = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=WAIT_S)
    return int(response.status)


async def call_streaming(channel: grpc.aio.Channel, service: str) -> None:
    """Start the service's streaming RPC with an empty message and read one answer."""
    stub_type, _, name, message_type = _STUBS[service]
    method = getattr(stub_type(channel), name)
    call = method(message_type()) if service == GATEWAY else method(iter([message_type()]))
    await call.read()


class TestHealth:
    @pytest.mark.parametrize("service", SERVICES)
    async def test_not_serving_until_loaded(self, service: str, tiny_llama: Path) -> None:
        stub_type, info_request, _, _ = _STUBS[service]
        async with (
            unloaded(service, tiny_llama) as (address, server),
            grpc.aio.insecure_channel(address) as channel,
        ):
            for name in ("", service):
                assert await health(channel, name) == Status.NOT_SERVING
            for call in (stub_type(channel).GetInfo(info_request()), call_streaming(channel, service)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                error = from_rpc_error(caught.value)
                assert isinstance(error, UnavailableError)
                assert "loading" in error.message
                assert error.retry_after_s

            await server.load()
            assert await health(channel, service) == Status.NOT_SERVING
            server.host.set_serving()
            for name in ("", service):
                assert await health(channel, name) == Status.SERVING
            assert (await stub_type(channel).GetInfo(info_request())).protocol_version == PROTOCOL_VERSION

    async def test_an_unknown_service_is_not_found(self, tiny_llama: Path) -> None:
        async with (
            running_verifier(tiny_llama) as (address, _),
            grpc.aio.insecure_channel(address) as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await health(channel, GATEWAY)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND

    @pytest.mark.parametrize("service", SERVICES)
    async def test_a_watch_sees_every_change_and_ends_with_the_drain(
        self, service: str, tiny_llama: Path
    ) -> None:
        async with (
            unloaded(service, tiny_llama) as (address, server),
            grpc.aio.insecure_channel(address) as channel,
        ):
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=service))
            assert (await watch.read()).status == Status.NOT_SERVING
            server.host.set_serving()
            assert (await watch.read()).status == Status.SERVING
            async with asyncio.timeout(WAIT_S / 2):
                await server.host.stop(WAIT_S)
            assert (await watch.read()).status == Status.NOT_SERVING


@pytest.mark.parametrize("service", SERVICES)
async def test_reflection_describes_the_service(service: str, tiny_llama: Path) -> None:
    async with (
        unloaded(service, tiny_llama) as (address, _),
        grpc.aio.insecure_channel(address) as channel,
    ):
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
        requests = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=service),
        ]
        listed, described = [response async for response in stub.ServerReflectionInfo(iter(requests))]
        names = {entry.name for entry in listed.list_services_response.service}
        assert names == {service, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
        assert described.file_descriptor_response.file_descriptor_proto


class TestDrain:
    @pytest.mark.parametrize("stopped", ["gateway", "verifier", "drafter"])
    async def test_what_runs_is_finished_before_the_server_stops(
        self, stopped: str, tiny_llama: Path
    ) -> None:
        async with gated_system(tiny_llama) as (system, gate):
            expected = await system.client.generate(PROMPT, PLAIN)
            running = asyncio.create_task(system.client.generate(PROMPT, GATED))
            await gate.reached()
            stopping = asyncio.create_task(getattr(system, stopped).host.stop(WAIT_S))

            async def is_refused() -> bool:
                try:
                    await system.client.generate(PROMPT, PLAIN)
                except UnavailableError:
                    return True
                return False

            async def drafter_is_lost() -> bool:
                return not (await system.client.info()).drafters[0].ready

            await eventually(drafter_is_lost if stopped == "drafter" else is_refused)
            assert not running.done()
            assert not stopping.done()
            gate.open()
            result = await running
            assert result.token_ids == expected.token_ids
            assert result.speculation.num_fallback_rounds == 0
            async with asyncio.timeout(WAIT_S / 2):
                await stopping

    @pytest.mark.parametrize(
        ("stopped", "reason"), [("gateway", "GATEWAY_UNREACHABLE"), ("verifier", "PEER_LOST")]
    )
    async def test_what_outlasts_the_grace_was_lost(
        self, stopped: str, reason: str, tiny_llama: Path
    ) -> None:
        async with gated_system(tiny_llama) as (system, gate):
            running = asyncio.create_task(system.client.generate(PROMPT, GATED))
            await gate.reached()
            async with asyncio.timeout(WAIT_S / 2):
                await getattr(system, stopped).host.stop(0.1)
            gate.open()
            with pytest.raises(UnavailableError) as caught:
                await running
            assert caught.value.reason == reason
            verifier = system.verifier.servicer.verifier
            assert verifier
            await eventually(lambda: verifier.num_sessions == 0)

    async def test_an_idle_server_stops_at_once(self, tiny_llama: Path) -> None:
        async with running_system(tiny_llama) as system:
            await system.client.generate(PROMPT, PLAIN)
            for server in (system.gateway, system.drafter, system.verifier):
                async with asyncio.timeout(WAIT_S / 2):
                    await server.host.stop(WAIT_S)


async def test_who_has_stopped_holds_no_connection(tiny_llama: Path) -> None:
    def is_left_alone(address: str) -> bool:
        gc.collect()  # what only a traceback keeps alive is not a leftover
        return not connections_to(address)

    probe = StateProbe(all_of("llama"))
    options = GenerateOptions(method="probe", max_new_tokens=6, ignore_eos=True)
    async with running_verifier(tiny_llama) as (verifier_at, _):
        async with running_drafter("probe", families=probe.families, target_state="stream") as (
            drafter_at,
            drafter,
        ):
            async with (
                running_gateway(tiny_llama, verifier=verifier_at, drafter=drafter_at) as (address, gateway),
                AsyncClient(address, timeout_s=60) as client,
            ):
                await eventually_offers(client, "probe")
                answer = await client.generate(PROMPT, options)
                assert not answer.speculation.fallback_reason
                assert connections_to(drafter_at)
            await eventually(lambda: is_left_alone(drafter_at))
            assert connections_to(verifier_at), "the drafter's"
        await eventually(lambda: is_left_alone(verifier_at))
        # Held on to until now: what they have is not free because nobody refers to it.
        assert gateway.generations.backends
        assert drafter.servicer.host


class RecordingVerifier(verifier_pb2_grpc.VerifierServiceServicer):  # type: ignore[misc]
    """Stands before a verifier and notes the time each session is given."""

    def __init__(self, inner: VerifierServer) -> None:
        self.timeouts_s: list[float | None] = []
        self._inner = inner.servicer
        self.GetInfo = inner.servicer.GetInfo

    async def Verify(self, requests: Any, context: Any) -> None:  # noqa: N802
        self.timeouts_s.append(context.time_remaining())
        await self._inner.Verify(requests, context)

    async def VerifyMany(self, requests: Any, context: Any) -> None:  # noqa: N802
        await serve_many(self.Verify, requests, context, verifier_pb2.VerifyManyResponse)


class LosingVerifier(RecordingVerifier):
    """Loses its first session after it was held for some time."""

    held_s = 0.4
    """gRPC may send a deadline that was sent before in place of one up to 3 % sooner."""

    async def Verify(self, requests: Any, context: Any) -> None:  # noqa: N802
        if not self.timeouts_s:
            self.timeouts_s.append(context.time_remaining())
            await asyncio.sleep(self.held_s)
            raise UnavailableError("lost")
        await super().Verify(requests, context)


class RecordingDrafter(drafter_pb2_grpc.DrafterServiceServicer):  # type: ignore[misc]
    """Stands before a drafter service and notes the time each session is given."""

    def __init__(self, inner: DrafterServer) -> None:
        self.timeouts_s: list[float | None] = []
        self._inner = inner.servicer
        self.GetInfo = inner.servicer.GetInfo

    async def Draft(self, requests: Any, context: Any) -> None:  # noqa: N802
        self.timeouts_s.append(context.time_remaining())
        await self._inner.Draft(requests, context)

    async def DraftMany(self, requests: Any, context: Any) -> None:  # noqa: N802
        await serve_many(self.Draft, requests, context, drafter_pb2.DraftManyResponse)


@asynccontextmanager
async def serving(service: str, register: Callable[[grpc.aio.Server], None]) -> AsyncIterator[str]:
    """Run a server of one servicer and yield its address."""
    host = ServiceHost(service, register, ANY_PORT)
    address = await host.start()
    host.set_serving()
    try:
        yield address
    finally:
        await host.stop(0)


class TestHealthPort:
    @pytest.fixture
    async def host(self, tmp_path: Path) -> AsyncIterator[ServiceHost]:
        """Run a host that demands certificates on its port and has another port for health checks."""
        authority = Authority()
        files = Folder(tmp_path).write(authority.issue(), authority)
        tls = PemFiles(files.path / "ca.pem", files.path / "key.pem", files.path / "cert.pem")
        host = ServiceHost(VERIFIER, lambda _: None, ANY_PORT, tls=tls, health_listen=ANY_PORT)
        await host.start()
        try:
            yield host
        finally:
            await host.stop(0)

    async def test_it_tells_health_in_plaintext(self, host: ServiceHost) -> None:
        assert await self.statuses(host) == [Status.NOT_SERVING, Status.SERVING]
        host.set_serving()
        assert await self.statuses(host) == [Status.SERVING, Status.SERVING]

    async def test_it_offers_nothing_else(self, host: ServiceHost) -> None:
        async with aio_channel(host.health_address) as channel:
            stub: Any = verifier_pb2_grpc.VerifierServiceStub(channel)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.GetInfo(verifier_pb2.VerifierServiceGetInfoRequest(), timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    async def test_it_tells_of_a_drain_until_the_end(self, host: ServiceHost) -> None:
        host.set_serving()
        async with aio_channel(host.health_address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=VERIFIER), timeout=10)
            assert (await watch.read()).status == Status.SERVING
            await host.stop(0)
            assert (await watch.read()).status == Status.NOT_SERVING

    async def test_an_address_in_use_is_refused(self, host: ServiceHost) -> None:
        other = ServiceHost(VERIFIER, lambda _: None, ANY_PORT, health_listen=host.health_address)
        with pytest.raises(InvalidArgumentError, match="--health-listen"):
            await other.start()
        await other.stop(0)

    async def statuses(self, host: ServiceHost) -> list[int]:
        async with aio_channel(host.health_address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            requests = [health_pb2.HealthCheckRequest(service=name) for name in (VERIFIER, LIVENESS)]
            return [(await stub.Check(request, timeout=10)).status for request in requests]


class TestDeadlines:
    async def test_a_deadline_ends_the_request_and_frees_everything(self, tiny_llama: Path) -> None:
        async with gated_system(tiny_llama) as (system, gate):
            started = time.monotonic()
            with pytest.raises(DeadlineExceededError):
                await system.client.generate(PROMPT, GATED, timeout_s=0.4)
            assert time.monotonic() - started < WAIT_S / 2
            await eventually(lambda: is_idle(system))
            gate.open()
            result = await system.client.generate(PROMPT, GATED)
            assert result.usage.output_tokens == 6

    async def test_a_blocking_client_gets_the_same_error(self, tiny_llama: Path) -> None:
        async with gated_system(tiny_llama) as (system, _):

            def generate() -> None:
                with Client(system.address) as client:
                    client.generate(PROMPT, GATED, timeout_s=0.4)

            with pytest.raises(DeadlineExceededError):
                await asyncio.to_thread(generate)
            await eventually(lambda: is_idle(system))

    async def test_deadlines_are_forwarded(self, tiny_llama: Path) -> None:
        options = GenerateOptions(method="ngram", max_new_tokens=6, ignore_eos=True)
        async with (
            running_verifier(tiny_llama) as (_, verifier_server),
            running_drafter("ngram") as (_, drafter_server),
        ):
            verifier, drafter = RecordingVerifier(verifier_server), RecordingDrafter(drafter_server)
            add_verifier = partial(verifier_pb2_grpc.add_VerifierServiceServicer_to_server, verifier)
            add_drafter = partial(drafter_pb2_grpc.add_DrafterServiceServicer_to_server, drafter)
            async with (
                serving(VERIFIER, add_verifier) as verifier_at,
                serving(DRAFTER, add_drafter) as drafter_at,
                running_gateway(tiny_llama, verifier=verifier_at, drafter=drafter_at) as (gateway_at, _),
                AsyncClient(gateway_at, timeout_s=None) as client,
            ):
                await client.generate(PROMPT, options, timeout_s=100)
                await client.generate(PROMPT, options)
        for given in (verifier.timeouts_s, drafter.timeouts_s):
            with_deadline, without = given
            assert with_deadline is not None
            assert 50 < with_deadline < 105  # gRPC rounds a deadline up
            assert without is not None
            assert 800 < without < 905, "without a deadline of the caller's the gateway's own counts"

    async def test_who_takes_over_a_lost_session_gets_what_is_left_of_it(self, tiny_llama: Path) -> None:
        async with running_verifier(tiny_llama) as (_, server):
            verifier = LosingVerifier(server)
            add_verifier = partial(verifier_pb2_grpc.add_VerifierServiceServicer_to_server, verifier)
            async with (
                serving(VERIFIER, add_verifier) as verifier_at,
                running_gateway(tiny_llama, verifier=verifier_at, failover_wait_s=WAIT_S) as (gateway_at, _),
                AsyncClient(gateway_at, timeout_s=8) as client,
            ):
                assert (await client.generate(PROMPT, PLAIN)).num_failovers == 1
        lost_s, taken_over_s = verifier.timeouts_s
        assert lost_s is not None
        assert taken_over_s is not None
        assert taken_over_s < lost_s - 0.75 * LosingVerifier.held_s


class TestCancellation:
    async def test_a_client_that_leaves_frees_everything(self, tiny_llama: Path) -> None:
        async with gated_system(tiny_llama) as (system, gate):
            async with system.client.stream(PROMPT, GATED):
                await gate.reached()
                assert not await is_idle(system)
            await eventually(lambda: is_idle(system))


class TestOverload:
    async def test_one_request_too_many_is_told_to_come_back(self, tiny_llama: Path) -> None:
        async with gated_system(tiny_llama, gateway_options={"max_requests": 1, "max_waiting": 0}) as (
            system,
            gate,
        ):
            running = asyncio.create_task(system.client.generate(PROMPT, GATED))
            await gate.reached()
            with pytest.raises(ResourceExhaustedError) as caught:
                await system.client.generate(PROMPT, PLAIN)
            assert caught.value.reason == "TOO_MANY_REQUESTS"
            assert caught.value.retry_after_s
            gate.open()
            assert (await running).usage.output_tokens == 6
            await eventually(lambda: is_idle(system))
            assert (await system.client.generate(PROMPT, PLAIN)).usage.output_tokens == 6

    @pytest.mark.parametrize(
        ("verifier_options", "reason"),
        [({"max_sessions": 1}, "NO_SESSION_SLOT"), ({"kv_cache_mib": 0.03125}, "KV_POOL_FULL")],
    )
    async def test_a_full_verifier_is_told_to_the_client(
        self, tiny_llama: Path, verifier_options: dict[str, Any], reason: str
    ) -> None:
        async with gated_system(
            tiny_llama, verifier_options=verifier_options, gateway_options={"max_waiting": 0}
        ) as (system, gate):
            half = GenerateOptions(method="gated", max_new_tokens=37, ignore_eos=True)
            running = asyncio.create_task(system.client.generate(PROMPT, half))
            await gate.reached()
            with pytest.raises(ResourceExhaustedError) as caught:
                await system.client.generate(PROMPT, half)
            assert caught.value.reason == reason
            assert caught.value.retry_after_s
            gate.open()
            assert (await running).usage.output_tokens == 37

    async def test_a_full_drafter_costs_speed_only(self, tiny_llama: Path) -> None:
        async with gated_system(tiny_llama, drafter_options={"max_sessions": 1}) as (system, gate):
            expected = await system.client.generate(PROMPT, PLAIN)
            running = asyncio.create_task(system.client.generate(PROMPT, GATED))
            await gate.reached()
            result = await system.client.generate(PROMPT, GATED)
            assert result.token_ids == expected.token_ids
            assert result.speculation.num_fallback_rounds > 0
            assert "slots are taken" in result.speculation.fallback_reason
            gate.open()
            assert (await running).token_ids == expected.token_ids


class TestIdleSessions:
    async def test_they_end_and_their_memory_is_free(self, tiny_llama: Path) -> None:
        async with (
            running_verifier(tiny_llama, idle_timeout_s=0.3) as (verifier_at, verifier),
            running_drafter("ngram", idle_timeout_s=0.3) as (drafter_at, drafter),
            verify_stream(verifier_at) as verify,
            verify_stream(verifier_at) as never_opened,
            draft_stream(drafter_at) as draft,
        ):
            await never_opened.call.wait_for_connection()
            await verify.open([1, 2, 3], max_new_tokens=50)
            await draft.open("ngram", [1, 2, 3], max_length=50)
            for _ in range(4):
                # Messages keep a session alive, however long it is.
                await asyncio.sleep(0.1)
                await verify.round()
            for stream in (verify, never_opened, draft):
                assert await stream.call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                assert "open a new one" in await stream.call.details()
            held = verifier.servicer.verifier
            assert held is not None
            assert held.pool.free_tokens == held.pool.capacity_tokens
            assert drafter.servicer.host is not None
            assert (held.num_sessions, drafter.servicer.host.num_sessions) == (0, 0)


class TestTransport:
    def test_both_sides_agree_on_sizes_and_keepalive(self) -> None:
        ours, theirs = dict(client_options("dns:///a:1")), dict(server_options())
        for options in (ours, theirs):
            assert options["grpc.max_receive_message_length"] == MAX_MESSAGE_BYTES
            assert options["grpc.keepalive_time_ms"] > 0
            assert options["grpc.keepalive_timeout_ms"] == options["grpc.http2.ping_timeout_ms"] > 0
            assert options["grpc.http2.max_pings_without_data"] == 0
        assert theirs["grpc.keepalive_permit_without_calls"] == 1
        assert theirs["grpc.http2.max_ping_strikes"] == 0, "no client is cut off for its pings"
        assert theirs["grpc.so_reuseport"] == 0
        for local in ("127.0.0.1:1", "unix:/tmp/x"):
            assert dict(client_options(local))["grpc.enable_http_proxy"] == 0
        assert "grpc.enable_http_proxy" not in ours

    async def test_connections_that_are_replaced_cost_no_request(
        self, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A server sends its clients away from an old connection; calls under way stay on it."""
        monkeypatch.setattr("specdec.transport.server.MAX_CONNECTION_AGE_S", 0.3)
        async with (
            gated_system(tiny_llama, gateway_options={"max_connection_age_s": 0.3}) as (system, gate),
            aio_channel(system.address) as channel,
        ):
            expected = await system.client.generate(PROMPT, replace(GATED, method="none"))
            long = asyncio.create_task(system.client.generate(PROMPT, GATED))
            await gate.reached()
            connections: set[int] = set()
            generate = gateway_pb2_grpc.GatewayServiceStub(channel).Generate
            async with asyncio.timeout(30):
                while len(connections) < 5:
                    call = generate(gateway_pb2.GenerateRequest(text="a", method="none", max_new_tokens=2))
                    assert [message async for message in call][-1].HasField("finished")
                    connections |= connections_to(system.address)
            assert not long.done()
            gate.open()
            assert (await long).token_ids == expected.token_ids

    async def test_messages_past_the_default_limit_pass_and_huge_ones_are_refused(
        self, tiny_llama: Path
    ) -> None:
        async with running_system(tiny_llama) as system, aio_channel(system.address) as channel:
            generate = gateway_pb2_grpc.GatewayServiceStub(channel).Generate
            most = GatewayConfig().max_message_bytes
            for size, code in (
                (most - 2**10, grpc.StatusCode.INVALID_ARGUMENT),
                (most + 2**10, grpc.StatusCode.RESOURCE_EXHAUSTED),
            ):
                # Refused for its role, if it is read at all: nobody has to tokenise it.
                message = gateway_pb2.ChatMessage(role="robot", content="x" * size)
                call = generate(gateway_pb2.GenerateRequest(chat=gateway_pb2.Chat(messages=[message])))
                assert await call.code() is code
            assert (await system.client.generate(PROMPT, PLAIN)).usage.output_tokens == 6
