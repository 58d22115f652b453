"""The services as real processes: start, drain on SIGTERM, and what a client sees when one is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from drafter_service.families import FAMILIES
from specdec.client import AsyncClient, GenerateOptions
from specdec.contract.errors import UnavailableError
from specdec.local.launcher import LocalSystem, SystemConfig, service_specs
from specdec.local.processes import Service, ServiceGroup, ServiceSpec, free_ports
from specdec.transport.channel import aio_channel, sync_channel
from specdec.v1 import verifier_pb2
from tests.raw_streams import draft_stream, until, verify_stream
from tests.systems import running_gateway, running_verifier

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
SERVICES = {
    "gateway": "specdec.v1.GatewayService",
    "drafter": "specdec.v1.DrafterService",
    "verifier": "specdec.v1.VerifierService",
}
NUM_LONG = 300
LONG = GenerateOptions(max_new_tokens=NUM_LONG, ignore_eos=True, method="none")
ENV = {"OMP_NUM_THREADS": "1"}
"""A tiny model gains nothing from a second thread, and loses much where the cores are busy."""


@pytest.fixture(scope="module")
def system(tiny_llama: Path) -> Iterator[LocalSystem]:
    """Run a system that tests only look at."""
    with LocalSystem(str(tiny_llama), dtype="float32", drafters=["ngram"], env=ENV) as system:
        yield system


def service_group(config: SystemConfig, log_dir: Path, *names: str) -> ServiceGroup:
    """Return some of a system's services, which are not started yet."""
    specs = [spec for spec in service_specs(config) if spec.name in names]
    return ServiceGroup(specs, log_dir, env=ENV, ready_timeout_s=60)


@contextmanager
def running(group: ServiceGroup) -> Iterator[list[Service]]:
    """Start the services of a group, wait until they are healthy, and stop them at the end."""
    group.start()
    try:
        yield group.services
    finally:
        group.stop(grace_s=5)


def health_of(address: str, service: str) -> str:
    """Return the name of a service's health status."""
    with sync_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        response = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    return health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


def addresses_of(system: LocalSystem) -> dict[str, str]:
    return {"gateway": system.gateway, "drafter": system.drafter, "verifier": system.verifier}


@pytest.mark.parametrize("name", SERVICES)
def test_a_started_service_is_serving_and_describes_itself(name: str, system: LocalSystem) -> None:
    address = addresses_of(system)[name]
    assert health_of(address, SERVICES[name]) == health_of(address, "") == "SERVING"
    with sync_channel(address) as channel:
        reflected = ProtoReflectionDescriptorDatabase(channel)
        assert SERVICES[name] in reflected.get_services()
        service = DescriptorPool(reflected).FindServiceByName(SERVICES[name])
        methods = {method.name for method in service.methods}
    assert "GetInfo" in methods
    assert len(methods) > 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_gateway_runs_without_torch(system: LocalSystem) -> None:
    libraries = {
        name: {Path(line.split()[-1]).name for line in Path(f"/proc/{pid}/maps").read_text().splitlines()}
        for name, pid in system.pids.items()
    }
    assert any(library.startswith("libtorch") for library in libraries["verifier"])
    for name in ("gateway", "drafter"):  # the drafter has no model here
        assert not any(library.startswith("libtorch") for library in libraries[name]), name


async def health_changes(address: str, service: str) -> AsyncIterator[str]:
    """Yield every health status that a service reports from the moment its port is open."""
    async with aio_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        with suppress(grpc.aio.AioRpcError):  # the process ends
            async for response in stub.Watch(request, wait_for_ready=True, timeout=60):
                yield health_pb2.HealthCheckResponse.ServingStatus.Name(response.status)


@asynccontextmanager
async def a_verify_stream(address: str) -> AsyncIterator[Any]:
    """Open a verify session; check on leaving the block that it can go on to its end."""
    async with verify_stream(address) as stream:
        await stream.open(PROMPT, max_new_tokens=40, ignore_eos=True)
        yield
        result = await stream.round()
        while not result.finish_reason:
            result = await stream.round()
        assert result.finish_reason == verifier_pb2.FINISH_REASON_LENGTH
        assert len(stream.token_ids) == len(PROMPT) + 40
        await stream.call.done_writing()
        assert await stream.call.code() is grpc.StatusCode.OK


@asynccontextmanager
async def a_draft_stream(address: str) -> AsyncIterator[Any]:
    """Open a draft session; check on leaving the block that it can go on to its end."""
    async with draft_stream(address) as stream:
        await stream.open("ngram", PROMPT)
        yield
        for length in range(len(PROMPT) + 1, len(PROMPT) + 20):
            assert len(await stream.round([7 - length % 3], length)) <= 4
        await stream.call.done_writing()
        assert await stream.call.code() is grpc.StatusCode.OK


@asynccontextmanager
async def a_generation(address: str) -> AsyncIterator[Any]:
    """Start a generation; check on leaving the block that it can go on to its end."""
    async with AsyncClient(address) as client, client.stream(PROMPT, LONG) as stream:
        await anext(stream)
        yield
        async for _ in stream:
            pass
        assert stream.result.usage.output_tokens == NUM_LONG


STREAMS = {"gateway": a_generation, "drafter": a_draft_stream, "verifier": a_verify_stream}


async def test_sigterm_lets_running_streams_finish_and_exits_with_0(tiny_llama: Path, tmp_path: Path) -> None:
    shared_dir = tmp_path / "shared"
    shared_dir.mkdir()
    arguments = {"verifier": ("--shared-dir", str(shared_dir))}
    config = SystemConfig(model=str(tiny_llama), dtype="float32", extra_args=arguments)
    group = service_group(config, tmp_path, *SERVICES)
    seen: dict[str, list[str]] = {name: [] for name in SERVICES}

    async def watch(spec: ServiceSpec) -> None:
        async for status in health_changes(spec.address, SERVICES[spec.name]):
            seen[spec.name].append(status)

    gateway, *others = group.services
    watches = [asyncio.ensure_future(watch(service.spec)) for service in group.services]
    try:
        gateway.start()
        await until(lambda: seen["gateway"] == ["NOT_SERVING"], timeout_s=30)
        for service in others:
            service.start()
        await until(lambda: all("SERVING" in statuses for statuses in seen.values()), timeout_s=60)
        for service in group.services:  # the gateway first: it needs the others
            name = service.spec.name
            if name == "verifier":
                assert list(shared_dir.glob("*/*.state")), "its pool is there while it runs"
            async with STREAMS[name](service.spec.address):
                os.kill(service.pid, signal.SIGTERM)
                await until(lambda name=name: seen[name][-1] == "NOT_SERVING")
            await until(lambda service=service: service.exit_code is not None, timeout_s=15)
            assert service.exit_code == 0, service.describe_exit()
        await asyncio.gather(*watches)
    finally:
        await asyncio.to_thread(group.stop, 5)
    changes = {name: [status for status, _ in groupby(statuses)] for name, statuses in seen.items()}
    assert changes["gateway"] == ["NOT_SERVING", "SERVING", "NOT_SERVING"]
    assert not list(shared_dir.glob("*/*")), "a service that has drained leaves no memory behind"
    for name in ("drafter", "verifier"):  # loading may be over before the watch connects
        assert changes[name][-2:] == ["SERVING", "NOT_SERVING"], name


async def test_a_verifier_killed_mid_stream_is_unavailable(tiny_llama: Path, tmp_path: Path) -> None:
    config = SystemConfig(model=str(tiny_llama), dtype="float32")
    with running(service_group(config, tmp_path, "verifier")) as (verifier,):
        async with (
            running_gateway(tiny_llama, verifier=verifier.spec.address) as (address, _),
            AsyncClient(address, timeout_s=60) as client,
        ):
            async with client.stream(PROMPT, LONG) as stream:
                await anext(stream)
                os.kill(verifier.pid, signal.SIGKILL)
                with pytest.raises(UnavailableError, match="send the request again") as raised:
                    async for _ in stream:
                        pass
            assert raised.value.reason == "PEER_LOST"
            assert verifier.spec.address in raised.value.message

            with pytest.raises(UnavailableError) as raised:
                await client.generate(PROMPT, LONG)
            assert raised.value.retry_after_s == 1.0

            await until(lambda: verifier.exit_code is not None)
            async with running_verifier(tiny_llama, listen=verifier.spec.address):
                result = await generate_when_ready(client)
            assert result.usage.output_tokens == NUM_LONG


async def generate_when_ready(client: AsyncClient) -> Any:
    """Generate; try again for as long as the gateway says that its verifier is not ready."""
    async with asyncio.timeout(60):
        while True:
            with suppress(UnavailableError):
                return await client.generate(PROMPT, LONG)
            await asyncio.sleep(0.1)


async def test_a_drafter_killed_mid_stream_costs_nothing_but_speed(tiny_llama: Path, tmp_path: Path) -> None:
    config = SystemConfig(model=str(tiny_llama), dtype="float32", drafters=("ngram",))
    with running(service_group(config, tmp_path, "drafter")) as (drafter,):
        async with (
            running_verifier(tiny_llama) as (verifier_at, _),
            running_gateway(tiny_llama, verifier=verifier_at, drafter=drafter.spec.address) as (address, _),
            AsyncClient(address, timeout_s=60) as client,
        ):
            expected = await client.generate(PROMPT, LONG)
            options = GenerateOptions(max_new_tokens=NUM_LONG, ignore_eos=True, method="ngram", draft_depth=1)
            async with client.stream(PROMPT, options) as stream:
                await anext(stream)
                os.kill(drafter.pid, signal.SIGKILL)
                async for _ in stream:
                    pass
            assert stream.result.token_ids == expected.token_ids
            assert stream.result.speculation.num_fallback_rounds > 0
            assert drafter.spec.address in stream.result.speculation.fallback_reason


def run_service(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a service process that is expected to exit by itself."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env=os.environ | ENV
    )


def wrong_starts(taken: int) -> dict[str, tuple[Sequence[str], str]]:
    """Return command lines with a mistake, and a part of what must be said about each mistake."""
    return {
        "port in use": (("drafter_service", "--listen", f"127.0.0.1:{taken}"), "--listen"),
        "no such model": (
            ("verifier_service", "--listen", "127.0.0.1:0", "--model", "/no/model"),
            "config.json",
        ),
        "no such drafter": (("drafter_service", "--drafter", "oracle"), ", ".join(FAMILIES)),
        "no such tokenizer": (("gateway", "--tokenizer", "/no/model"), "config.json"),
        "bad value": (("gateway", "--max-requests", "0"), "max-requests"),
    }


@pytest.mark.parametrize(
    "name",
    [
        "port in use",
        pytest.param("no such model", marks=pytest.mark.slow),
        "no such drafter",
        "no such tokenizer",
        "bad value",
    ],
)
def test_a_wrong_start_ends_with_one_message_and_exit_code_2(name: str, system: LocalSystem) -> None:
    taken = int(system.verifier.rpartition(":")[2])
    (module, *arguments), fragment = wrong_starts(taken)[name]
    if "--listen" not in arguments:
        arguments += ["--listen", f"127.0.0.1:{free_ports(1)[0]}"]
    result = run_service(module, *arguments)
    assert result.returncode == 2, result.stderr
    assert fragment in result.stderr + result.stdout
    assert "Traceback" not in result.stderr + result.stdout
    assert health_of(system.verifier, "") == "SERVING"


def test_sigterm_while_the_model_loads_ends_in_order(tiny_llama: Path) -> None:
    command = [sys.executable, "-m", "verifier_service", "--listen", "127.0.0.1:0", "--dtype", "float32"]
    command += ["--model", str(tiny_llama)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | ENV) as process:
        assert process.stderr
        assert any("listening" in line for line in process.stderr)
        process.terminate()
        log = process.stderr.read()
        assert process.wait(30) == 0, log
        assert '"stopped"' in log
