"""One HTTP connection: how long it may be without a request, take for one, and how many there may be."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.http.edge import ABORT
from gateway.http.errors import error_content, error_headers
from gateway.http.events import to_json
from specdec.contract.errors import UnavailableError
from specdec.contract.retry import SOONEST_S
from specdec.service.first_message import TIMEOUT_S
from specdec.service.sessions import WRITE_TIMEOUT_S

CLOSING_S = 5.0
"""How long a connection that ends may take to read what was sent, seconds."""


@dataclass(slots=True)
class HttpLimits:
    """What HTTP connections may have."""

    max_connections: int
    """Most connections at a time."""
    idle_s: float
    """How long a connection without a request stays open, seconds."""
    max_age_s: float
    """Age at which a connection ends with its next answer, seconds, give or take a tenth."""
    head_s: float = TIMEOUT_S
    """How long the head of a request may take to come, seconds."""
    unread_s: float = WRITE_TIMEOUT_S
    """How long the end of an answer may wait to be read, seconds."""
    closing_s: float = CLOSING_S
    """How long a connection that ends may take to read what was sent, seconds."""


class Connection(H11Protocol):
    """A connection within its limits; the server calls `check` now and then."""

    def __init__(self, limits: HttpLimits, **parts: Any) -> None:
        super().__init__(**parts)
        self._limits = limits
        self._made_at = self._idle_since = self.loop.time()
        self._head_since: float | None = None
        """When the first bytes of a request came whose head is not complete; None: none is."""
        self._closing_since: float | None = None
        self._max_age_s = limits.max_age_s * random.uniform(0.9, 1.1)

    @property
    def is_busy(self) -> bool:
        """Whether a request is received or answered."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections and not self._make_room():
            self._refuse()

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self.is_busy and not self.cycle.more_body:
            self._end_after_this_answer()
            return
        if self._head_since is None:
            self._head_since = self.loop.time()
        super().data_received(data)
        if self.is_busy:
            self._head_since = None

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            # The request's task has not begun yet.
            self.scope["extensions"] = {ABORT: {"call": self.transport.abort}}
            if self.loop.time() - self._made_at > self._max_age_s:
                self.headers.append(CLOSE_HEADER)

    def on_response_complete(self) -> None:
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def check(self, now: float) -> None:
        """End the connection if it has taken too long for what it does, by the loop's clock."""
        if self.transport.is_closing():
            if self._closing_since is None:
                self._closing_since = now
            elif now - self._closing_since > self._limits.closing_s:
                self.transport.abort()
        elif not self.is_busy:
            limits = self._limits
            is_unread = self.transport.get_write_buffer_size() > 0
            idle_s = min(limits.idle_s, limits.unread_s) if is_unread else limits.idle_s
            is_late = self._head_since is not None and now - self._head_since > limits.head_s
            if is_late or now - self._idle_since > idle_s:
                self.end()

    def end(self) -> None:
        """Close the connection, or let it close with the answer to its request."""
        with suppress(h11.LocalProtocolError):
            self.shutdown()

    def _end_after_this_answer(self) -> None:
        """Close the connection with the answer that it waits for, and throw away what comes before that.

        Kept for later, it would have to stay in the kernel, and with it the news that the client has gone.
        """
        if self.cycle.keep_alive:
            self.cycle.keep_alive = False
            self.headers.append(CLOSE_HEADER)

    def _make_room(self) -> bool:
        """End the connection that has been without a request for the longest time, and return whether there
        was one."""
        others = [other for other in self.connections if isinstance(other, Connection) and other is not self]
        idle = [other for other in others if not other.is_busy and not other.transport.is_closing()]
        if not idle:
            return False
        min(idle, key=lambda other: other._idle_since).end()
        return True

    def _refuse(self) -> None:
        error = UnavailableError(
            f"The gateway has {self._limits.max_connections} connections, all in use; try again later.",
            reason="TOO_MANY_CONNECTIONS",
            retry_after_s=SOONEST_S,
        )
        body = to_json(error_content(error))
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **error_headers(error),
        }
        for event in (
            h11.Response(status_code=503, headers=[*headers.items()], reason=b"Service Unavailable"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event))
        self.transport.close()
