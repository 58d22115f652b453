"""Callers of a server: who they are, what they may ask for, and the interface of an authenticator."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a caller. None: the caller does not have that limit."""

    max_concurrent_requests: int | None = None
    """Most generations that run at the same time."""
    max_new_tokens: int | None = None
    """Most tokens that one generation may emit."""
    requests_per_minute: int | None = None
    """Most generations that begin within any 60 seconds."""


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request, as an authenticator knows it."""

    name: str
    """Name of the caller; calls with the same name share the limits."""
    limits: Limits = Limits()


class Authenticator(Protocol):
    """Decides who may call a server."""

    async def authenticate(self, metadata: Mapping[str, str | bytes]) -> Caller:
        """Find the caller that sent the metadata, whose keys are in lower case.

        Raises:
            UnauthenticatedError: the caller is not known. The message must not help to guess credentials.
        """


CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)
"""The caller that the current task answers. None: the server does not have an authenticator."""


def caller_key() -> str:
    """Return a key that tells callers apart without naming them. Empty: the current caller is not known."""
    caller = CALLER.get()
    return hashlib.sha256(f"specdec caller {caller.name}".encode()).hexdigest()[:32] if caller else ""
