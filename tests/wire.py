"""What an observer of a connection in plaintext sees: the messages of a call, from a raw socket."""

from __future__ import annotations

import asyncio

import h2.config
import h2.connection
import h2.events

from specdec.v1 import gateway_pb2

GENERATE = "/specdec.v1.GatewayService/Generate"
_DATA = 0
_FRAME_HEADER_BYTES = 9
_PREFIX_BYTES = 5
"""Flag and length before each message of gRPC."""


async def answer_on_the_wire(address: str, request: gateway_pb2.GenerateRequest) -> list[bytes]:
    """Return the messages of an answer as they lie in the DATA frames of the connection."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    http.initiate_connection()
    headers = [(":method", "POST"), (":scheme", "http"), (":path", GENERATE), (":authority", address)]
    http.send_headers(1, [*headers, ("content-type", "application/grpc"), ("te", "trailers")])
    message = request.SerializeToString()
    http.send_data(1, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
    writer.write(http.data_to_send())
    raw, has_ended = b"", False
    try:
        while not has_ended:
            received = await reader.read(65536)
            assert received, "the server ended the connection"
            raw += received
            for event in http.receive_data(received):
                if isinstance(event, h2.events.DataReceived):
                    http.acknowledge_received_data(event.flow_controlled_length, 1)
                has_ended |= isinstance(event, h2.events.StreamEnded)
            writer.write(http.data_to_send())
    finally:
        writer.close()
    return _messages(_data_of(raw))


def _data_of(raw: bytes) -> bytes:
    """Return what the DATA frames among the bytes of a connection carry."""
    data, at = b"", 0
    while at < len(raw):
        length, kind = int.from_bytes(raw[at : at + 3], "big"), raw[at + 3]
        at += _FRAME_HEADER_BYTES
        data += raw[at : at + length] if kind == _DATA else b""
        at += length
    return data


def _messages(data: bytes) -> list[bytes]:
    messages = []
    while data:
        length = int.from_bytes(data[1:_PREFIX_BYTES], "big")
        messages.append(data[_PREFIX_BYTES : _PREFIX_BYTES + length])
        data = data[_PREFIX_BYTES + length :]
    return messages
