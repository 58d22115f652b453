"""Real servers in this process: verifier, drafter and gateway on free local ports."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafter_service.config import DrafterConfig
from drafter_service.families import FAMILIES, DrafterFactory
from drafter_service.server import DrafterServer
from gateway.config import GatewayConfig
from gateway.server import GatewayServer
from specdec.client import AsyncClient
from specdec.service.exporters import make_telemetry
from specdec.service.telemetry import Telemetry
from verifier_service.config import VerifierConfig
from verifier_service.server import VerifierServer

ANY_PORT = "127.0.0.1:0"


@asynccontextmanager
async def running_verifier(
    model: Path, *, telemetry: Telemetry | None = None, **options: Any
) -> AsyncIterator[tuple[str, VerifierServer]]:
    """Run a verifier of `model` in fp32; yield its address and the server."""
    defaults = {"listen": ANY_PORT, "dtype": "float32", "kv_cache_mib": 4.0}
    config = VerifierConfig(model=str(model), **(defaults | options))
    async with _running(VerifierServer(config, telemetry or make_telemetry("verifier"))) as started:
        yield started


@asynccontextmanager
async def running_drafter(
    *drafters: str,
    telemetry: Telemetry | None = None,
    families: Mapping[str, DrafterFactory] = FAMILIES,
    **options: Any,
) -> AsyncIterator[tuple[str, DrafterServer]]:
    """Run a drafter service in fp32; yield its address and the server."""
    defaults = {"listen": ANY_PORT, "dtype": "float32", "kv_cache_mib": 4.0}
    config = DrafterConfig(drafter=drafters or ("ngram",), **(defaults | options))
    server = DrafterServer(config, telemetry or make_telemetry("drafter"), families)
    async with _running(server) as started:
        yield started


@asynccontextmanager
async def running_gateway(
    model: Path, *, verifier: str, drafter: str = "", telemetry: Telemetry | None = None, **options: Any
) -> AsyncIterator[tuple[str, GatewayServer]]:
    """Run a gateway with the tokenizer of `model`; yield its address and the server."""
    defaults = {"listen": ANY_PORT, "failover_wait_s": 0.0}
    config = GatewayConfig(verifier=verifier, drafter=drafter, tokenizer=str(model), **(defaults | options))
    async with _running(GatewayServer(config, telemetry or make_telemetry("gateway"))) as started:
        yield started


@dataclass(frozen=True, slots=True)
class System:
    """Three running servers and a client of theirs."""

    client: AsyncClient
    address: str
    verifier_address: str
    drafter_address: str
    verifier: VerifierServer
    drafter: DrafterServer
    gateway: GatewayServer


@asynccontextmanager
async def running_system(
    model: Path,
    *drafters: str,
    telemetry: Telemetry | None = None,
    families: Mapping[str, DrafterFactory] = FAMILIES,
    verifier_options: Mapping[str, Any] | None = None,
    drafter_options: Mapping[str, Any] | None = None,
    gateway_options: Mapping[str, Any] | None = None,
) -> AsyncIterator[System]:
    """Run all three services, SERVING."""
    async with (
        running_verifier(model, telemetry=telemetry, **(verifier_options or {})) as (verifier_at, verifier),
        running_drafter(*drafters, telemetry=telemetry, families=families, **(drafter_options or {})) as (
            drafter_at,
            drafter,
        ),
        running_gateway(
            model, verifier=verifier_at, drafter=drafter_at, telemetry=telemetry, **(gateway_options or {})
        ) as (gateway_at, gateway),
        AsyncClient(gateway_at, timeout_s=60) as client,
    ):
        yield System(client, gateway_at, verifier_at, drafter_at, verifier, drafter, gateway)


async def is_idle(system: System) -> bool:
    """Return whether no service holds a session or memory."""
    verifier, drafter = system.verifier.servicer.verifier, system.drafter.servicer.host
    assert verifier
    assert drafter
    info = await system.client.info()
    held = [replica.num_sessions for replica in (*info.verifiers, *info.drafters)]
    return (
        verifier.num_sessions == drafter.num_sessions == sum(held) == 0
        and verifier.pool.free_tokens == verifier.pool.capacity_tokens
    )


@asynccontextmanager
async def _running(server: Any) -> AsyncIterator[tuple[str, Any]]:
    address = await server.host.start()
    try:
        await server.load()
        server.host.set_serving()
        yield address, server
    finally:
        await server.host.stop(grace_s=0)
        await server.close()
