"""The interceptors around every call to a server: they name requests, check credentials and send errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from specdec.contract.errors import InternalError, InvalidArgumentError, SpecdecError, log_defect, to_status
from specdec.contract.protocol import REQUEST_ID_METADATA
from specdec.contract.request_id import REQUEST_ID, checked_request_id, new_request_id
from specdec.service.auth import CALLER, Authenticator

logger = logging.getLogger(__name__)

_Message = TypeVar("_Message")
_OUR_METHODS = "/specdec.v1."
_HEALTH_METHODS = "/grpc.health.v1.Health/"
_STATUS_S = 5.0
"""How long a peer may take to read the error that ends its call, seconds."""
_METHOD_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


@dataclass(frozen=True, slots=True)
class _Malformed:
    """A request whose bytes are not a message of its type."""

    reason: str


class RequestIdInterceptor(grpc.aio.ServerInterceptor):
    """Gives every call of our services a request id, the caller's or a new one. It must come first."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if handler_call_details.method.startswith(_OUR_METHODS):
            metadata = dict(handler_call_details.invocation_metadata or ())
            # Every call has a task and a context of its own.
            REQUEST_ID.set(new_request_id())
            if REQUEST_ID_METADATA in metadata:
                try:
                    REQUEST_ID.set(checked_request_id(str(metadata[REQUEST_ID_METADATA])))
                except SpecdecError as error:
                    return _refusing(error)
        return await continuation(handler_call_details)


class OpenCalls:
    """How many calls of our methods are answered now."""

    def __init__(self) -> None:
        self.num_open = 0
        self.draining = asyncio.Event()
        """Set when the server ends, and takes nothing new."""
        self._none_left = asyncio.Event()
        self._none_left.set()

    async def none_left(self) -> None:
        """Wait until there is none."""
        await self._none_left.wait()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count a call within the block."""
        self._add(1)
        try:
            yield
        finally:
            self._add(-1)

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """Leave out, within the block, the call that it runs in."""
        self._add(-1)
        try:
            yield
        finally:
            self._add(1)

    def _add(self, change: int) -> None:
        self.num_open += change
        if self.num_open:
            self._none_left.clear()
        else:
            self._none_left.set()


class HouseInterceptor(grpc.aio.ServerInterceptor):
    """Turns the errors of our methods into statuses, and undecodable requests into INVALID_ARGUMENT.

    Args:
        calls: counts the calls.
    """

    def __init__(self, calls: OpenCalls) -> None:
        self._calls = calls

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_OUR_METHODS):
            return handler  # type: ignore[no-any-return]
        kind = next(kind for kind in _METHOD_KINDS if getattr(handler, kind))
        wrapped = _with_errors(getattr(handler, kind), handler.request_streaming, self._calls)
        decode = _tolerant(handler.request_deserializer)
        return handler._replace(**{kind: wrapped, "request_deserializer": decode})  # type: ignore[no-any-return]


class AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without credentials, even of reflection or unknown methods; health needs none."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        if not handler_call_details.method.startswith(_HEALTH_METHODS):
            metadata = dict(handler_call_details.invocation_metadata or ())
            try:
                # Every call has a task and a context of its own.
                CALLER.set(await self._authenticator.authenticate(metadata))
            except SpecdecError as error:
                return _refusing(error)
            except Exception as error:
                log_defect(logger, "the authenticator failed", error)
                return _refusing(InternalError("The authenticator failed; the log of the server says why."))
        return await continuation(handler_call_details)


def _refusing(error: SpecdecError) -> grpc.RpcMethodHandler[Any, Any]:
    """Make a handler that answers any kind of call with an error, without reading the request."""

    async def refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await _abort(context, error)

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(refuse)
    return handler


def _with_errors(
    behaviour: Callable[..., Awaitable[Any]], streams_requests: bool, calls: OpenCalls
) -> Callable[..., Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        with calls.counted():
            try:
                return await behaviour(_checked(request) if streams_requests else _check(request), context)
            except SpecdecError as error:
                await _abort(context, error)
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except grpc.aio.InternalError:
                # A write failed because the peer is gone; gRPC ends the call by itself.
                logger.info("the peer went away in a write", extra={"peer": context.peer()})
            except Exception as error:
                await _abort(context, as_error(error))

    return call


def as_error(error: BaseException) -> SpecdecError:
    """Return what a request failed with, as the error that its peer gets; a defect is logged."""
    if isinstance(error, SpecdecError):
        return error
    log_defect(logger, "request failed", error)
    return InternalError(f"The server has a defect: {type(error).__name__}: {error}")


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: SpecdecError) -> None:
    """End a call with an error. A peer that does not read even that is not waited for: a status comes after
    the messages before it."""
    status = to_status(error, REQUEST_ID.get())
    try:
        async with asyncio.timeout(_STATUS_S):
            await context.abort(status.code, status.details or "", status.trailing_metadata or ())
    except TimeoutError:
        raise asyncio.CancelledError from None


def _tolerant(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Make a decoder that hands malformed requests to the handler; gRPC itself would answer INTERNAL."""

    def tolerant(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            return _Malformed(str(error))

    return tolerant


def _check(request: _Message | _Malformed) -> _Message:
    if isinstance(request, _Malformed):
        raise InvalidArgumentError(
            f"The request is not a valid protobuf message ({request.reason}); text must be UTF-8.",
            reason="MALFORMED_MESSAGE",
        )
    return request


async def _checked(requests: AsyncIterator[_Message | _Malformed]) -> AsyncIterator[_Message]:
    async for request in requests:
        yield _check(request)
