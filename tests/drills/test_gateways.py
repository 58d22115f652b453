"""Gateways come and go while clients that found them by a name stream: no request fails, and all get work."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from specdec.client import AsyncClient
from specdec.local.processes import Service, free_ports
from tests.drills.fleet import assert_all_as_ever, one_service, steady_load, until_all_ready
from tests.drills.test_scaling import LONGEST_WAIT_S
from tests.name_server import running_name_server
from tests.probe_service import is_serving
from tests.raw_streams import until

MAX_CONNECTION_AGE_S = 4.0
"""With which a new gateway has work in time, although no client makes a connection of its own accord."""
NUM_TOKENS = 100
"""Of an answer: only a request that begins can go to a new gateway."""
IPS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")


async def time_until_busy(address: str) -> float:
    """Return how long it takes until a gateway runs a request, seconds."""
    started = time.monotonic()
    async with AsyncClient(address, timeout_s=30) as client:
        while time.monotonic() < started + 60:
            if any(replica.num_sessions for replica in (await client.info()).verifiers):
                break
            await asyncio.sleep(0.05)
    return time.monotonic() - started


async def time_until_gone(service: Service) -> float:
    """End a process by SIGTERM; return how long it drains, seconds."""
    os.kill(service.pid, signal.SIGTERM)
    started = time.monotonic()
    await until(lambda: service.exit_code is not None, timeout_s=60)
    return time.monotonic() - started


@pytest.mark.drill
async def test_gateways_come_and_go(tiny_llama: Path, noisy_llama: Path, tmp_path: Path) -> None:
    gateway_port, *ports = free_ports(3)
    peers = dict(zip(("verifier", "drafter"), (f"127.0.0.1:{port}" for port in ports), strict=True))
    known = [argument for kind, address in peers.items() for argument in (f"--{kind}", address)]
    age = ("--max-connection-age-s", str(MAX_CONNECTION_AGE_S))
    models = (tiny_llama, noisy_llama)
    services = [one_service(kind, address, tmp_path, *models) for kind, address in peers.items()]
    gateways = {
        ip: one_service(f"gateway-{ip}", f"{ip}:{gateway_port}", tmp_path, *models, *known, *age)
        for ip in IPS
    }
    came_s, went_s = [], []
    try:
        for service in (*services, gateways[IPS[0]]):
            service.start()
        for service in (*services, gateways[IPS[0]]):
            await until(partial(is_serving, service), timeout_s=60)
        async with (
            running_name_server(IPS[0]) as names,
            steady_load(names.uri("gateways.test", gateway_port), NUM_TOKENS) as ended,
        ):
            await until(lambda: len(ended) >= 8, timeout_s=60)
            for leaving, coming in pairwise(IPS):
                gateways[coming].start()
                await until(partial(is_serving, gateways[coming]), timeout_s=60)
                names.addresses = [leaving, coming]
                came_s.append(await time_until_busy(f"{coming}:{gateway_port}"))
                names.addresses = [coming]
                went_s.append(await time_until_gone(gateways[leaving]))
                so_far = len(ended)
                await until(lambda so_far=so_far: len(ended) >= so_far + 8, timeout_s=60)  # type: ignore[misc]
        async with AsyncClient(f"{IPS[-1]}:{gateway_port}", timeout_s=30) as client:
            await until_all_ready(client)
    finally:
        for service in (*services, *gateways.values()):
            service.stop(5)
    told = [", ".join(f"{seconds:.1f}" for seconds in times) for times in (came_s, went_s)]
    print(f"gateways: new ones had work after {told[0]} s, old ones had drained after {told[1]} s")
    assert max(came_s) < LONGEST_WAIT_S
    assert [gateways[ip].exit_code for ip in IPS[:-1]] == [0, 0]
    assert_all_as_ever(ended, NUM_TOKENS)
