"""Errors in OpenAI's form, with the HTTP statuses that its clients act on."""

from __future__ import annotations

import asyncio
import logging
import math
import re
from http import HTTPStatus
from typing import Any

import grpc
from starlette.exceptions import HTTPException

from specdec.contract.errors import (
    InternalError,
    SpecdecError,
    UnavailableError,
    log_defect,
    status_code,
)

logger = logging.getLogger(__name__)

STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.INTERNAL: 500,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
"""OpenAI's name of the kind of an error, by its status, where it has one of its own."""
_FINAL = (409, 500, 501, 504)
"""Statuses after which OpenAI's clients would try again, only to get them again: what took too long would
take as long."""
_FIELDS = {
    "chat.messages.role": "messages",
    "chat.messages": "messages",
    "chat": "messages",
    "max_new_tokens": "max_tokens",
    "num_top_logprobs": "top_logprobs",
    "stop_strings": "stop",
    "token_ids": "prompt",
}
"""Fields of a request that have another name over HTTP."""
_NAMED = re.compile(rf"\b({'|'.join(name for name in _FIELDS if '_' in name)})\b")
"""Those among them that are no words of everyday English, in a message."""


def told(error: BaseException) -> SpecdecError:
    """Return what a client is told of what ended its request; of a defect, which is logged, its kind."""
    if isinstance(error, SpecdecError):
        return error
    if isinstance(error, asyncio.CancelledError):
        # Only the end of the drain does that, and nobody awaits the cancellation of a request's task.
        return UnavailableError("The gateway has stopped; try again.", reason="DRAINING")
    log_defect(logger, "request failed", error)
    return InternalError(f"The server has a defect: {type(error).__name__}.")


def status_of(error: SpecdecError) -> int:
    """Return the HTTP status of an error."""
    return STATUSES.get(status_code(error), 500)


def error_content(error: SpecdecError) -> dict[str, Any]:
    """Return an error in OpenAI's form. Fields have the names that they have over HTTP."""
    message = _NAMED.sub(lambda found: _FIELDS[found[0]], error.message)
    return _content(status_of(error), message, param=_param(error.field), code=error.reason.lower())


def http_error_content(error: HTTPException) -> dict[str, Any]:
    """Return an error that only HTTP has, such as an unknown path, in OpenAI's form."""
    code = HTTPStatus(error.status_code).name.lower()
    return _content(error.status_code, error.detail, param="", code=code)


def error_headers(error: SpecdecError) -> dict[str, str]:
    """Return the headers of an error: whether and when to try again, and what credentials are wanted."""
    headers = {}
    if status_of(error) in _FINAL:
        headers["x-should-retry"] = "false"
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if status_of(error) == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return headers


def _param(field: str) -> str:
    return "response_format" if field.startswith("output_format") else _FIELDS.get(field, field)


def _content(status: int, message: str, *, param: str, code: str) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param or None, "code": code}}
