"""Server-sent events: an answer in the chunks of a stream, as OpenAI's clients read it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

from starlette.types import Send

from gateway.http.errors import error_content
from specdec.contract.errors import SpecdecError

_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies that collect what comes would make a stream pointless.
    (b"x-accel-buffering", b"no"),
]
_DONE = b"data: [DONE]\n\n"
_EMPTY_COMMENT_BYTES = len(b":\n\n")


class EventStream:
    """Sends events. The response begins with the first: until then an error has a status of its own.

    Args:
        padding: what is sent at a time has a multiple of so many bytes; 0: it is as long as it is.
    """

    def __init__(self, send: Send, padding: int) -> None:
        self._send, self._padding = send, padding
        self._lock = asyncio.Lock()
        self.is_begun = False

    async def events(self, contents: Sequence[dict[str, Any] | None]) -> None:
        """Send an event for each content, all at a time. None stands for no event; if messages are padded,
        there is something to read even without events."""
        await self._write(b"".join(_event(content) for content in contents if content is not None))

    async def end(self, contents: Sequence[dict[str, Any] | None]) -> None:
        """Send the last events, and that they were the last."""
        events = b"".join(_event(content) for content in contents if content is not None)
        await self._write(events + _DONE, is_last=True)

    async def fail(self, error: SpecdecError) -> None:
        """End the stream with an error."""
        await self._write(_event(error_content(error)), is_last=True)

    async def _write(self, data: bytes, *, is_last: bool = False) -> None:
        data = padded(data, self._padding)
        if not data:
            return
        async with self._lock:
            if not self.is_begun:
                await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
                self.is_begun = True
            await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})


def padded(data: bytes, multiple: int) -> bytes:
    """Return events followed by a comment, which clients ignore, so that all are a multiple of so many bytes;
    0: the events as they are."""
    if not multiple:
        return data
    missing = -len(data) % multiple if data else multiple
    while 0 < missing < _EMPTY_COMMENT_BYTES:
        missing += multiple
    return data + b":" + b" " * (missing - _EMPTY_COMMENT_BYTES) + b"\n\n" if missing else data


def _event(content: dict[str, Any]) -> bytes:
    # Clients that split a stream as Python splits lines would break an event at U+2028, for example.
    return b"data: " + to_json(content, is_ascii=True) + b"\n\n"


def to_json(content: object, *, is_ascii: bool = False) -> bytes:
    """Return what JSON writes of a content, without blanks.

    Args:
        is_ascii: characters beyond ASCII are escaped.
    """
    return json.dumps(content, ensure_ascii=is_ascii, separators=(",", ":")).encode()
