"""The health of a server: liveness is reported apart from readiness, and watches end when a server drains."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

LIVENESS = "liveness"
"""The health service name of liveness: SERVING from the start until the drain, whatever is loaded or
reachable. A process that does not answer for it should be restarted."""


class _WatchContext:
    """The context of a health watch, which knows the status that was last sent to the peer."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self.is_down = asyncio.Event()

    async def write(self, response: health_pb2.HealthCheckResponse) -> None:
        await self._context.write(response)
        if response.status == health_pb2.HealthCheckResponse.SERVING:
            self.is_down.clear()
        else:
            self.is_down.set()


class HealthService(health_aio.HealthServicer):
    """A health service that ends its watches during a drain, which would otherwise wait for them."""

    def __init__(self) -> None:
        super().__init__()
        self._draining = asyncio.Event()

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Report each change of the status until the server drains."""
        watched: Any = _WatchContext(context)
        watching = asyncio.ensure_future(super().Watch(request, watched))
        ending = asyncio.ensure_future(self._drained(watched))
        try:
            await asyncio.wait((watching, ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (watching, ending):
                task.cancel()
            await asyncio.wait((watching, ending))
        if not watching.cancelled():
            watching.result()

    async def _drained(self, watched: _WatchContext) -> None:
        await self._draining.wait()
        await watched.is_down.wait()

    async def enter_graceful_shutdown(self) -> None:
        """Report NOT_SERVING from now on, and end every watch."""
        await super().enter_graceful_shutdown()
        self._draining.set()
