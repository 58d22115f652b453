"""A gRPC server on one address, with health, reflection and typed errors."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from specdec.contract.errors import InvalidArgumentError
from specdec.service.auth import Authenticator
from specdec.service.first_message import FirstMessageInterceptor
from specdec.service.health import DRAIN_S, LIVENESS, HealthService
from specdec.service.interceptors import AuthInterceptor, HouseInterceptor, OpenCalls, RequestIdInterceptor
from specdec.transport.channel import check_socket_path, socket_path
from specdec.transport.server import (
    DEFAULT_LIMITS,
    HEALTH_MESSAGE_BYTES,
    ConnectionLimits,
    server_options,
)
from specdec.transport.tls import PemFiles, server_credentials


class Front(Protocol):
    """Another way into a service, such as HTTP. It starts, drains and stops with the service's host."""

    async def start(self) -> None:
        """Listen, and answer that the service is not ready yet.

        Raises:
            InvalidArgumentError: the address cannot be bound.
        """

    def set_serving(self, serving: bool) -> None:
        """Report from now on whether the service is ready."""

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, and cancel those that still run after `grace_s` seconds."""


class ServiceHost:
    """A gRPC server on one address.

    Args:
        service: full name of the service. Its health is reported as well as the server's own, which is "".
        register: adds the servicer to the server.
        listen: host:port or unix:/path; port 0 is any free port.
        tls: certificate and key of the server, and the authorities of callers' certificates; None: plaintext.
        authenticator: decides who may call; None: everyone that can connect may call.
        health_listen: host:port of a plaintext port that serves health only; empty: there is no such port.
        limits: what each connection may have.
        on_drain: called when the server begins to stop, before running calls are waited for.
        calls: counts the calls that are waited for; the servicer has it too where sessions share a call.
        fronts: other ways into the service.

    Raises:
        InvalidArgumentError: the TLS files are not valid.
    """

    def __init__(
        self,
        service: str,
        register: Callable[[grpc.aio.Server], None],
        listen: str,
        *,
        tls: PemFiles | None = None,
        authenticator: Authenticator | None = None,
        health_listen: str = "",
        limits: ConnectionLimits = DEFAULT_LIMITS,
        on_drain: Callable[[], None] = lambda: None,
        calls: OpenCalls | None = None,
        fronts: Sequence[Front] = (),
    ) -> None:
        self.address = listen
        """The address of the server, with the real port after the start."""
        self.health_address = health_listen
        """The address that serves health only, with the real port after the start. Empty: there is none."""
        self._service = service
        self._listen = listen
        self._on_drain = on_drain
        self._fronts = fronts
        self._credentials = server_credentials(tls) if tls else None
        self.first_messages = FirstMessageInterceptor()
        interceptors: list[grpc.aio.ServerInterceptor] = [RequestIdInterceptor(), self.first_messages]
        if authenticator:
            interceptors.append(AuthInterceptor(authenticator))
        self._calls = calls or OpenCalls()
        interceptors.append(HouseInterceptor(self._calls))
        self._server = grpc.aio.server(interceptors=interceptors, options=server_options(limits))
        self._health = HealthService()
        register(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (service, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
            self._server,
        )
        options = server_options(
            ConnectionLimits(max_message_bytes=HEALTH_MESSAGE_BYTES, idle_s=limits.idle_s)
        )
        self._health_server = grpc.aio.server(interceptors=[self.first_messages], options=options)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)

    async def start(self) -> str:
        """Bind the address and answer calls; health is NOT_SERVING until `set_serving`.

        Returns:
            The address with its real port.

        Raises:
            InvalidArgumentError: an address cannot be bound.
        """
        self._set_health(serving=False)
        self._health.set(LIVENESS, serving=True)
        self.address = _bind(self._server, self._listen, "listen", self._credentials)
        await self._server.start()  # a server that has not started keeps its port, whatever `stop` does
        if self.health_address:
            self.health_address = _bind(self._health_server, self.health_address, "health_listen")
            await self._health_server.start()
        for front in self._fronts:
            await front.start()
        return self.address

    @property
    def num_watches(self) -> int:
        """How many peers watch the server's health, on both ports."""
        return self._health.num_watches

    def limit_watches(self, most: int) -> None:
        """Let a host have so many watches at a time."""
        self._health.max_watches = most

    def set_serving(self, serving: bool = True) -> None:
        """Report SERVING from now on, or NOT_SERVING for the time being."""
        self._set_health(serving=serving)

    def _set_health(self, *, serving: bool) -> None:
        for name in ("", self._service):
            self._health.set(name, serving=serving)
        for front in self._fronts:
            front.set_serving(serving)

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, refuse new calls, and cancel calls that still run after `grace_s` seconds.

        Only calls of the service itself are waited for: a peer may leave a watch or a status unread for ever.
        """
        self._health.drain()
        self._calls.draining.set()
        self._on_drain()
        await asyncio.gather(self._stop_grpc(grace_s), *(front.stop(grace_s) for front in self._fronts))

    async def _stop_grpc(self, grace_s: float) -> None:
        if grace_s:
            await self._stop_within(grace_s)
        await self._server.stop(0)
        if self.health_address:
            # Watches end by themselves once they have told of the drain.
            await self._health_server.stop(DRAIN_S)

    async def _stop_within(self, grace_s: float) -> None:
        """Refuse new calls, and return once those of the service have ended and watchers had time to read."""
        stopping = asyncio.ensure_future(self._server.stop(grace_s))
        idle = asyncio.ensure_future(self._calls.none_left())
        while not stopping.done():
            await asyncio.wait((stopping, idle), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait((stopping,), timeout=DRAIN_S)
            if not self._calls.num_open:
                break
            idle = asyncio.ensure_future(self._calls.none_left())
        idle.cancel()


def _bind(
    server: grpc.aio.Server, listen: str, option: str, credentials: grpc.ServerCredentials | None = None
) -> str:
    """Bind a server to an address, and return the address with the real port."""
    try:
        if path := socket_path(listen):
            _require_usable(path)
        if credentials:
            port = server.add_secure_port(listen, credentials)
        else:
            port = server.add_insecure_port(listen)
    except (RuntimeError, FileExistsError) as error:
        raise InvalidArgumentError(
            f"Cannot listen on {listen}: the port is in use, or the address is not this host's. "
            f"Pass another address with --{option.replace('_', '-')}.",
            field=option,
            reason="ADDRESS_IN_USE",
        ) from error
    return listen if listen.startswith("unix") else f"{listen.rpartition(':')[0]}:{port}"


def _require_usable(path: str) -> None:
    """Refuse a unix socket that cannot be made, or on which a server answers; gRPC would take the socket
    away from that server.
    """
    check_socket_path(path)
    folder = Path(path).parent
    if not folder.is_dir():
        raise InvalidArgumentError(
            f"Cannot listen on {path}: {folder} is not a directory; make it, with mode 0700 if only your own "
            "processes may connect.",
            field="listen",
            reason="NO_SOCKET_DIRECTORY",
        )
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return  # nobody answers: gRPC may replace the file that was left behind
    raise FileExistsError(path)
