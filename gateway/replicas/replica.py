"""One replica of a service: what is known of it, and the watch that keeps it known."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Generic, Protocol, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from gateway.replicas.load import ReplicaLoad
from gateway.replicas.shared_calls import CallKind, SharedCalls
from specdec.contract.errors import SpecdecError, UnavailableError
from specdec.contract.load import Load
from specdec.transport.channel import ServiceChannel
from specdec.transport.tls import OutgoingTls
from specdec.v1 import common_pb2

logger = logging.getLogger(__name__)


class Info(Protocol):
    """What every service says of itself."""

    @property
    def load(self) -> common_pb2.Load:
        """How busy it is."""


InfoT = TypeVar("InfoT", bound=Info)

_RETRY_S = 0.2
_REFUSED_RETRY_S = 2.0
"""Pause before a replica that cannot be used is asked again: reading what it says of itself may be work."""
_NOT_YET = "not serving yet"
_ERRORS_TO_REST = 3
"""How many errors in a row take a replica out of use for a while."""
_FIRST_REST_S, _LONGEST_REST_S = 1.0, 60.0
"""How long that is at first, and at most; each further error doubles it."""
_CHECK_TIMEOUT_S = 5.0
LOAD_INTERVAL_S = 1.0
"""How long what a replica said of its load is good for, seconds; one that says nothing is asked."""
_TLS_CHECK_S = 1.0
"""How often a health watch over TLS looks whether certificates changed, seconds."""


class Replica(Generic[InfoT]):
    """One address of a service and what is known of it.

    Args:
        server_name: name that the replica's certificate must carry; empty: the address's own.
        kind: how its sessions share a call; None: it has no sessions.
    """

    def __init__(
        self,
        uri: str,
        service: str,
        tls: OutgoingTls | None = None,
        server_name: str = "",
        kind: CallKind | None = None,
    ) -> None:
        self.uri = uri
        self.service = service
        self.uses_tls = tls is not None
        self._channel = ServiceChannel(uri, service=service, tls=tls, server_name=server_name)
        self._calls = SharedCalls(kind, self._channel.current, f"{kind.peer} {uri}") if kind else None
        self.load = ReplicaLoad()
        self.reason = _NOT_YET
        """Why it does not get sessions; empty: it does."""
        self.info: InfoT | None = None
        """What it said of itself when it was last ready; kept while it is not."""
        self._num_errors = 0
        """Errors in a row."""
        self._rests_until = -math.inf

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel for a new call; another channel once certificates changed."""
        return self._channel.current()

    @property
    def calls(self) -> SharedCalls:
        """The calls that its sessions share."""
        assert self._calls is not None
        return self._calls

    async def close(self) -> None:
        """End the sessions and close the channel."""
        if self._calls:
            await self._calls.close()
        await self._channel.close()

    @property
    def num_sessions(self) -> int:
        """How many sessions this gateway has there."""
        return self.load.num_sessions

    @property
    def is_ready(self) -> bool:
        """Whether it may be given sessions, as far as its health says."""
        return not self.reason

    @property
    def rests(self) -> bool:
        """Whether it is left alone for a while, because it answered with errors."""
        return time.monotonic() < self._rests_until

    def failed(self) -> None:
        """Take note that it answered with an error that is its own: after a few in a row it rests, for longer
        each time."""
        self._num_errors += 1
        num_rests = self._num_errors - _ERRORS_TO_REST
        if num_rests >= 0:
            rest_s = min(_LONGEST_REST_S, _FIRST_REST_S * 2 ** min(num_rests, 10))
            self._rests_until = time.monotonic() + rest_s
            extra = {"uri": self.uri, "peer_service": self.service, "rest_s": rest_s}
            logger.warning("replica left alone: it answers with errors", extra=extra)

    def succeeded(self) -> None:
        """Take note that it answered as it should."""
        self._num_errors = 0
        self._rests_until = -math.inf

    def lease(self) -> Lease[InfoT]:
        """Count a session until its lease ends."""
        return Lease(self)


class Lease(Generic[InfoT]):
    """A session that counts against its replica until it ends or is lost."""

    def __init__(self, replica: Replica[InfoT]) -> None:
        self.replica = replica
        self._is_over = self._is_opened = False
        replica.load.begin()

    def opened(self) -> None:
        """Take note that the session's first answer is there, with which the replica counts it."""
        if not self._is_opened and not self._is_over:
            self._is_opened = True
            self.replica.load.opened()

    def end(self) -> None:
        """Count the session no longer; a lease that is over stays so."""
        if not self._is_over:
            self._is_over = True
            self.replica.load.end(was_opened=self._is_opened)


class ReplicaWatch(Generic[InfoT]):
    """Follows a replica's health through grpc.health.v1. It asks the replica what it is whenever it comes up,
    and how busy it is while no session's answer tells.

    Args:
        get_info: asks the service at a channel what it is; None: the answer cannot be read.
        check: raises a SpecdecError if what it says does not do.
        on_change: told whenever the replica may have become ready, or not ready.
    """

    def __init__(
        self,
        replica: Replica[InfoT],
        *,
        get_info: Callable[[grpc.aio.Channel], Any],
        check: Callable[[InfoT], None],
        on_change: Callable[[], Awaitable[None]],
    ) -> None:
        self.replica = replica
        self._get_info = get_info
        self._check = check
        self._on_change = on_change
        self._asked_at = -math.inf
        """When it was last asked what it is, by time.monotonic."""
        self._tasks = [asyncio.ensure_future(self._watch()), asyncio.ensure_future(self._follow_load())]

    async def close(self) -> None:
        """Stop watching and close the replica's channel."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.replica.close()

    async def refresh(self) -> None:
        """Ask anew what the replica is; without a right answer it keeps what it said."""
        with suppress(grpc.aio.AioRpcError, SpecdecError):
            await self._ask()

    async def _follow_load(self) -> None:
        """Ask the replica how busy it is whenever it has not said so for a while."""
        while True:
            await asyncio.sleep(LOAD_INTERVAL_S)
            if self.replica.is_ready and self.replica.load.age_s >= LOAD_INTERVAL_S:
                try:
                    await self.refresh()
                except Exception:  # a replica that answers nonsense must not end it
                    logger.exception("asking a replica for its load failed", extra={"uri": self.replica.uri})

    async def _ask(self) -> None:
        """Ask the replica what it says of itself, and take note of it.

        Raises:
            SpecdecError: the answer makes no sense, or is of a replica that cannot be used.
            AioRpcError: the replica does not answer.
        """
        info: InfoT | None = await self._get_info(self.replica.channel)
        if info is None:
            # What grpc.aio makes of bytes that are not a message of the type.
            raise UnavailableError("Its answer to GetInfo cannot be read.", reason="MALFORMED_REPLY")
        self._check(info)
        self.replica.info = info
        self.replica.load.told(Load.from_proto(info.load))

    async def _watch(self) -> None:
        """Follow the replica's health for as long as the gateway runs."""
        while True:
            channel = self.replica.channel
            heard = asyncio.Event()
            following = asyncio.ensure_future(self._follow(channel, heard))
            try:
                while not following.done() and self.replica.channel is channel:
                    await asyncio.wait((following,), timeout=_TLS_CHECK_S if self.replica.uses_tls else None)
                    if not heard.is_set() and not following.done():
                        await self._explain_silence(channel, heard)
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    async def _follow(self, channel: grpc.aio.Channel, heard: asyncio.Event) -> None:
        """Follow the replica's health until the watch ends, which is told after a pause."""
        request = health_pb2.HealthCheckRequest(service=self.replica.service)
        retry_s = _RETRY_S
        try:
            # The call waits for ready: it starts when the server is there and serving.
            stub: Any = health_pb2_grpc.HealthStub(channel)
            async for response in stub.Watch(request, wait_for_ready=True):
                heard.set()
                await self._update(response.status)
            await self._mark("the server ended the health watch")
        except grpc.aio.AioRpcError as error:
            await self._mark(f"{error.code().name}: {error.details()}")
        except SpecdecError as error:
            retry_s = _REFUSED_RETRY_S
            await self._mark(error.message)
        except Exception as error:  # a replica that answers nonsense must not end its watch
            logger.exception("watching a replica failed", extra={"uri": self.replica.uri})
            await self._mark(f"{type(error).__name__}: {error}")
        await asyncio.sleep(retry_s)

    async def _explain_silence(self, channel: grpc.aio.Channel, heard: asyncio.Event) -> None:
        """Say why a watch over TLS does not begin: it waits and never tells of a certificate refused."""
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=_CHECK_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if not heard.is_set():
                await self._mark(f"{error.code().name}: {error.details()}")

    async def _update(self, status: int) -> None:
        if status != health_pb2.HealthCheckResponse.SERVING:
            names = {value: name for name, value in health_pb2.HealthCheckResponse.ServingStatus.items()}
            await self._mark(names.get(status, f"health status {status}"))
            return
        # A replica that goes up and down all the time has to wait before it is up, never before it is down.
        await asyncio.sleep(max(0.0, self._asked_at + _RETRY_S - time.monotonic()))
        self._asked_at = time.monotonic()
        await self._ask()
        await self._mark("")

    async def _mark(self, reason: str) -> None:
        replica = self.replica
        if reason != replica.reason:
            lost = "replica not reachable" if replica.info is None else "replica lost"
            extra = {"uri": replica.uri, "peer_service": replica.service, "reason": reason}
            logger.info(lost if reason else "replica ready", extra=extra)
        replica.reason = reason
        await self._on_change()
