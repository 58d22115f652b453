"""The HTTP server of a gateway, on the event loop and with the certificates, tokens and limits of its own."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from gateway.config import GatewayConfig
from gateway.generations import Generations
from gateway.http.app import App
from gateway.http.connection import CLOSING_S, Connection, HttpLimits
from gateway.http.edge import Edge
from specdec.contract.errors import InvalidArgumentError
from specdec.service.auth import Authenticator
from specdec.service.config import parse_address
from specdec.transport.server import HANDSHAKE_TIMEOUT_S
from specdec.transport.tls import HttpTls

logger = logging.getLogger(__name__)

_BACKLOG = 512
"""Most connections that the kernel holds until they are accepted."""
_SEND_BUFFER_BYTES = 2**17
"""What the kernel keeps for a client that does not read; by itself it would keep megabytes."""
_TICKS_PER_CHECK = 10
"""How many of uvicorn's ticks, of 0.1 s each, pass between two looks at the connections."""


class HttpFront:
    """OpenAI's interface on an address of its own.

    Args:
        config: of the gateway; `http_listen` is set.
        generations: what runs requests.
        authenticator: decides who may ask; None: everyone that can connect may.

    Raises:
        InvalidArgumentError: the TLS files are not valid.
    """

    def __init__(
        self, config: GatewayConfig, generations: Generations, authenticator: Authenticator | None
    ) -> None:
        self.address = config.http_listen
        """The address of the server, with the real port after the start."""
        self.limits = HttpLimits(
            max_connections=config.max_http_connections,
            idle_s=config.connection_idle_s or config.max_connection_age_s,
            max_age_s=config.max_connection_age_s,
        )
        self.app = App(config, generations, lambda: self._is_serving)
        self.edge = Edge(self.app, authenticator)
        self._is_serving = False
        self._tls = HttpTls(config.server_tls) if config.server_tls else None
        self._server: _Server | None = None
        self._running: asyncio.Task[None] | None = None

    @property
    def num_connections(self) -> int:
        """How many connections there are."""
        return len(self._server.server_state.connections) if self._server else 0

    async def start(self) -> None:
        """Listen, and answer that the gateway is not ready yet.

        Raises:
            InvalidArgumentError: the address cannot be bound.
        """
        listener = _bind(self.address)
        self.address = f"{self.address.rpartition(':')[0]}:{listener.getsockname()[1]}"
        self._server = _Server(self.edge, self.limits, self._tls.context if self._tls else None)
        self._running = asyncio.ensure_future(self._server.serve([listener]))
        logger.info("listening", extra={"address": self.address, "tls": self._tls is not None})

    def set_serving(self, serving: bool) -> None:
        """Report from now on whether the gateway is ready."""
        self._is_serving = serving

    async def stop(self, grace_s: float) -> None:
        """Refuse new requests, and cancel those that still run after `grace_s` seconds."""
        self._is_serving = False
        if self._server and self._running:
            self._server.grace_s, self._server.should_exit = grace_s, True
            await self._running


class _Server(uvicorn.Server):
    """uvicorn's server with limits for its connections. The process's signals are not its business.

    Args:
        app: the ASGI application.
        limits: what connections may have.
        tls: context of the server's TLS; None: plaintext.
    """

    def __init__(self, app: Edge, limits: HttpLimits, tls: ssl.SSLContext | None) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            # What is logged of peers that speak no HTTP would be theirs to fill a disk with.
            log_level="error",
            access_log=False,
            # The limit of idle connections is ours, and ends them before uvicorn does.
            timeout_keep_alive=int(limits.idle_s) + 60,
            proxy_headers=False,
            server_header=False,
            reset_contextvars=True,
        )
        super().__init__(config)
        self.grace_s = 0.0
        """How long running requests may go on once the server stops, seconds."""
        self._limits, self._tls = limits, tls

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: the gateway's process handles them."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections."""
        times = {"ssl_handshake_timeout": HANDSHAKE_TIMEOUT_S, "ssl_shutdown_timeout": CLOSING_S}
        tls: dict[str, Any] = {"ssl": self._tls, **times} if self._tls else {}
        loop = asyncio.get_running_loop()
        self.servers = [
            await loop.create_server(self._connection, sock=listener, backlog=_BACKLOG, **tls)
            for listener in sockets or ()
        ]
        self.started = True

    def _connection(self) -> Connection:
        return Connection(self._limits, config=self.config, server_state=self.server_state, app_state={})

    async def on_tick(self, counter: int) -> bool:
        """End connections that take too long, and return whether to stop."""
        if counter % _TICKS_PER_CHECK == 0:
            now = asyncio.get_running_loop().time()
            for connection in self._connections():
                connection.check(now)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more connections, wait for requests that run, and end the others."""
        for server in self.servers:
            server.close()
        for connection in self._connections():
            connection.end()
        tasks = self.server_state.tasks
        if tasks and self.grace_s:
            await asyncio.wait(tasks, timeout=self.grace_s)
        for task in [*tasks]:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=CLOSING_S)
        for connection in self._connections():
            connection.transport.abort()

    def _connections(self) -> list[Connection]:
        return [each for each in self.server_state.connections if isinstance(each, Connection)]


def _bind(address: str) -> socket.socket:
    host, port = parse_address(address, "http_listen")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise InvalidArgumentError(
            f"Cannot listen on {address}: {error.strerror}. Pass another address with --http-listen.",
            field="http_listen",
            reason="ADDRESS_IN_USE",
        ) from error
    # Accepted connections inherit it.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    return listener
