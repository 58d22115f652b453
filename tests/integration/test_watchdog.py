"""Services that answer but cannot work: sessions go on elsewhere, and health says so while it lasts."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway import server
from specdec.client import AsyncClient, GenerateOptions
from specdec.contract.errors import UnavailableError
from specdec.local.processes import Service, ServiceSpec, free_ports
from specdec.service.watchdog import EXIT_CODE
from tests.integration.gated_drafter import eventually
from tests.probe_service import ENV
from tests.probe_service import is_serving as has_started
from tests.raw_streams import until, verify_stream
from tests.systems import running_drafter, running_gateway, running_verifier

PROMPT = [5, 6, 7, 5, 6, 7, 5]
STEP_TIMEOUT_S = 2.0
HANGS_IN_EACH_STEP = """
import time
from verifier_service.target_model import TargetModel
TargetModel.step = lambda *_: time.sleep(1000)
from verifier_service.cli import main
main()
"""


class Gate:
    """Stands before the steps of an engine, open or closed."""

    def __init__(self, engine: Any) -> None:
        self._open = threading.Event()
        self._open.set()
        self._step = engine._step
        engine._step = self._pass

    def _pass(self, items: Sequence[Any]) -> Any:
        assert self._open.wait(60)
        return self._step(items)

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()


async def is_serving(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        response = await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


def state_files(shared_dir: Path) -> list[Path]:
    return list(shared_dir.glob("specdec-*/*"))


async def until_serving(address: str, serving: bool) -> None:
    async def says_so() -> bool:
        return await is_serving(address) == serving

    await eventually(says_so)


async def assert_one_of_two_goes_on_elsewhere(
    client: AsyncClient, options: GenerateOptions, gate: Gate
) -> None:
    """Close the gate of one of two verifiers while each has an answer under way; both end as they should."""
    expected = await client.generate(PROMPT, options)
    async with client.stream(PROMPT, options) as one, client.stream(PROMPT, options) as two:
        await asyncio.gather(anext(one), anext(two))
        gate.close()
        for stream in (one, two):
            async for _ in stream:
                pass
    assert one.result.token_ids == two.result.token_ids == expected.token_ids
    assert one.result.num_failovers + two.result.num_failovers == 1


async def test_a_verifier_that_hangs_loses_its_sessions_to_another(tiny_llama: Path) -> None:
    options = GenerateOptions(max_new_tokens=200, ignore_eos=True, method="none")
    async with (
        running_verifier(tiny_llama, step_timeout_s=STEP_TIMEOUT_S) as (hung_at, hung),
        running_verifier(tiny_llama) as (other_at, _),
        running_gateway(tiny_llama, verifier=f"{hung_at},{other_at}", failover_wait_s=20.0) as (at, _),
        AsyncClient(at, timeout_s=60) as client,
    ):
        verifier = hung.servicer.verifier
        assert verifier is not None
        gate = Gate(verifier.engine)
        try:
            await assert_one_of_two_goes_on_elsewhere(client, options, gate)
            assert not await is_serving(hung_at)
            assert (await client.generate(PROMPT, options)).num_failovers == 0
        finally:
            gate.open()
        await until_serving(hung_at, True)
        await until(lambda: verifier.pool.free_tokens == verifier.pool.capacity_tokens)
        assert verifier.num_sessions == 0


async def test_a_verifier_whose_rounds_never_end_counts_as_lost(tiny_llama: Path) -> None:
    """Its watchdog says nothing: the process answers pings, and may be unable to see that it hangs."""
    options = GenerateOptions(max_new_tokens=200, ignore_eos=True, method="none")
    async with (
        running_verifier(tiny_llama, step_timeout_s=50.0) as (hung_at, hung),
        running_verifier(tiny_llama) as (other_at, _),
        running_gateway(
            tiny_llama, verifier=f"{hung_at},{other_at}", failover_wait_s=20.0, round_timeout_s=1.5
        ) as (at, _),
        AsyncClient(at, timeout_s=60) as client,
    ):
        verifier = hung.servicer.verifier
        assert verifier is not None
        gate = Gate(verifier.engine)
        try:
            await assert_one_of_two_goes_on_elsewhere(client, options, gate)
        finally:
            gate.open()
        await until(lambda: verifier.num_sessions == 0)


async def test_a_drafter_that_hangs_is_not_used(tiny_llama: Path, noisy_llama: Path) -> None:
    options = GenerateOptions(max_new_tokens=60, ignore_eos=True, method="noisy", draft_depth=3)
    async with (
        running_verifier(tiny_llama) as (verifier_at, _),
        running_drafter(f"noisy=causal-lm:{noisy_llama}", step_timeout_s=STEP_TIMEOUT_S) as (at, drafter),
        running_gateway(tiny_llama, verifier=verifier_at, drafter=at, draft_timeout_s=0.5) as (gateway_at, _),
        AsyncClient(gateway_at, timeout_s=60) as client,
    ):
        expected = await client.generate(PROMPT, options)
        assert expected.speculation.num_draft_tokens
        host = drafter.servicer.host
        assert host is not None
        gate = Gate(host.engine)
        gate.close()
        try:
            answer = await client.generate(PROMPT, options)
            assert answer.token_ids == expected.token_ids
            assert answer.speculation.fallback_reason
            await until_serving(at, False)
        finally:
            gate.open()
        await until_serving(at, True)
        await until(lambda: host.num_sessions == 0)


async def test_a_gateway_without_a_verifier_is_not_ready_until_one_is_back(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "NO_VERIFIER_S", 1.0)
    async with AsyncExitStack() as stack:
        verifier_at, _ = await stack.enter_async_context(running_verifier(tiny_llama))
        async with (
            running_gateway(tiny_llama, verifier=verifier_at) as (at, _),
            AsyncClient(at, timeout_s=60) as client,
        ):
            assert await is_serving(at)
            await stack.aclose()
            await until_serving(at, False)
            with pytest.raises(UnavailableError, match="No VerifierService replica is ready"):
                await client.generate(PROMPT, GenerateOptions(max_new_tokens=5))
            async with running_verifier(tiny_llama, listen=verifier_at):
                await until_serving(at, True)
                await client.generate(PROMPT, GenerateOptions(max_new_tokens=5))


async def test_a_process_whose_engine_hangs_for_long_ends(tiny_llama: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    command = (sys.executable, "-c", HANGS_IN_EACH_STEP, "--listen", address, "--model", str(tiny_llama))
    arguments = ("--kv-cache-mib", "4", "--step-timeout-s", "0.5", "--shared-dir", str(tmp_path))
    spec = ServiceSpec("verifier", address, (*command, *arguments), "specdec.v1.VerifierService")
    service = Service(spec, tmp_path, ENV, lambda spawn: spawn())
    service.start()
    try:
        await until(partial(has_started, service), timeout_s=60)
        assert state_files(tmp_path)
        async with verify_stream(address) as stream:
            with pytest.raises(UnavailableError, match="hangs"):
                await stream.open(PROMPT, max_new_tokens=5)
        await until(lambda: service.exit_code is not None)
    finally:
        service.stop(5)
    assert service.exit_code == EXIT_CODE, service.describe_log()
    assert not state_files(tmp_path)
    assert "the engine hangs; its sessions are given up" in service.log_path.read_text()
