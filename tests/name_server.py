"""A name server of the tests, which gRPC's own resolver asks: clients find gateways by names that change."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

_IPV4, _INTERNET = 1, 1
_IS_AN_ANSWER = 0x8580
"""Flags of an answer that is final and without an error."""


class NameServer(asyncio.DatagramProtocol):
    """Answers every question for IPv4 addresses with the same ones, and every other question with none."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self.addresses = list(addresses)
        self.port = 0

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        self._transport = transport
        self.port = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        # A question is a name, which ends with a zero, its type and its class; twelve bytes come before it.
        end = data.index(b"\0", 12) + 5
        (kind,) = struct.unpack_from(">H", data, end - 4)
        found = self.addresses if kind == _IPV4 else ()
        answer = data[:2] + struct.pack(">5H", _IS_AN_ANSWER, 1, len(found), 0, 0) + data[12:end]
        for address in found:
            # The name is the one at byte 12, and the answer is good for a second.
            answer += struct.pack(">3HIH", 0xC00C, _IPV4, _INTERNET, 1, 4) + socket.inet_aton(address)
        self._transport.sendto(answer, addr)

    def uri(self, name: str, port: int) -> str:
        """Return the URI of a name that this server is asked for."""
        return f"dns://127.0.0.1:{self.port}/{name}:{port}"


@asynccontextmanager
async def running_name_server(*addresses: str) -> AsyncIterator[NameServer]:
    """Run a name server that knows these addresses at first."""
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(
        lambda: NameServer(addresses), local_addr=("127.0.0.1", 0)
    )
    try:
        yield server
    finally:
        transport.close()
