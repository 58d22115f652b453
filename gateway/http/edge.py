"""What surrounds every HTTP request: its id, its caller, a limit for slow readers, and errors in JSON."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.http.errors import error_content, error_headers, http_error_content, status_of, told
from specdec.contract.errors import DeadlineExceededError
from specdec.contract.protocol import REQUEST_ID_METADATA
from specdec.contract.request_id import REQUEST_ID, checked_request_id, new_request_id
from specdec.service.auth import CALLER, Authenticator
from specdec.service.sessions import WRITE_TIMEOUT_S

ABORT = "specdec.abort"
"""Extension of a request's scope, with a function "call" that ends its connection at once."""
HEALTH = "/health"
"""Path that needs no credentials."""
_BODILESS = ("GET", "HEAD")


class Edge:
    """Names requests, checks credentials, and answers with errors in OpenAI's form.

    Args:
        app: answers a request; what goes wrong in it is raised.
        authenticator: decides who may ask; None: everyone that can connect may.
    """

    def __init__(self, app: ASGIApp, authenticator: Authenticator | None) -> None:
        self._app, self._authenticator = app, authenticator
        self.write_timeout_s = WRITE_TIMEOUT_S

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. It has a task, and so a context, of its own."""
        exchange = _Exchange(scope, receive, send, self.write_timeout_s)
        try:
            await self._answer(scope, exchange)
        except (ClientDisconnect, BrokenPipeError):
            exchange.abort()
        except HTTPException as refusal:
            content = http_error_content(refusal)
            await exchange.fail(refusal.status_code, content, dict(refusal.headers or {}))
        except (Exception, asyncio.CancelledError) as failure:
            error = told(failure)
            await exchange.fail(status_of(error), error_content(error), error_headers(error))

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        headers = _text_headers(scope)
        if REQUEST_ID_METADATA in headers:
            exchange.request_id = checked_request_id(headers[REQUEST_ID_METADATA])
        REQUEST_ID.set(exchange.request_id)
        if self._authenticator and scope["path"] != HEALTH:
            CALLER.set(await self._authenticator.authenticate(headers))
        await self._app(scope, exchange.receive, exchange.send)


class _Exchange:
    """A request and its response, as far as they have come."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, timeout_s: float) -> None:
        self._scope, self._receive, self._send, self._timeout_s = scope, receive, send, timeout_s
        self._is_read = scope["method"] in _BODILESS
        self._is_begun = False
        self.request_id = new_request_id()
        """Id of the request, which the response names; its choices have ids of their own."""

    async def receive(self) -> Message:
        """Return what comes from the client."""
        message = await self._receive()
        self._is_read |= message["type"] == "http.request" and not message.get("more_body", False)
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send a part of the response.

        Raises:
            DeadlineExceededError: the client did not read what came before it in time.
        """
        if message["type"] == "http.response.start":
            self._is_begun = True
            headers = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            if not self._is_read:
                headers.append((b"connection", b"close"))  # what is still to come is not read
            message = {**message, "headers": headers}
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except TimeoutError:
            raise DeadlineExceededError(
                f"The client did not read for {self._timeout_s:g} s.", reason="NOT_READ"
            ) from None

    async def fail(self, status: int, content: dict[str, Any], headers: Mapping[str, str]) -> None:
        """Answer with an error, or end the connection of a response that has begun."""
        if self._is_begun:
            self.abort()
            return
        response = JSONResponse(content, status, headers)
        with suppress(DeadlineExceededError):
            await response(self._scope, self.receive, self.send)

    def abort(self) -> None:
        """End the connection: nobody reads what is still to be sent."""
        self._scope["extensions"][ABORT]["call"]()


def _text_headers(scope: Scope) -> dict[str, str]:
    """Return the headers by their names in lower case; bytes beyond ASCII stay what they are."""
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
