"""The health of a server: liveness is reported apart from readiness, and watches end when a server drains.

Whoever can connect may watch, and need not read. So nobody waits for a watcher: each has a task of its own,
and a host has so many watches and no more.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specdec.service.first_message import host_of

LIVENESS = "liveness"
"""The health service name of liveness: SERVING from the start until the drain, whatever is loaded or
reachable. A process that does not answer for it should be restarted."""
MAX_WATCHES = 256
"""Most watches of one host at a time: a client has one for each server it balances over."""
DRAIN_S = 1.0
"""How long watchers have to read that the server drains, seconds."""

_Status = health_pb2.HealthCheckResponse
_Context = grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse]


class HealthService(health_pb2_grpc.HealthServicer):
    """The standard health service."""

    def __init__(self) -> None:
        self._statuses: dict[str, Any] = {}
        self._changed = asyncio.Event()
        """Set, and replaced by another, at every change."""
        self._draining = False
        self._watches: Counter[str] = Counter()
        self._tasks: set[asyncio.Task[Any]] = set()
        self.max_watches = MAX_WATCHES

    @property
    def num_watches(self) -> int:
        """How many watches there are."""
        return self._watches.total()

    def set(self, name: str, *, serving: bool) -> None:
        """Report a service's status from now on; a drain cannot be taken back."""
        if not self._draining:
            self._change({name: _Status.SERVING if serving else _Status.NOT_SERVING})

    def drain(self) -> None:
        """Report NOT_SERVING for all services from now on; watches end once they have said so, or were given
        the time for it."""
        self._draining = True
        self._change(dict.fromkeys(self._statuses, _Status.NOT_SERVING))
        asyncio.get_running_loop().call_later(DRAIN_S, self._end_watches)

    def _end_watches(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _change(self, statuses: dict[str, Any]) -> None:
        self._statuses |= statuses
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        """Report the status of a service."""
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "There is no such service on this server.")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> None:
        """Report each change of a service's status until the server drains."""
        host = host_of(context)
        if self._watches[host] >= self.max_watches:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"This host watches the server's health {self.max_watches} times already; end other watches.",
            )
        with self._counted(host):
            await self._watch(request.service, context)

    async def _watch(self, service: str, context: _Context) -> None:
        """Send each status that differs from the one before. A peer that does not read is waited for, because
        a call that is given up stays open and would no longer count."""
        sent: Any = None
        while True:
            changed = self._changed
            status = self._statuses.get(service, _Status.SERVICE_UNKNOWN)
            if status != sent:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                sent = status
            if self._draining and changed is self._changed:
                return
            await changed.wait()

    @contextmanager
    def _counted(self, host: str) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._watches[host] += 1
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)
            self._watches[host] -= 1
            self._watches += Counter()  # forget hosts without any
