"""Peers that open a call and read nothing of it: an HTTP/2 connection whose windows stay at 0."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings

DEAF: dict[Any, int] = {h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0}


class DeafPeer:
    """A connection whose calls are answered with headers at most: data has no window to come through."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        self._http.local_settings = h2.settings.Settings(client=True, initial_values=DEAF)
        self._http.initiate_connection()
        self.ended: dict[int, list[tuple[str, str]]] = {}
        """Trailers, or nothing after a reset, of the calls that ended, by their numbers."""

    def call(self, method: str, *messages: bytes, metadata: Sequence[tuple[str, str]] = ()) -> int:
        """Begin a call, which sends these messages and stays open; return its number."""
        number = self._begin(method, metadata)
        for message in messages:
            self._http.send_data(number, b"\0" + len(message).to_bytes(4, "big") + message)
        self._writer.write(self._http.data_to_send())
        return number

    def call_in_part(self, method: str, message: bytes, size: int) -> int:
        """Begin a call whose message has `size` bytes, of which only these are sent; return its number."""
        number = self._begin(method, ())
        self._http.send_data(number, b"\0" + size.to_bytes(4, "big") + message)
        self._writer.write(self._http.data_to_send())
        return number

    async def push(self, calls: Sequence[int], size: int, *, patience_s: float = 2.0) -> int:
        """Send `size` bytes of each call's message, as far as the server lets; return how many were sent once
        it has let none through for a while."""
        left = dict.fromkeys(calls, size)
        num_sent, last = 0, time.monotonic()
        while any(left.values()) and time.monotonic() - last < patience_s:
            for number in calls:
                room = min(left[number], self._http.local_flow_control_window(number), 16_384)
                if room > 0:
                    self._http.send_data(number, bytes(room))
                    left[number] -= room
                    num_sent, last = num_sent + room, time.monotonic()
            self._writer.write(self._http.data_to_send())
            await self._writer.drain()
            await asyncio.sleep(0.001)
        return num_sent

    @property
    def max_streams(self) -> int:
        """How many calls the server lets the connection have at a time."""
        return self._http.remote_settings.max_concurrent_streams

    def ignore_max_streams(self) -> None:
        """Begin calls from now on as if the server had set no limit."""
        most = h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS
        self._http.remote_settings[most] = 2**31 - 1
        self._http.remote_settings.acknowledge()

    def ping(self) -> None:
        """Ask for a sign of life."""
        self._http.ping(b"is there?"[:8])
        self._writer.write(self._http.data_to_send())

    @property
    def is_closed(self) -> bool:
        """Whether the server has ended the connection."""
        return self._http.state_machine.state is h2.connection.ConnectionState.CLOSED

    def _begin(self, method: str, metadata: Sequence[tuple[str, str]]) -> int:
        number = self._http.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", method),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            *metadata,
        ]
        self._http.send_headers(number, headers)
        return number

    async def read(self) -> None:
        """Take in what comes until the connection ends; windows are never opened."""
        while data := await self._reader.read(65536):
            for event in self._http.receive_data(data):
                match event:
                    case h2.events.TrailersReceived() | h2.events.ResponseReceived():
                        headers = [(str(name), str(value)) for name, value in event.headers or ()]
                        if any(name == "grpc-status" for name, _ in headers):
                            self.ended[event.stream_id or 0] = headers
                    case h2.events.StreamReset():
                        self.ended.setdefault(event.stream_id or 0, [])
            self._writer.write(self._http.data_to_send())


@asynccontextmanager
async def deaf_peer(address: str) -> AsyncIterator[DeafPeer]:
    """Connect a peer that reads nothing."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    peer = DeafPeer(reader, writer)
    reading = asyncio.ensure_future(peer.read())
    try:
        yield peer
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        writer.close()
