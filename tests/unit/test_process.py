"""The process around a server: what is freed, and when, however it ends."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specdec.contract.errors import InvalidArgumentError
from specdec.service.host import ServiceHost
from specdec.service.process import run_service
from tests.leftovers import nothing_left_behind
from tests.raw_streams import until

SERVICE = "specdec.v1.TestService"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Host(ServiceHost):
    """Notes when it has drained."""

    def __init__(self, events: list[str]) -> None:
        super().__init__(SERVICE, lambda _: None, "127.0.0.1:0")
        self._events = events

    async def stop(self, grace_s: float) -> None:
        await super().stop(grace_s)
        self._events.append("drained")


class Service:
    """Notes what is done to it; loads for as long as it is told to."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.host = Host(self.events)
        self.may_load = asyncio.Event()
        self.defect: Exception | None = None

    async def load(self) -> None:
        self.events.append("loading")
        await self.may_load.wait()
        if self.defect:
            raise self.defect
        self.events.append("loaded")

    async def close(self) -> None:
        await asyncio.sleep(0)  # as one that waits for a thread: to be awaited, not only called
        self.events.append("closed")

    async def run(self) -> None:
        await run_service(self.host, load=self.load, close=self.close, grace_s=5)
        self.events.append("stopped")


@asynccontextmanager
async def watching(service: Service) -> AsyncIterator[Callable[[], Awaitable[int]]]:
    """Watch the service's health, status by status as they change."""
    await until(lambda: not service.host.address.endswith(":0"))
    async with grpc.aio.insecure_channel(service.host.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), wait_for_ready=True, timeout=30)

        async def next_status() -> int:
            return (await watch.read()).status  # type: ignore[no-any-return]

        yield next_status


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_in_a_drain_and_frees_what_was_loaded(number: signal.Signals) -> None:
    async with nothing_left_behind():
        service = Service()
        running = asyncio.ensure_future(service.run())
        async with watching(service) as next_status:
            assert await next_status() == NOT_SERVING
            service.may_load.set()
            assert await next_status() == SERVING
            assert service.events == ["loading", "loaded"]
            signal.raise_signal(number)
            assert await next_status() == NOT_SERVING
        await running
        assert service.events == ["loading", "loaded", "drained", "closed", "stopped"]


async def test_a_signal_while_it_loads_frees_what_was_loaded_so_far() -> None:
    async with nothing_left_behind():
        service = Service()
        running = asyncio.ensure_future(service.run())
        async with watching(service) as next_status:
            assert await next_status() == NOT_SERVING
            signal.raise_signal(signal.SIGTERM)
        await running
        assert service.events == ["loading", "drained", "closed", "stopped"]


@pytest.mark.parametrize("defect", [InvalidArgumentError("no such model"), KeyError("weight")])
async def test_a_load_that_fails_is_raised_once_all_is_freed(defect: Exception) -> None:
    async with nothing_left_behind():
        service = Service()
        service.defect = defect
        service.may_load.set()
        with pytest.raises(type(defect)) as raised:
            await asyncio.wait_for(service.run(), 30)
        assert raised.value is defect
        assert service.events == ["loading", "drained", "closed"]
