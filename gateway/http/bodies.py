"""The bodies of requests, received within the limits that the messages of calls have."""

from __future__ import annotations

import asyncio
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import Request

from gateway.config import GatewayConfig
from gateway.http.formats import refusing_as_asked
from gateway.http.requests import GenerationRequest, parse
from specdec.service.first_message import TIMEOUT_S, Turns
from specdec.v1 import gateway_pb2

RequestT = TypeVar("RequestT", bound=GenerationRequest)

_ESCAPES = 2
"""How much longer a request may be in JSON than as a message: escapes of text, and numbers in digits."""
_DISCARDED = 4
"""A body of up to so many times the longest is received all the same, and thrown away: a client that still
writes would not see what it is told."""
_LONG_BYTES = 2**16
"""Bodies shorter than that are parsed at once, on the event loop."""


class Bodies:
    """Receives bodies: few of a host at a time, none that is too long, and none for long."""

    def __init__(self, config: GatewayConfig) -> None:
        self.timeout_s = TIMEOUT_S
        self.turns = Turns()
        self._max_message_bytes = config.max_message_bytes
        self.max_bytes = _ESCAPES * config.max_message_bytes
        """Longest body."""
        self._parsing = asyncio.Lock()

    async def read(
        self, request: Request, kind: type[RequestT]
    ) -> tuple[RequestT, list[gateway_pb2.GenerateRequest]]:
        """Return what a body asks for, and the messages that ask for each answer, in the order of choices.

        Raises:
            HTTPException: the body is not JSON, is too long, or does not come.
            InvalidArgumentError: a field is out of range or of the wrong type.
            ClientDisconnect: the client has gone.
        """
        # A browser asks before it sends this type for a page of another site.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise HTTPException(415, "Send JSON, with the header `content-type: application/json`.")
        host = request.client.host if request.client else ""
        try:
            async with asyncio.timeout(self.timeout_s), self.turns.turn(host):
                body = await self._receive(request)
        except TimeoutError:
            raise HTTPException(
                408, f"The body did not arrive within {self.timeout_s:g} s; send it again."
            ) from None
        if len(body) < _LONG_BYTES:
            return self._understand(kind, body)
        async with self._parsing:  # one at a time, for the memory it takes
            return await asyncio.to_thread(self._understand, kind, body)

    def _understand(
        self, kind: type[RequestT], body: bytes
    ) -> tuple[RequestT, list[gateway_pb2.GenerateRequest]]:
        asked = parse(kind, body)
        with refusing_as_asked(asked.structured_outputs):
            prompts = asked.prompt_messages()
        # Before there are copies of them.
        if any(prompt.ByteSize() > self._max_message_bytes for prompt in prompts):
            raise self.too_long()
        return asked, [message for prompt in prompts for message in asked.choice_messages(prompt)]

    async def _receive(self, request: Request) -> bytes:
        announced = request.headers.get("content-length", "")
        if announced.isdigit() and int(announced[:20]) > _DISCARDED * self.max_bytes:
            raise self.too_long()
        body, num_bytes = bytearray(), 0
        async for part in request.stream():
            num_bytes += len(part)
            if num_bytes > _DISCARDED * self.max_bytes:
                raise self.too_long()
            if num_bytes > self.max_bytes:
                body.clear()
            else:
                body += part
        if num_bytes > self.max_bytes:
            raise self.too_long()
        return bytes(body)

    def too_long(self) -> HTTPException:
        """Return the error of a body that is too long."""
        return HTTPException(413, f"The body has more than {self.max_bytes} bytes; shorten the prompt.")
