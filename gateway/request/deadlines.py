"""How long a request may wait, and how long it may run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from gateway.place import Place
from gateway.replicas.services import VerifierSet
from gateway.request.answer_times import SHARE_TO_RUN
from specdec.contract.errors import DeadlineExceededError, ResourceExhaustedError, SpecdecError
from specdec.contract.retry import advice_s

TimeLeft = Callable[[], float | None]
"""Returns the seconds until a request's deadline; None: it has none."""


def may_begin(time_left: TimeLeft, longest_s: Callable[[int], float]) -> Callable[[int], bool]:
    """Return whether a request may begin beside so many that run: not if at their pace most of the time until
    its deadline would be over when it ends. With more and more at a time, all would end too late.

    Args:
        longest_s: how long the answer should take at most as one of so many that run, seconds.
    """
    time_s = time_left()
    if time_s is None:
        return lambda number: True
    return lambda number: longest_s(number + 1) <= SHARE_TO_RUN * time_s


async def turn(
    place: Place, time_left: TimeLeft, max_wait_s: float, longest_s: Callable[[int], float]
) -> None:
    """Wait until a request may run, and see that there is time left to run it.

    Args:
        longest_s: how long the answer should take at most as one of so many that run, seconds.

    Raises:
        ResourceExhaustedError: it has to give way, because the queue is full, or its answer would end too
            late.
        DeadlineExceededError: it waited until its deadline, or for as long as a request may.
    """
    remaining_s = time_left()
    may_wait_s = max(0.0, max_wait_s - place.waited_s)
    takes_s = _takes_s(place, longest_s)
    spare_s = None if remaining_s is None else remaining_s - takes_s
    try:
        async with asyncio.timeout(may_wait_s if spare_s is None else min(may_wait_s, max(0.0, spare_s))):
            await place.turn()
    except TimeoutError:
        if spare_s is None or spare_s > may_wait_s:
            raise _waited_too_long(max_wait_s) from None
        raise _too_late(takes_s) from None
    remaining_s = time_left()
    takes_s = _takes_s(place, longest_s)
    if remaining_s is not None and remaining_s <= takes_s:
        raise _too_late(takes_s)


def _takes_s(place: Place, longest_s: Callable[[int], float]) -> float:
    """Return how long an answer should take at most, beside those that run. Who is alone is not kept from
    running: what is expected may be of a bad moment."""
    return longest_s(place.num_sharing) if place.num_sharing > 1 else 0.0


def _too_late(takes_s: float) -> SpecdecError:
    """Return the error of a request whose answer would take so long that it would end too late."""
    if not takes_s:
        return DeadlineExceededError("The deadline passed while the request waited for room.")
    return ResourceExhaustedError(
        f"Answers take up to {takes_s:.2g} s now, and the request has less time left; try again later, or "
        "allow more time.",
        reason="TOO_LITTLE_TIME",
        retry_after_s=advice_s(takes_s),
    )


async def verifier_ready(verifiers: VerifierSet, wait_s: float) -> None:
    """Wait for a verifier, as a request does whose verifier is lost: otherwise all who wait would fail when
    the verifiers restart."""
    with suppress(TimeoutError):
        async with asyncio.timeout(wait_s):
            await verifiers.wait_until_ready()


def _waited_too_long(max_wait_s: float) -> DeadlineExceededError:
    return DeadlineExceededError(
        f"The request waited {max_wait_s:g} s for room, and may not wait for longer; try again later.",
        reason="WAITED_TOO_LONG",
    )


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


def timeout_s(time_left: TimeLeft, most: float) -> float:
    """Return the seconds that the services have: until the caller's deadline, or the gateway's own."""
    remaining = time_left()
    return most if remaining is None else min(remaining, most)
