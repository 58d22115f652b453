"""Where a server listens, and what it leaves there."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specdec.contract.errors import InvalidArgumentError
from specdec.service.host import ServiceHost
from tests.leftovers import nothing_left_behind

SERVICE = "specdec.v1.TestService"
ANY_PORT = "127.0.0.1:0"


def host_at(listen: str, **options: Any) -> ServiceHost:
    return ServiceHost(SERVICE, lambda _: None, listen, **options)


async def answers(address: str) -> bool:
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.aio.AioRpcError:
            return False
    return True


@pytest.fixture(params=["port", "unix socket"])
async def running(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[ServiceHost]:
    """Run a server on a free port, or on a unix socket."""
    async with nothing_left_behind():
        host = host_at(ANY_PORT if request.param == "port" else f"unix:{tmp_path}/socket")
        await host.start()
        yield host
        await host.stop(0)
        assert not await answers(host.address)


async def test_an_address_is_not_taken_from_a_server_that_answers(running: ServiceHost) -> None:
    other = host_at(running.address)
    with pytest.raises(InvalidArgumentError, match="--listen") as raised:
        await other.start()
    assert raised.value.reason == "ADDRESS_IN_USE"
    assert await answers(running.address)


async def test_a_socket_left_behind_is_used_again(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "socket"))
    host = host_at(f"unix:{tmp_path}/socket")
    await host.start()
    assert await answers(host.address)
    await host.stop(0)


async def test_a_socket_path_that_is_too_long_is_named(tmp_path: Path) -> None:
    path = f"{tmp_path}/{'x' * 120}"
    reason = f"at most 107 bytes, but {path} has {len(path)}"
    with pytest.raises(InvalidArgumentError, match=reason) as raised:
        await host_at(f"unix:{path}").start()
    assert raised.value.reason == "SOCKET_PATH_TOO_LONG"


async def test_a_socket_without_its_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{tmp_path}/missing is not a directory"):
        await host_at(f"unix:{tmp_path}/missing/socket").start()


async def test_a_socket_is_written_with_or_without_slashes(tmp_path: Path) -> None:
    host = host_at(f"unix://{tmp_path}/socket")
    await host.start()
    assert await answers(f"unix:{tmp_path}/socket")
    with pytest.raises(InvalidArgumentError, match="in use"):
        await host_at(f"unix:{tmp_path}/socket").start()
    await host.stop(0)
    assert not (tmp_path / "socket").exists()


async def test_a_start_that_fails_at_its_second_port_gives_the_first_back() -> None:
    other = socket.create_server(("127.0.0.1", 0))
    async with nothing_left_behind():
        host = host_at(ANY_PORT, health_listen=f"127.0.0.1:{other.getsockname()[1]}")
        with pytest.raises(InvalidArgumentError, match="--health-listen"):
            await host.start()
        await host.stop(0)
    other.close()
