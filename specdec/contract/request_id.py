"""The name of one generation, by which it is found in every log record, span and error of every service."""

from __future__ import annotations

import re
import secrets
from contextvars import ContextVar

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.protocol import REQUEST_ID_METADATA

_LAWFUL = re.compile(r"[!-~]{1,128}")

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Name of the request that this task works on; empty where there is none."""


def new_request_id() -> str:
    """A name that no other request has: 32 hexadecimal digits."""
    return secrets.token_hex(16)


def checked_request_id(request_id: str) -> str:
    """The id itself.

    Raises:
        InvalidArgumentError: it is not 1 to 128 printable ASCII characters without spaces.
    """
    if not _LAWFUL.fullmatch(request_id):
        raise InvalidArgumentError(
            f"The request id {request_id[:40]!r} must be 1 to 128 printable ASCII characters without spaces.",
            field=REQUEST_ID_METADATA,
        )
    return request_id


def adopt_request_id(request_id: str) -> None:
    """Take over the id that a session's first message brings; empty: the call's own stays.

    Raises:
        InvalidArgumentError: it is malformed.
    """
    if request_id:
        REQUEST_ID.set(checked_request_id(request_id))
