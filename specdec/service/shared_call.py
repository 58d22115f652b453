"""Many sessions over one call: each is served as if it had a call of its own.

A call's messages cost much more than what a round says: with a call for each session, a gateway that has many
spends most of its time on them. Sessions that share a call share messages as well, whenever they are ready at
the same time, as they are after a pass that served them together.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc

from specdec.contract.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SpecdecError,
    UnavailableError,
    end_of,
    session_end,
)
from specdec.contract.request_id import REQUEST_ID
from specdec.service.interceptors import OpenCalls, as_error
from specdec.service.sessions import WRITE_TIMEOUT_S, SessionContext, send
from specdec.transport.outbox import Outbox
from specdec.v1 import common_pb2

logger = logging.getLogger(__name__)


_MAX_UNREAD = 2
"""How many messages of a session may wait: the next request, and that nothing more comes."""
_ITEMS_AT_A_TIME = 64
"""So many items are read until others have their turn."""

Serve = Callable[[AsyncIterator[Any], Any], Awaitable[None]]
"""Serves one session: its messages, and its SessionContext."""


class _Session(SessionContext):
    """One session of a shared call, and its context."""

    def __init__(self, call: _SharedCall, item: Any) -> None:
        self.number: int = item.session
        self.timeout_s = item.timeout_ms / 1000 if item.timeout_ms else None
        self._deadline_s = time.monotonic() + self.timeout_s if self.timeout_s else None
        self._call = call
        self._messages: asyncio.Queue[Any] = asyncio.Queue(_MAX_UNREAD)
        self.failure: SpecdecError | None = None
        """Why it was cancelled; None: the peer wished it."""

    def give(self, message: Any) -> bool:
        """Hand the session a message; None: nothing more comes. False: the peer is too far ahead."""
        try:
            self._messages.put_nowait(message)
        except asyncio.QueueFull:
            self.failure = ResourceExhaustedError(
                "The session was sent a message before it had answered the last; wait for each answer.",
                reason="TOO_FAR_AHEAD",
            )
        return self.failure is None

    async def messages(self) -> AsyncIterator[Any]:
        """Yield the messages of the peer until it says that nothing more comes."""
        while (message := await self._messages.get()) is not None:
            yield message

    async def write(self, message: Any) -> None:
        """Send a message to the peer, with what other sessions send now."""
        self._call.put(session=self.number, response=message)

    def auth_context(self) -> Mapping[str, Any]:
        """Return what the peer's certificate says."""
        names: Mapping[str, Any] = self._call.context.auth_context()
        return names

    def time_remaining(self) -> float | None:
        """Return the seconds until the session's deadline; None: there is none."""
        return None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())


class _SharedCall:
    def __init__(
        self, serve: Serve, context: Any, response_type: Any, calls: OpenCalls, max_sessions: int
    ) -> None:
        self.context = context
        self._serve, self._response_type = serve, response_type
        self._calls, self._max_sessions = calls, max_sessions
        self._outbox: Outbox[Any] = Outbox()
        self._sessions: dict[int, tuple[_Session, asyncio.Task[common_pb2.SessionEnd]]] = {}

    def put(self, **item: Any) -> None:
        """Send an item."""
        self._outbox.put(self._response_type.Item(**item))

    async def run(self, requests: AsyncIterator[Any], write_timeout_s: float) -> None:
        """Serve the call until the peer sends nothing more and all sessions have ended.

        Raises:
            SpecdecError: the peer breaks the rules of the call.
        """
        reading = asyncio.ensure_future(self._read(requests))
        writing = asyncio.ensure_future(self._write(write_timeout_s))
        draining = asyncio.ensure_future(self._drain())
        try:
            await asyncio.wait((reading, writing), return_when=asyncio.FIRST_COMPLETED)
            if reading.done():
                reading.result()
            await writing
        finally:
            tasks = [reading, writing, draining, *(task for _, task in self._sessions.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, requests: AsyncIterator[Any]) -> None:
        async for request in requests:
            for number, item in enumerate(request.items):
                await self._outbox.room()
                self._take(item)
                if number % _ITEMS_AT_A_TIME == _ITEMS_AT_A_TIME - 1:
                    await asyncio.sleep(0)
        for session, task in list(self._sessions.values()):
            if not session.give(None):
                task.cancel()
        await self._end()

    async def _drain(self) -> None:
        """End the call in order once the service ends and no session is left."""
        await self._calls.draining.wait()
        await self._end()

    async def _end(self) -> None:
        if self._sessions:
            await asyncio.wait([task for _, task in self._sessions.values()])
        self._outbox.close()

    async def _write(self, timeout_s: float) -> None:
        while items := await self._outbox.take():
            await send(self.context, self._response_type(items=items), timeout_s)

    def _take(self, item: Any) -> None:
        if item.change == common_pb2.SESSION_CHANGE_BEGIN:
            self._begin(item)
        session, task = self._sessions.get(item.session, (None, None))
        if session is None or task is None:
            return  # it has ended, which the peer could not know
        messages = [item.request] if item.HasField("request") else []
        if item.change == common_pb2.SESSION_CHANGE_DONE:
            messages.append(None)
        is_cancelled = item.change == common_pb2.SESSION_CHANGE_CANCEL
        if is_cancelled or not all(map(session.give, messages)):
            task.cancel()

    def _begin(self, item: Any) -> None:
        if item.session in self._sessions:
            raise InvalidArgumentError(
                f"Session {item.session} has begun and not ended; give each running session its own number.",
                reason="SESSION_NUMBER_TAKEN",
            )
        if self._calls.draining.is_set():
            error: SpecdecError = UnavailableError("The service is shutting down; try another replica.")
        elif len(self._sessions) >= self._max_sessions:
            error = ResourceExhaustedError(
                f"The call has {self._max_sessions} sessions; end one, or use another call.",
                reason="NO_SESSION_SLOT",
                retry_after_s=1.0,
            )
        else:
            session = _Session(self, item)
            task = asyncio.ensure_future(self._run(session))
            self._sessions[item.session] = session, task
            task.add_done_callback(lambda done: self._ended(session, done))
            return
        self.put(session=item.session, end=end_of(error))

    async def _run(self, session: _Session) -> common_pb2.SessionEnd:
        with self._calls.counted():
            try:
                async with asyncio.timeout(session.timeout_s) as deadline:
                    await self._serve(session.messages(), session)
            except Exception as error:
                late = DeadlineExceededError("The session's deadline has passed.")
                return end_of(late if deadline.expired() else as_error(error), REQUEST_ID.get())
        return common_pb2.SessionEnd()

    def _ended(self, session: _Session, task: asyncio.Task[common_pb2.SessionEnd]) -> None:
        del self._sessions[session.number]
        if session.failure:
            end = end_of(session.failure)
        elif task.cancelled():
            end = session_end(grpc.StatusCode.CANCELLED, "It was cancelled.")
        elif panic := task.exception():  # native libraries raise what is not an Exception
            end = end_of(as_error(panic))
        else:
            end = task.result()
        self.put(session=session.number, end=end)


async def serve_many(
    serve: Serve,
    requests: AsyncIterator[Any],
    context: grpc.aio.ServicerContext[Any, Any],
    response_type: Any,
    *,
    calls: OpenCalls | None = None,
    max_sessions: int = 4096,
    write_timeout_s: float = WRITE_TIMEOUT_S,
) -> None:
    """Serve the sessions of a shared call.

    Args:
        serve: serves one session, of its messages and its SessionContext.
        requests: the call's messages.
        response_type: type of the call's answers.
        calls: counts the sessions, and not the call, which lasts for as long as its peer does; None: nobody
            waits for them.
        max_sessions: how many sessions the call may have at a time.
        write_timeout_s: how long the peer may take to read a message, seconds.

    Raises:
        InvalidArgumentError: a session begins with the number of one that runs.
        DeadlineExceededError: the peer does not read.
    """
    calls = calls or OpenCalls()
    with calls.not_counted():
        call = _SharedCall(serve, context, response_type, calls, max_sessions)
        await call.run(requests, write_timeout_s)
