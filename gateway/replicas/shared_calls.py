"""Sessions on a replica over one call, which they share: what several say at a time goes in one message."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import grpc

from specdec.contract.errors import (
    DeadlineExceededError,
    RequestCancelledError,
    SpecdecError,
    UnavailableError,
    from_end,
    session_end,
)
from specdec.transport.outbox import Outbox
from specdec.v1 import common_pb2

_CLOSE_TIMEOUT_S = 1.0
_TIME_TO_END_S = 10.0
"""How long the peer may take to end a call to which nothing more is said."""
_MAX_AGE_S = 1800.0
"""Age at which a call gets no new sessions: like a connection, it does not last for ever."""
_BROKEN_WRITE = "Internal error from Core"
"""What grpc.aio says of a call that ended while a message was written; the status it ended with is lost."""
_CALL_ERRORS = (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError)


class CallKind(NamedTuple):
    """How sessions on a service share a call."""

    start: Callable[[grpc.aio.Channel], Any]
    """Starts a call on a channel."""
    request_type: Any
    """Type of the call's messages."""
    peer: str
    """What the service is called in errors."""


class SharedCalls:
    """The calls to one replica. New sessions have one in common; another one follows when the channel
    changes, when the call has ended, or when it is old.

    Args:
        kind: what the calls are.
        channel: returns the channel for a new call.
        peer: names the replica in errors.
    """

    def __init__(self, kind: CallKind, channel: Callable[[], grpc.aio.Channel], peer: str) -> None:
        self._kind, self._channel, self._peer = kind, channel, peer
        self._current: _SharedCall | None = None
        self._calls: set[_SharedCall] = set()
        """All that have not ended."""

    def begin(self, timeout_s: float | None) -> SharedSession:
        """Begin a session, which has `timeout_s` seconds in all; None: any time."""
        channel = self._channel()
        if self._current is None or not self._current.takes(channel):
            if self._current:
                self._current.retire()
            self._current = _SharedCall(self._kind, channel, self._peer, self._calls.discard)
            self._calls.add(self._current)
        return self._current.begin(timeout_s)

    async def close(self) -> None:
        """End all calls, and the sessions that they have."""
        for call in list(self._calls):
            await call.close()


class _SharedCall:
    def __init__(
        self,
        kind: CallKind,
        channel: grpc.aio.Channel,
        peer: str,
        on_end: Callable[[_SharedCall], None],
    ) -> None:
        self.peer = peer
        self._request_type, self._channel, self._on_end = kind.request_type, channel, on_end
        self._call = kind.start(channel)
        self._outbox: Outbox[Any] = Outbox()
        self._sessions: dict[int, SharedSession] = {}
        self._cancelled: dict[int, bool] = {}
        """Sessions whose end has not come, by number: whether an answer may come before."""
        self._numbers = itertools.count(1)
        self._began_s = time.monotonic()
        self._is_retired = self._is_over = False
        self._tasks = asyncio.ensure_future(self._read()), asyncio.ensure_future(self._write())

    def takes(self, channel: grpc.aio.Channel) -> bool:
        """Return whether it may have new sessions of that channel."""
        is_young = time.monotonic() - self._began_s < _MAX_AGE_S
        return channel is self._channel and is_young and not self._is_over

    def begin(self, timeout_s: float | None) -> SharedSession:
        """Begin a session."""
        number = next(self._numbers)
        session = self._sessions[number] = SharedSession(self, number, timeout_s)
        return session

    def send(self, **item: Any) -> None:
        """Send an item.

        Raises:
            ResourceExhaustedError: it is too large.
        """
        self._outbox.put(self._request_type.Item(**item))

    def cancel(self, number: int, *, is_answer_due: bool) -> None:
        """Tell the peer that a session is over; what it says of it until it knows is dropped."""
        self._cancelled[number] = is_answer_due
        self.send(session=number, change=common_pb2.SESSION_CHANGE_CANCEL)

    def forget(self, number: int) -> None:
        """Hand nothing more to a session."""
        self._sessions.pop(number, None)
        self._end_if_idle()

    def retire(self) -> None:
        """End the call when its last session has ended."""
        self._is_retired = True
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._is_retired and not self._sessions and not self._is_over:
            self._outbox.close()
            asyncio.get_running_loop().call_later(_TIME_TO_END_S, self._call.cancel)

    async def close(self) -> None:
        """End the call at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # A task that had not begun has settled nothing.
        self._settle(session_end(grpc.StatusCode.UNAVAILABLE, "the gateway ends"))

    async def _read(self) -> None:
        self._settle(await self._read_to_the_end())

    def _settle(self, end: common_pb2.SessionEnd) -> None:
        """Tell all sessions that the call has ended."""
        self._is_over = True
        self._outbox.close()
        for session in list(self._sessions.values()):
            session.ended(end)
        self._call.cancel()
        self._on_end(self)

    async def _read_to_the_end(self) -> common_pb2.SessionEnd:
        """Hand answers to their sessions until the call ends, and return how it ended."""
        try:
            while (answer := await self._call.read()) is not grpc.aio.EOF:
                if answer is None:  # what grpc.aio makes of bytes that are not a message of the type
                    return session_end(grpc.StatusCode.UNAVAILABLE, "it sent a message that cannot be read")
                if not answer.items or not all(map(self._deliver, answer.items)):
                    # Whoever says what nobody asked for may do so without end.
                    return session_end(
                        grpc.StatusCode.INTERNAL, f"{self.peer} sent an answer that nobody asked for."
                    )
        except _CALL_ERRORS:
            pass
        return await _end_of_call(self._call)

    def _deliver(self, item: Any) -> bool:
        """Hand an item to its session; return whether the peer may have sent it."""
        session = self._sessions.get(item.session)
        has_response, has_end = item.HasField("response"), item.HasField("end")
        is_known = session is not None or item.session in self._cancelled
        is_due = session.is_answer_due if session else self._cancelled.get(item.session, False)
        if not is_known or not (has_response or has_end) or (has_response and not is_due):
            return False
        if session and has_response:
            session.answered(item.response)
        if session and has_end:
            session.ended(item.end)
        if not session:
            self._cancelled[item.session] = False
            if has_end:
                del self._cancelled[item.session]
        return True

    async def _write(self) -> None:
        with suppress(*_CALL_ERRORS):  # the call has ended, and the reader learns how
            while items := await self._outbox.take():
                await self._call.write(self._request_type(items=items))
            await self._call.done_writing()


async def _end_of_call(call: Any) -> common_pb2.SessionEnd:
    """Return how a call ended, as the end of each of its sessions."""
    code: grpc.StatusCode = await call.code()
    message = await call.details() or ""
    if message == _BROKEN_WRITE:
        code, message = grpc.StatusCode.UNAVAILABLE, "the stream broke"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:  # the call has none: it is not the sessions'
        code = grpc.StatusCode.UNAVAILABLE
    return session_end(code, message, await call.trailing_metadata())


class SharedSession:
    """A session's part in a call: requests and their answers, one at a time."""

    def __init__(self, call: _SharedCall, number: int, timeout_s: float | None) -> None:
        self._call, self._number = call, number
        self._timeout_ms = 0 if timeout_s is None else max(1, round(timeout_s * 1000))
        self._has_begun = False
        self._answer: asyncio.Future[Any] | None = None
        self._end: common_pb2.SessionEnd | None = None
        self._over = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._timer = None if timeout_s is None else loop.call_later(timeout_s, self._expire)

    async def exchange(self, request: Any) -> tuple[Any, int]:
        """Send one message and await its answer; the result is the answer and the time it took, nanoseconds.

        Raises:
            SpecdecError: the service refused, or it is gone.
        """
        started_ns = time.monotonic_ns()
        if self._end is not None:
            raise self._failure(self._end)
        self._answer = asyncio.get_running_loop().create_future()
        try:
            self._send(request)
            response = await self._answer
        except asyncio.CancelledError:  # whoever asks again would get the answer to this
            self._cancel(is_answer_due=True)
            raise
        return response, time.monotonic_ns() - started_ns

    def _send(self, request: Any) -> None:
        if self._has_begun:
            self._call.send(session=self._number, request=request)
            return
        self._call.send(
            session=self._number,
            request=request,
            change=common_pb2.SESSION_CHANGE_BEGIN,
            timeout_ms=self._timeout_ms,
        )
        self._has_begun = True

    @property
    def is_answer_due(self) -> bool:
        """Whether an answer is waited for."""
        return self._answer is not None and not self._answer.done()

    def answered(self, response: Any) -> None:
        """Take the answer that is due."""
        assert self._answer is not None
        self._answer.set_result(response)

    def ended(self, end: common_pb2.SessionEnd) -> None:
        """Take note of how the session ended."""
        self._end = end
        self._over.set()
        if self._timer:
            self._timer.cancel()
        if self._answer and not self._answer.done():
            self._answer.set_exception(self._failure(end))
        self._call.forget(self._number)

    def _expire(self) -> None:
        self._cancel(grpc.StatusCode.DEADLINE_EXCEEDED, is_answer_due=self.is_answer_due)

    def _cancel(
        self, code: grpc.StatusCode = grpc.StatusCode.CANCELLED, *, is_answer_due: bool = False
    ) -> None:
        """End the session at once, if it has not ended."""
        if self._end is None:
            if self._has_begun:
                self._call.cancel(self._number, is_answer_due=is_answer_due)
            self.ended(session_end(code))

    def _failure(self, end: common_pb2.SessionEnd) -> SpecdecError:
        """Return the error that ended the session."""
        if not end.code:
            return UnavailableError(f"{self._call.peer} ended the session.")
        error = from_end(end)
        # A peer whose grace is over cancels what still runs; we never read on after cancelling ourselves.
        if isinstance(error, UnavailableError | RequestCancelledError):
            return UnavailableError(
                f"{self._call.peer} was lost ({error.message}); send the request again.",
                reason="PEER_LOST",
                retry_after_s=1.0,
            )
        if isinstance(error, DeadlineExceededError) and error.reason == DeadlineExceededError.default_reason:
            return DeadlineExceededError("The deadline passed before the generation was complete.")
        return error

    async def close(self) -> None:
        """End the session in order, or by force if the service does not follow."""
        if self._has_begun and self._end is None:
            with suppress(TimeoutError):
                self._call.send(session=self._number, change=common_pb2.SESSION_CHANGE_DONE)
                async with asyncio.timeout(_CLOSE_TIMEOUT_S):
                    await self._over.wait()
        self._cancel()
