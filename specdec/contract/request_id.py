"""The request id: the name of one generation in the log records, spans and errors of every service."""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.protocol import REQUEST_ID_METADATA

_LAWFUL = re.compile(r"[!-~]{1,128}")

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""The id of the request that the current task works on. Empty: the task works on no request."""


def new_request_id() -> str:
    """Make an id that no other request has: 32 hexadecimal digits."""
    return secrets.token_hex(16)


def checked_request_id(request_id: str) -> str:
    """Return the id unchanged if it is well formed.

    Raises:
        InvalidArgumentError: the id is not 1 to 128 printable ASCII characters without spaces.
    """
    if not isinstance(request_id, str):
        raise InvalidArgumentError(
            f"The request id is {request_id!r}; pass a string.", field=REQUEST_ID_METADATA
        )
    if not _LAWFUL.fullmatch(request_id):
        raise InvalidArgumentError(
            f"The request id {request_id[:40]!r}, {len(request_id)} characters long, is malformed; "
            "send 1 to 128 printable ASCII characters without spaces.",
            field=REQUEST_ID_METADATA,
        )
    return request_id


def adopt_request_id(request_id: str) -> None:
    """Use the id of a session's first message from now on. If it is empty, the call keeps its own id.

    Raises:
        InvalidArgumentError: the id is malformed.
    """
    if request_id:
        REQUEST_ID.set(checked_request_id(request_id))


def request_metadata() -> tuple[tuple[str, str], ...]:
    """Return the metadata that names the current request in a call to another service, if there is one."""
    request_id = REQUEST_ID.get()
    return ((REQUEST_ID_METADATA, request_id),) if request_id else ()
