"""Who calls a server: what an authenticator is, and what it says of a caller."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Limits:
    """What a caller may ask for; None: no limit of its own."""

    max_concurrent_requests: int | None = None
    """Most generations at a time."""
    max_new_tokens: int | None = None
    """Most tokens one generation may emit."""
    requests_per_minute: int | None = None
    """Most generations begun within any 60 seconds."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who makes a call, as far as the authenticator tells."""

    name: str
    """Limits count per name."""
    limits: Limits = Limits()


class Authenticator(Protocol):
    """Decides who may call a server."""

    async def authenticate(self, metadata: Mapping[str, str | bytes]) -> Caller:
        """Who sent this metadata, keys in lower case.

        Raises:
            UnauthenticatedError: nobody known; the message must not help to guess.
        """


CALLER: ContextVar[Caller | None] = ContextVar("caller", default=None)
"""The caller of the call this task answers; None where the server has no authenticator."""


def caller_key() -> str:
    """A key that tells the current caller from others without naming it; empty where nobody is known."""
    caller = CALLER.get()
    return hashlib.sha256(f"specdec caller {caller.name}".encode()).hexdigest()[:32] if caller else ""
