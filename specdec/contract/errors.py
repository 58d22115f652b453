"""The tree of errors, how they become gRPC statuses, and how a client turns a status back into an error.

SpecdecError
├── InvalidArgumentError        a value is out of range; `field` names it
├── FailedPreconditionError     the request is right, the state is wrong (stale base, round before open)
├── NotFoundError               the named drafter, session or model does not exist
├── ResourceExhaustedError      no room or quota is left; `retry_after_s` says when to try again
├── AbortedError                what ran gave way to something else; begin again where it was
├── UnauthenticatedError        credentials are missing or wrong
├── PermissionDeniedError       the caller is known but may not do this
├── UnavailableError            a service is loading, draining or gone
├── UnimplementedError          the server does not have this part of the contract
├── DeadlineExceededError       the caller's deadline passed
├── RequestCancelledError       the caller went away
└── InternalError               the server has a defect
"""

from __future__ import annotations

import logging
import traceback
from contextlib import suppress
from itertools import accumulate
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from specdec.v1 import common_pb2

ERROR_DOMAIN = "specdec.v1"
_CODES = {code.value[0]: code for code in grpc.StatusCode}
SESSION_PREEMPTED = "SESSION_PREEMPTED"
"""Reason of an AbortedError: the KV of a verifier's session went to an older one."""
_DETAILS_METADATA = "grpc-status-details-bin"
_MAX_MESSAGE_BYTES = 1500
"""Longest message that is sent, bytes. HTTP/2 trailers repeat a status three times and end at 8 KiB."""


class SpecdecError(Exception):
    """Base class of every error that this project raises on purpose.

    Args:
        message: what is wrong, then what to do about it, in one or two sentences.
        reason: UPPER_SNAKE_CASE constant that a program can act on, sent as google.rpc.ErrorInfo.reason.
        field: the request field at fault, sent as google.rpc.BadRequest.
        retry_after_s: seconds to wait before the next try, sent as google.rpc.RetryInfo.
    """

    default_reason = "UNKNOWN"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        field: str = "",
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.field = field
        self.retry_after_s = retry_after_s
        self.request_id = ""
        """Id of the request that failed, from google.rpc.RequestInfo. Empty: the request has no id."""


class InvalidArgumentError(SpecdecError):
    """A value of the request is out of range."""

    default_reason = "INVALID_ARGUMENT"


class FailedPreconditionError(SpecdecError):
    """The request does not fit the state of the session or the server."""

    default_reason = "FAILED_PRECONDITION"


class NotFoundError(SpecdecError):
    """The named thing does not exist."""

    default_reason = "NOT_FOUND"


class ResourceExhaustedError(SpecdecError):
    """The server has no room now; try again later or ask for less."""

    default_reason = "RESOURCE_EXHAUSTED"


class AbortedError(SpecdecError):
    """The server ended what ran in favour of something else; begin again with what there is so far."""

    default_reason = "ABORTED"


class UnauthenticatedError(SpecdecError):
    """Credentials are missing or wrong."""

    default_reason = "UNAUTHENTICATED"


class PermissionDeniedError(SpecdecError):
    """The caller is known but may not do this."""

    default_reason = "PERMISSION_DENIED"


class UnavailableError(SpecdecError):
    """The service is loading, draining or gone."""

    default_reason = "UNAVAILABLE"


class UnimplementedError(SpecdecError):
    """The server does not have this part of the contract."""

    default_reason = "UNIMPLEMENTED"


class DeadlineExceededError(SpecdecError):
    """The deadline passed before the answer was complete."""

    default_reason = "DEADLINE_EXCEEDED"


class RequestCancelledError(SpecdecError):
    """The caller cancelled the request."""

    default_reason = "CANCELLED"


class InternalError(SpecdecError):
    """The server has a defect."""

    default_reason = "INTERNAL"


STATUS_CODES: dict[type[SpecdecError], grpc.StatusCode] = {
    InvalidArgumentError: grpc.StatusCode.INVALID_ARGUMENT,
    FailedPreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    ResourceExhaustedError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    AbortedError: grpc.StatusCode.ABORTED,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    UnimplementedError: grpc.StatusCode.UNIMPLEMENTED,
    DeadlineExceededError: grpc.StatusCode.DEADLINE_EXCEEDED,
    RequestCancelledError: grpc.StatusCode.CANCELLED,
    InternalError: grpc.StatusCode.INTERNAL,
}
_ERROR_TYPES = {code: error_type for error_type, code in STATUS_CODES.items()}


def kind_of(error: BaseException) -> str:
    """Return the kind of an error for spans and logs, without the message, which may quote a prompt."""
    return error.reason if isinstance(error, SpecdecError) else type(error).__name__


def log_defect(logger: logging.Logger, what: str, error: BaseException, **extra: object) -> None:
    """Log the kind and place of a defect: its traceback without the last line, which is the message."""
    place = "".join(traceback.format_tb(error.__traceback__))
    logger.error(what, extra={"error": kind_of(error), "traceback": place, **extra}, stacklevel=2)


def status_code(error: SpecdecError) -> grpc.StatusCode:
    """Return the status code of an error, taken from its nearest class in `STATUS_CODES`."""
    for error_type in type(error).__mro__:
        if error_type in STATUS_CODES:
            return STATUS_CODES[error_type]
    return grpc.StatusCode.UNKNOWN


def to_status(error: SpecdecError, request_id: str = "") -> grpc.Status:
    """Return the status of an error with google.rpc details, ready for `context.abort_with_status`.

    Args:
        request_id: id of the request that failed; empty: the request has no id.
    """
    message = _shortened(error.message)
    proto = status_pb2.Status(code=status_code(error).value[0], message=message)
    _pack(proto, error_details_pb2.ErrorInfo(reason=error.reason, domain=ERROR_DOMAIN))
    if error.field:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=message)
        _pack(proto, error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration(
            seconds=int(error.retry_after_s), nanos=int(error.retry_after_s % 1 * 1e9)
        )
        _pack(proto, error_details_pb2.RetryInfo(retry_delay=delay))
    if request_id:
        _pack(proto, error_details_pb2.RequestInfo(request_id=request_id))
    return rpc_status.to_status(proto)


def end_of(error: SpecdecError, request_id: str = "") -> common_pb2.SessionEnd:
    """Return an error as the end of a session that shares its call with others."""
    status = to_status(error, request_id)
    return session_end(status.code, status.details or "", status.trailing_metadata)


def session_end(code: grpc.StatusCode, message: str = "", metadata: Any = ()) -> common_pb2.SessionEnd:
    """Return a status as the end of a session that shares its call with others.

    Args:
        metadata: the trailing metadata that came with the status, as pairs.
    """
    details = dict(metadata or ()).get(_DETAILS_METADATA, b"")
    return common_pb2.SessionEnd(code=code.value[0], message=message, details=details)


def from_end(end: common_pb2.SessionEnd) -> SpecdecError:
    """Return the typed error of a session that shared its call with others."""
    return _from_status(_CODES.get(end.code, grpc.StatusCode.UNKNOWN), end.message, end.details)


def _shortened(message: str) -> str:
    """Cut the middle out of a long message, which begins with what is wrong and ends with what to do."""
    # The middle is never kept, so megabytes of it need not be measured.
    if len(message) > 2 * _MAX_MESSAGE_BYTES:
        message = message[:_MAX_MESSAGE_BYTES] + message[-_MAX_MESSAGE_BYTES:]
    # A header percent-encodes characters that are not printable ASCII: each of their bytes becomes three.
    sizes = [1 if " " <= c <= "~" else 3 * len(c.encode(errors="replace")) for c in message]
    if sum(sizes) <= _MAX_MESSAGE_BYTES:
        return message
    budget = _MAX_MESSAGE_BYTES // 2
    head = sum(1 for size in accumulate(sizes) if size <= budget)
    tail = sum(1 for size in accumulate(reversed(sizes)) if size <= budget)
    return f"{message[:head]} [...] {message[-tail:]}"


def _pack(status: status_pb2.Status, detail: Message) -> None:
    packed = any_pb2.Any()
    packed.Pack(detail)
    status.details.append(packed)


def from_rpc_error(error: grpc.RpcError) -> SpecdecError:
    """Return the typed error of a failed call, on either gRPC stack, with the details the server sent."""
    metadata: Any = error.trailing_metadata() or ()  # pairs on either stack; the stubs disagree
    details = next((value for key, value in metadata if key == _DETAILS_METADATA), b"")
    return _from_status(error.code(), error.details() or "", details)


def _from_status(code: grpc.StatusCode, message: str, details: bytes) -> SpecdecError:
    error_type = _ERROR_TYPES.get(code, InternalError)
    result = error_type(message or f"The call failed with {code.name}.")
    with suppress(DecodeError):  # the code counts even if the details are garbage
        _read_details(result, details)
    return result


def has_details(error: grpc.RpcError) -> bool:
    """Return whether the server itself sent a typed error; otherwise the message is about the connection."""
    metadata: Any = error.trailing_metadata() or ()
    return any(key == _DETAILS_METADATA for key, _ in metadata)


def _read_details(error: SpecdecError, serialised: bytes) -> None:
    proto = status_pb2.Status.FromString(serialised)
    if proto.code == code_pb2.OK:
        return
    for detail in proto.details:
        info, bad, retry, request = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
            error_details_pb2.RequestInfo(),
        )
        if detail.Unpack(info):
            error.reason = info.reason
        elif detail.Unpack(bad) and bad.field_violations:
            error.field = bad.field_violations[0].field
        elif detail.Unpack(retry):
            error.retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif detail.Unpack(request):
            error.request_id = request.request_id
