"""HTTP by hand: requests to a gateway's OpenAI interface, and what its streams are made of."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@dataclass(frozen=True)
class Reply:
    """A response that was read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        assert self.headers["content-type"] == "application/json"
        error: dict[str, Any] = self.json["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """What a stream told, without its end, whose format is checked."""
        assert self.headers["content-type"].startswith("text/event-stream")
        parts = self.body.decode().split("\n\n")
        assert parts[-1] == ""
        assert all(part.startswith(("data: ", ":")) and "\n" not in part for part in parts[:-1])
        data = [part.removeprefix("data: ") for part in parts[:-1] if not part.startswith(":")]
        assert data[-1] == "[DONE]"
        return [json.loads(event) for event in data[:-1]]

    @property
    def last_error(self) -> dict[str, Any]:
        """The error that is the last event of a stream."""
        assert b"[DONE]" not in self.body
        *_, last, end = self.body.decode().split("\n\n")
        assert end == ""
        error: dict[str, Any] = json.loads(last.removeprefix("data: "))["error"]
        return error


class Peer:
    """A connection to an HTTP server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def ask(self, path: str, body: object = None, **headers: str) -> None:
        """Send a request; it is a GET without a body."""
        self.send(request_bytes(path, body, **headers))

    async def head(self) -> bytes:
        """Read the head of a response."""
        return await self.reader.readuntil(b"\r\n\r\n")

    async def reply(self, head: bytes | None = None) -> Reply:
        """Read one response; a head is one that was read before."""
        head = head or await self.head()
        first, *lines = head.decode("latin-1").rstrip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return Reply(int(first.split()[1]), headers, await self._body(headers))

    async def _body(self, headers: Mapping[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return await self.reader.readexactly(int(headers.get("content-length", 0)))
        return b"".join([chunk async for chunk in self.chunks()])

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the chunks of a response, as the server wrote them."""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            yield (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)

    async def is_ended(self) -> bool:
        """Return once the server has ended the connection."""
        try:
            while await self.reader.read(65536):
                pass
        except ConnectionError:
            pass
        return True


def request_bytes(path: str, body: object = None, **headers: str) -> bytes:
    """Return a request; bytes are a body as it is, anything else becomes JSON."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"host": "localhost", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if body is not None:
        lines = {"content-type": "application/json", "content-length": str(len(data))} | lines
    method = "GET" if body is None else "POST"
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data


@asynccontextmanager
async def connected(address: str, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Peer]:
    """Connect to a server at HOST:PORT."""
    host, _, port = address.rpartition(":")
    name = "localhost" if tls else None
    reader, writer = await asyncio.open_connection(host, int(port), ssl=tls, server_hostname=name)
    try:
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()


async def ask(
    address: str, path: str, body: object = None, *, tls: ssl.SSLContext | None = None, **headers: str
) -> Reply:
    """Return the response to one request."""
    async with asyncio.timeout(60), connected(address, tls=tls) as peer:
        peer.ask(path, body, **headers)
        return await peer.reply()


def text_of(events: Sequence[Any], index: int = 0) -> str:
    """Return the text of a choice of a stream."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(
        choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices
    )
