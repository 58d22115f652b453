"""Replicas come and go under load, as the addresses of a name change: no answer fails, and all get work."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from specdec.client import AsyncClient
from specdec.local.processes import free_ports
from tests.drills.fleet import assert_all_as_ever, one_service, steady_load
from tests.probe_service import is_serving
from tests.raw_streams import until
from tests.systems import running_gateway

LONGEST_WAIT_S = 10.0
"""Within which a new replica has work."""


class Names:
    """A name service of the tests: what the names of verifiers and drafters resolve to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.addresses: dict[str, list[str]] = {
            "verifiers.test": ["127.0.0.1"],
            "drafters.test": ["127.0.0.1"],
        }
        real = socket.getaddrinfo

        def getaddrinfo(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
            found = self.addresses.get(host)
            if found is None:
                return real(host, port, *args, **kwargs)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, port)) for ip in found]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)


async def time_until_busy(client: AsyncClient, kind: str, ip: str) -> float:
    """Return how long it takes until the replica at an address has a session, seconds."""
    started = time.monotonic()
    while time.monotonic() < started + 60:
        info = await client.info()
        replicas = info.verifiers if kind == "verifier" else info.drafters
        if any(replica.num_sessions for replica in replicas if ip in replica.uri):
            break
        await asyncio.sleep(0.05)
    return time.monotonic() - started


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Names:
    return Names(monkeypatch)


@pytest.mark.drill
@pytest.mark.parametrize("kind", ["verifier", "drafter"])
async def test_a_replica_comes_and_another_goes(
    kind: str, tiny_llama: Path, noisy_llama: Path, names: Names, tmp_path: Path
) -> None:
    ports = dict(zip(("verifier", "drafter"), free_ports(2), strict=True))
    services = {
        key: one_service("-".join(key), f"{key[1]}:{ports[key[0]]}", tmp_path, tiny_llama, noisy_llama)
        for key in (("verifier", "127.0.0.1"), ("drafter", "127.0.0.1"), (kind, "127.0.0.2"))
    }
    first, second = services[kind, "127.0.0.1"], services[kind, "127.0.0.2"]
    try:
        for service in services.values():
            service.start()
        for service in services.values():
            await until(partial(is_serving, service), timeout_s=60)
        async with (
            running_gateway(
                tiny_llama,
                verifier=f"dns:///verifiers.test:{ports['verifier']}",
                drafter=f"dns:///drafters.test:{ports['drafter']}",
                failover_wait_s=20.0,
            ) as (address, _),
            AsyncClient(address, timeout_s=30) as client,
            steady_load(address) as ended,
        ):
            await until(lambda: len(ended) >= 8, timeout_s=60)
            names.addresses[f"{kind}s.test"] = ["127.0.0.1", "127.0.0.2"]
            came_s = await time_until_busy(client, kind, "127.0.0.2")
            names.addresses[f"{kind}s.test"] = ["127.0.0.2"]
            os.kill(first.pid, signal.SIGTERM)
            started = time.monotonic()
            await until(lambda: first.exit_code is not None, timeout_s=60)
            went_s = time.monotonic() - started
            so_far = len(ended)
            await until(lambda: len(ended) >= so_far + 8, timeout_s=60)
    finally:
        for service in services.values():
            service.stop(5)
    print(f"{kind}: a new one had work after {came_s:.1f} s, an old one was gone after {went_s:.1f} s")
    assert came_s < LONGEST_WAIT_S
    assert first.exit_code == 0
    assert second.exit_code == 0
    assert_all_as_ever(ended)
