"""The replicas behind the gateway: which are healthy, what they offer, who gets the next session."""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Generic, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from specdec.contract.errors import InvalidArgumentError, SpecdecError, UnavailableError
from specdec.contract.methods import is_drafter_name
from specdec.transport.channel import ServiceChannel
from specdec.transport.handshake import check_protocol_version, check_vocabulary
from specdec.transport.tls import OutgoingTls
from specdec.v1 import drafter_pb2, drafter_pb2_grpc, verifier_pb2, verifier_pb2_grpc

logger = logging.getLogger(__name__)

InfoT = TypeVar("InfoT")

_RETRY_S = 0.2
_REFUSED_RETRY_S = 2.0
"""Until a replica is asked again that cannot be used: reading what it says of itself may be work."""
_NOT_YET = "not serving yet"
_INFO_TIMEOUT_S = 5.0
_RESOLVE_INTERVAL_S = 5.0
_MAX_INFO_BYTES = 64 * 1024
"""Most a drafter service may say of itself: clients are told all of it."""
_TLS_CHECK_S = 1.0
"""How often a health watch over TLS looks whether certificates changed, seconds."""

Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""Addresses of a `dns:` URI, as gRPC URIs; OSError if it cannot be resolved."""


async def resolve_name(uri: str) -> list[str]:
    """Every address of `dns:[//authority/]host:port`, by the system's resolver.

    Raises:
        OSError: the name is unknown, or the name server does not answer.
    """
    port = uri.rpartition(":")[2]
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(_host_of(uri), int(port), type=socket.SOCK_STREAM)
    addresses = {(family, address[0]) for family, _, _, _, address in found}
    return sorted(
        f"ipv6:[{ip}]:{port}" if family == socket.AF_INET6 else f"ipv4:{ip}:{port}"
        for family, ip in addresses
    )


def _host_of(uri: str) -> str:
    """The host of `dns:[//authority/]host:port`."""
    return uri.removeprefix("dns:").rpartition("/")[2].rpartition(":")[0].strip("[]")


class Replica(Generic[InfoT]):
    """One address of a service and what is known of it.

    Args:
        server_name: name its certificate must carry; empty: the address's.
    """

    def __init__(self, uri: str, service: str, tls: OutgoingTls | None = None, server_name: str = "") -> None:
        self.uri = uri
        self._channel = ServiceChannel(uri, service=service, tls=tls, server_name=server_name)
        self.num_sessions = 0
        self.reason = _NOT_YET
        """Why it gets no sessions; empty: it does."""
        self.asked_at = -math.inf
        """When it was last asked what it is, by time.monotonic."""
        self.info: InfoT | None = None
        """What it said of itself when it was last ready; kept while it is not."""

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel for a new call; another one once certificates changed."""
        return self._channel.current()

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    @property
    def is_ready(self) -> bool:
        """Whether it may be given sessions."""
        return not self.reason

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Count a session as long as the block runs."""
        self.num_sessions += 1
        try:
            yield
        finally:
            self.num_sessions -= 1


class ReplicaSet(Generic[InfoT]):
    """All replicas of one service, watched through grpc.health.v1.

    A `dns:` URI stands for every address its name has, each a replica of its own; the name is resolved again
    and again, so that replicas may come and go. A session stays with its replica; a new one goes to the ready
    replica with the fewest.
    """

    def __init__(
        self,
        service: str,
        uris: Sequence[str],
        *,
        get_info: Callable[[grpc.aio.Channel], Any],
        check: Callable[[InfoT], None],
        resolve: Resolve = resolve_name,
        resolve_interval_s: float = _RESOLVE_INTERVAL_S,
        tls: OutgoingTls | None = None,
    ) -> None:
        self.service = service
        self._tls = tls
        self._get_info = get_info
        self._check = check
        self._resolve = resolve
        self._resolve_interval_s = resolve_interval_s
        self._changed = asyncio.Condition()
        self._watched: dict[str, tuple[Replica[InfoT], asyncio.Task[None]]] = {}
        self._unresolved: dict[str, str] = {}
        for uri in uris:
            if not uri.startswith("dns:"):
                self._add(uri)
        names = [uri for uri in uris if uri.startswith("dns:")]
        self._resolving = [asyncio.ensure_future(self._follow_name(uri)) for uri in names]

    @property
    def replicas(self) -> list[Replica[InfoT]]:
        """The replicas, ready or not."""
        return [replica for replica, _ in self._watched.values()]

    @property
    def num_ready(self) -> int:
        """Replicas that can be picked; may be read by any thread."""
        return sum(replica.is_ready for replica, _ in list(self._watched.values()))

    async def close(self) -> None:
        """Stop watching and close the channels."""
        for task in self._resolving:
            task.cancel()
        await asyncio.gather(*self._resolving, return_exceptions=True)
        for uri in list(self._watched):
            await self._remove(uri)

    def _add(self, uri: str, server_name: str = "") -> None:
        replica: Replica[InfoT] = Replica(uri, self.service, self._tls, server_name)
        self._watched[uri] = replica, asyncio.ensure_future(self._watch(replica))

    async def _remove(self, uri: str) -> None:
        replica, task = self._watched.pop(uri)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await replica.close()

    async def _follow_name(self, uri: str) -> None:
        """Keep the replicas of a name in step with its addresses."""
        mine: set[str] = set()
        while True:
            try:
                found = set(await self._resolve(uri))
                self._unresolved.pop(uri, None)
            except OSError as error:
                found = mine  # a failing name server does not make replicas go away
                self._unresolved[uri] = f"the name cannot be resolved: {error}"
            for address in found - self._watched.keys():
                # The certificate is made out to the name, not to each address it has.
                self._add(address, server_name=_host_of(uri))
            for address in mine - found:
                # Not while it is in use or answers health checks: it may only have left the name to drain.
                if (replica := self._watched[address][0]).num_sessions or replica.is_ready:
                    found.add(address)
                else:
                    await self._remove(address)
            mine = found
            await asyncio.sleep(self._resolve_interval_s)

    def pick(self, suits: Callable[[InfoT], bool] = lambda _: True, *, near: str = "") -> Replica[InfoT]:
        """The least busy ready replica that suits.

        Args:
            suits: whether what a replica says of itself will do.
            near: URI of another service; a replica at its address, in its pod that is, goes before all
                others: it may map what they would have to stream.

        Raises:
            UnavailableError: there is none; the message says why for each.
        """
        fitting = [
            replica
            for replica in self.replicas
            if replica.is_ready and replica.info is not None and suits(replica.info)
        ]
        if not fitting:
            name = self.service.rpartition(".")[2]
            raise UnavailableError(
                f"No {name} replica is ready ({self.describe()}). Start one, or check the "
                "gateway's addresses.",
                reason="NO_REPLICA",
                retry_after_s=1.0,
            )
        return min(fitting, key=lambda replica: (_host(replica.uri) != _host(near), replica.num_sessions))

    def describe(self) -> str:
        """Why each replica that is not used is not."""
        known = {r.uri: r.reason or "does not suit" for r in self.replicas} | self._unresolved
        return "; ".join(f"{uri}: {reason}" for uri, reason in known.items()) or "none configured"

    async def wait_until_ready(self) -> None:
        """Return once a replica is ready."""
        async with self._changed:
            await self._changed.wait_for(lambda: any(replica.is_ready for replica in self.replicas))

    async def refresh(self) -> None:
        """Ask every ready replica anew how busy it is; one without a right answer keeps what it said."""
        ready = [replica for replica in self.replicas if replica.is_ready]
        await asyncio.gather(*(self._refresh(replica) for replica in ready))

    async def _refresh(self, replica: Replica[InfoT]) -> None:
        with suppress(grpc.aio.AioRpcError, SpecdecError):
            replica.info = await self._ask(replica)

    async def _ask(self, replica: Replica[InfoT]) -> InfoT:
        """What a replica says of itself.

        Raises:
            SpecdecError: it makes no sense, or is of a replica that cannot be used.
            AioRpcError: it does not answer.
        """
        info: InfoT | None = await self._get_info(replica.channel)
        if info is None:
            # What grpc.aio makes of bytes that are no message of the type.
            raise UnavailableError("Its answer to GetInfo cannot be read.", reason="MALFORMED_REPLY")
        self._check(info)
        return info

    @property
    def known_infos(self) -> list[InfoT]:
        """What every replica that was ever ready said of itself."""
        return [replica.info for replica in self.replicas if replica.info is not None]

    @property
    def is_known(self) -> bool:
        """Whether a replica was ready at least once, or there is none to wait for."""
        nothing_to_wait_for = not self.replicas and not self._resolving
        return nothing_to_wait_for or bool(self.known_infos)

    async def _watch(self, replica: Replica[InfoT]) -> None:
        """Follow a replica's health for as long as the gateway runs."""
        while True:
            channel = replica.channel
            heard = asyncio.Event()
            following = asyncio.ensure_future(self._follow(replica, channel, heard))
            try:
                while not following.done() and replica.channel is channel:
                    await asyncio.wait((following,), timeout=_TLS_CHECK_S if self._tls else None)
                    if not heard.is_set() and not following.done():
                        await self._explain_silence(replica, channel, heard)
            finally:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    async def _follow(self, replica: Replica[InfoT], channel: grpc.aio.Channel, heard: asyncio.Event) -> None:
        """Follow a replica's health until the watch ends, which is told after a pause."""
        request = health_pb2.HealthCheckRequest(service=self.service)
        retry_s = _RETRY_S
        try:
            # Waiting for ready: the call starts when the server is there and serving.
            stub: Any = health_pb2_grpc.HealthStub(channel)
            async for response in stub.Watch(request, wait_for_ready=True):
                heard.set()
                await self._update(replica, response.status)
            await self._mark(replica, "the server ended the health watch")
        except grpc.aio.AioRpcError as error:
            await self._mark(replica, f"{error.code().name}: {error.details()}")
        except SpecdecError as error:
            retry_s = _REFUSED_RETRY_S
            await self._mark(replica, error.message)
        except Exception as error:  # a replica that answers nonsense must not end its watch
            logger.exception("watching a replica failed", extra={"uri": replica.uri})
            await self._mark(replica, f"{type(error).__name__}: {error}")
        await asyncio.sleep(retry_s)

    async def _explain_silence(
        self, replica: Replica[InfoT], channel: grpc.aio.Channel, heard: asyncio.Event
    ) -> None:
        """Say why a watch over TLS does not begin: one that waits never tells of a certificate refused."""
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            await stub.Check(health_pb2.HealthCheckRequest(), timeout=_INFO_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if not heard.is_set():
                await self._mark(replica, f"{error.code().name}: {error.details()}")

    async def _update(self, replica: Replica[InfoT], status: int) -> None:
        if status != health_pb2.HealthCheckResponse.SERVING:
            await self._mark(replica, health_pb2.HealthCheckResponse.ServingStatus.Name(status))
            return
        # One that goes up and down all the time is let wait before it is up, never before it is down.
        await asyncio.sleep(max(0.0, replica.asked_at + _RETRY_S - time.monotonic()))
        replica.asked_at = time.monotonic()
        replica.info = await self._ask(replica)
        await self._mark(replica, "")

    async def _mark(self, replica: Replica[InfoT], reason: str) -> None:
        if reason != replica.reason:
            event = "replica lost" if reason else "replica ready"
            logger.info(event, extra={"uri": replica.uri, "service": self.service, "reason": reason})
        replica.reason = reason
        async with self._changed:
            self._changed.notify_all()


def _host(uri: str) -> str:
    """A URI without its port; that of every Unix socket is the same."""
    return uri.rpartition(":")[0]


VerifierSet = ReplicaSet[verifier_pb2.VerifierServiceGetInfoResponse]
DrafterSet = ReplicaSet[drafter_pb2.DrafterServiceGetInfoResponse]

VERIFIER_SERVICE = verifier_pb2.DESCRIPTOR.services_by_name["VerifierService"].full_name
DRAFTER_SERVICE = drafter_pb2.DESCRIPTOR.services_by_name["DrafterService"].full_name


def make_verifier_set(
    uris: Sequence[str],
    vocabulary_fingerprint: str,
    *,
    resolve: Resolve = resolve_name,
    resolve_interval_s: float = _RESOLVE_INTERVAL_S,
    tls: OutgoingTls | None = None,
) -> VerifierSet:
    """Verifiers, of which those with the gateway's vocabulary are used."""

    def check(info: verifier_pb2.VerifierServiceGetInfoResponse) -> None:
        check_protocol_version(info.protocol_version, info.min_protocol_version)
        check_vocabulary(info.model.vocabulary_fingerprint, vocabulary_fingerprint)

    async def get_info(channel: grpc.aio.Channel) -> verifier_pb2.VerifierServiceGetInfoResponse:
        request = verifier_pb2.VerifierServiceGetInfoRequest()
        stub = verifier_pb2_grpc.VerifierServiceStub(channel)
        info: verifier_pb2.VerifierServiceGetInfoResponse
        info = await stub.GetInfo(request, timeout=_INFO_TIMEOUT_S)
        return info

    return ReplicaSet(
        VERIFIER_SERVICE,
        uris,
        get_info=get_info,
        check=check,
        resolve=resolve,
        resolve_interval_s=resolve_interval_s,
        tls=tls,
    )


def make_drafter_set(uris: Sequence[str], *, tls: OutgoingTls | None = None) -> DrafterSet:
    """Drafter services; whether a drafter fits the vocabulary is each session's question."""

    def check(info: drafter_pb2.DrafterServiceGetInfoResponse) -> None:
        check_protocol_version(info.protocol_version, info.min_protocol_version)
        if info.ByteSize() > _MAX_INFO_BYTES:
            raise InvalidArgumentError(
                f"It describes itself in {info.ByteSize()} bytes; at most {_MAX_INFO_BYTES} are taken."
            )
        for drafter in info.drafters:
            if not is_drafter_name(drafter.name):
                raise InvalidArgumentError(f"{drafter.name[:80]!r} is no name of a drafter.")

    async def get_info(channel: grpc.aio.Channel) -> drafter_pb2.DrafterServiceGetInfoResponse:
        request = drafter_pb2.DrafterServiceGetInfoRequest()
        stub = drafter_pb2_grpc.DrafterServiceStub(channel)
        info: drafter_pb2.DrafterServiceGetInfoResponse
        info = await stub.GetInfo(request, timeout=_INFO_TIMEOUT_S)
        return info

    return ReplicaSet(DRAFTER_SERVICE, uris, get_info=get_info, check=check, tls=tls)


def find_drafter(
    info: drafter_pb2.DrafterServiceGetInfoResponse, name: str
) -> drafter_pb2.DrafterInfo | None:
    """The drafter of that name in a service."""
    return next((drafter for drafter in info.drafters if drafter.name == name), None)
