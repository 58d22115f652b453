"""Rules for a server's streams: who may open a session, how long a peer may be silent or not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc

from specdec.contract.errors import DeadlineExceededError, PermissionDeniedError

_Message = TypeVar("_Message")

WRITE_TIMEOUT_S = 60.0
"""Seconds within which a peer must read a message; until then it holds memory and a session."""


class SessionContext(Protocol):
    """What a session's handler needs of its call, or of its part in a call that it shares."""

    async def write(self, message: Any, /) -> None:
        """Send a message to the session's peer."""

    def auth_context(self) -> Mapping[str, Any]:
        """Return what the peer's certificate says."""

    def time_remaining(self) -> float | None:
        """Return the seconds until the session's deadline; None: there is none."""


@dataclass(frozen=True, slots=True)
class SessionRules:
    """Who may open sessions at a model service, and how long a session may be silent.

    Args:
        callers: DNS names, one of which a caller's certificate must carry; empty: anyone may open sessions.
        idle_timeout_s: longest time between two messages of a session, seconds.
    """

    callers: frozenset[str] = frozenset()
    idle_timeout_s: float = 300.0

    def admit(self, context: SessionContext) -> None:
        """Refuse a caller that may not open a session.

        Raises:
            PermissionDeniedError: the caller's certificate carries none of the names.
        """
        if not self.callers:
            return
        names = context.auth_context().get("x509_subject_alternative_name", ())
        if self.callers.isdisjoint(name.decode(errors="replace") for name in names):
            raise PermissionDeniedError(
                "This certificate may not open sessions; use one whose DNS name --tls-session-callers lists.",
                reason="NOT_A_SESSION_CALLER",
            )

    async def messages(self, requests: AsyncIterator[_Message]) -> AsyncIterator[_Message]:
        """Yield the messages of a session until the peer ends it.

        Raises:
            DeadlineExceededError: no message arrived within the idle timeout.
        """
        while True:
            try:
                async with asyncio.timeout(self.idle_timeout_s):
                    request = await anext(requests, None)
            except TimeoutError:
                raise DeadlineExceededError(
                    f"The session got no message for {self.idle_timeout_s:g} s and ended; open a new one.",
                    reason="IDLE_SESSION",
                ) from None
            if request is None:
                return
            yield request


async def send(context: SessionContext, message: Any, timeout_s: float = WRITE_TIMEOUT_S) -> None:
    """Write a message to a stream.

    Raises:
        DeadlineExceededError: the peer did not read the message in time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(message)
    except TimeoutError:
        raise DeadlineExceededError(
            f"The peer did not read a message for {timeout_s:g} s, so the call has ended; call again.",
            reason="NOT_READ",
        ) from None


def remaining_timeout_s(context: grpc.aio.ServicerContext[Any, Any], margin_s: float = 0.05) -> float | None:
    """Return the seconds until the caller's deadline, minus a margin for the answer; None: no deadline."""
    remaining = context.time_remaining()
    return None if remaining is None else max(0.0, remaining - margin_s)
