"""Rules for the streams of a server: who may open a session, how long a peer may be silent or not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from specdec.contract.errors import DeadlineExceededError, PermissionDeniedError

_Message = TypeVar("_Message")

WRITE_TIMEOUT_S = 60.0
"""How long a peer may leave unread what it is sent; it holds memory and a session until then."""


@dataclass(frozen=True, slots=True)
class SessionRules:
    """Who may open sessions at a model service, and how long one may be silent.

    Args:
        callers: DNS names one of which a caller's certificate must carry; empty: anyone may.
        idle_timeout_s: longest time between two messages.
    """

    callers: frozenset[str] = frozenset()
    idle_timeout_s: float = 300.0

    def admit(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Refuse a caller that may not open a session.

        Raises:
            PermissionDeniedError: its certificate carries none of the names.
        """
        if not self.callers:
            return
        names = context.auth_context().get("x509_subject_alternative_name", ())
        if self.callers.isdisjoint(name.decode(errors="replace") for name in names):
            raise PermissionDeniedError(
                "This certificate may not open sessions; --tls-session-callers names those that may.",
                reason="NOT_A_SESSION_CALLER",
            )

    async def messages(self, requests: AsyncIterator[_Message]) -> AsyncIterator[_Message]:
        """A session's messages.

        Raises:
            DeadlineExceededError: none came for too long.
        """
        while True:
            try:
                async with asyncio.timeout(self.idle_timeout_s):
                    request = await anext(requests, None)
            except TimeoutError:
                raise DeadlineExceededError(
                    f"The session had no message for {self.idle_timeout_s:g} s and has ended; open another.",
                    reason="IDLE_SESSION",
                ) from None
            if request is None:
                return
            yield request


async def send(
    context: grpc.aio.ServicerContext[Any, Any], message: Any, timeout_s: float = WRITE_TIMEOUT_S
) -> None:
    """Write a message of a stream.

    Raises:
        DeadlineExceededError: the peer does not read.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(message)
    except TimeoutError:
        raise DeadlineExceededError(
            f"What was sent has not been read for {timeout_s:g} s, so the call has ended.",
            reason="NOT_READ",
        ) from None


def remaining_timeout_s(context: grpc.aio.ServicerContext[Any, Any], margin_s: float = 0.05) -> float | None:
    """Seconds left of the caller's deadline, less a margin for the answer; None: no deadline."""
    remaining = context.time_remaining()
    return None if remaining is None else max(0.0, remaining - margin_s)
