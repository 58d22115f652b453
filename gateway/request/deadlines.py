"""How long a request may wait, and how long it may run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from gateway.waiting import Place
from specdec.contract.errors import DeadlineExceededError
from specdec.service.sessions import remaining_timeout_s

_Context = grpc.aio.ServicerContext[Any, Any]


async def turn(place: Place, context: _Context, max_wait_s: float) -> None:
    """Wait until a request may run, and see that there is time left to run it.

    Raises:
        ResourceExhaustedError: it has to give way, because the queue is full.
        DeadlineExceededError: it waited until its deadline, or for as long as a request may.
    """
    remaining_s = remaining_timeout_s(context)
    may_wait_s = max(0.0, max_wait_s - place.waited_s)
    try:
        async with asyncio.timeout(may_wait_s if remaining_s is None else min(may_wait_s, remaining_s)):
            await place.turn()
    except TimeoutError:
        if remaining_s is None or remaining_s > may_wait_s:
            raise _waited_too_long(max_wait_s) from None
        raise _deadline_passed() from None
    if remaining_timeout_s(context) == 0:
        raise _deadline_passed()


def _waited_too_long(max_wait_s: float) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"The request waited {max_wait_s:g} s for room, and may not wait for longer; try again later.",
        reason="WAITED_TOO_LONG",
    )


def _deadline_passed() -> DeadlineExceededError:
    return DeadlineExceededError("The deadline passed while the request waited for room.")


@asynccontextmanager
async def at_most(seconds: float) -> AsyncIterator[None]:
    """Limit the time that a request runs, whatever its client does.

    Raises:
        DeadlineExceededError: the time is over.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineExceededError(
            f"The request took longer than {seconds:g} s, which is the most this gateway gives one; ask for "
            "fewer tokens, and read them as they come.",
            reason="REQUEST_TOO_LONG",
        ) from None


def timeout_s(context: _Context, most: float) -> float:
    """Return the seconds that the services have: until the caller's deadline, or the gateway's own."""
    remaining = remaining_timeout_s(context)
    return most if remaining is None else min(remaining, most)
