"""The rules for streams: what is left of a deadline, how long a peer may be silent or not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from specdec.contract.errors import DeadlineExceededError
from specdec.service.sessions import SessionRules, remaining_timeout_s, send


class Context:
    """A call's context: the time it has left, and a peer that reads nothing."""

    def __init__(self, time_remaining_s: float | None = None) -> None:
        self._time_remaining_s = time_remaining_s

    def time_remaining(self) -> float | None:
        return self._time_remaining_s

    async def write(self, _message: object) -> None:
        await asyncio.Event().wait()


def test_peers_are_given_less_time_than_the_caller_waits() -> None:
    def given(*arguments: Any) -> float | None:
        return remaining_timeout_s(*arguments)

    assert given(Context(None)) is None
    assert given(Context(10.0)) == pytest.approx(9.95)
    assert given(Context(10.0), 2.0) == 8.0
    assert given(Context(0.01)) == 0.0


async def messages(*pauses_s: float) -> AsyncIterator[str]:
    """Yield a message after each pause."""
    for number, pause_s in enumerate(pauses_s):
        await asyncio.sleep(pause_s)
        yield str(number)


async def test_a_sessions_messages_end_where_the_peers_do() -> None:
    rules = SessionRules(idle_timeout_s=60)
    assert [message async for message in rules.messages(messages(0, 0, 0))] == ["0", "1", "2"]


async def test_a_silent_peer_is_given_the_idle_time_and_no_more() -> None:
    received = SessionRules(idle_timeout_s=0.05).messages(messages(0, 30))
    assert await anext(received) == "0"
    with pytest.raises(DeadlineExceededError, match=r"no message for 0\.05 s") as raised:
        await anext(received)
    assert raised.value.reason == "IDLE_SESSION"


async def test_a_peer_that_does_not_read_is_given_the_write_time_and_no_more() -> None:
    context: Any = Context()
    with pytest.raises(DeadlineExceededError, match=r"did not read a message for 0\.05 s") as raised:
        await send(context, "message", 0.05)
    assert raised.value.reason == "NOT_READ"
