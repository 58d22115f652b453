"""A gRPC server with house manners: health, reflection, typed errors, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol, TypeVar

import click
import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from specdec.auth import CALLER, Authenticator
from specdec.channel import server_options
from specdec.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    PermissionDeniedError,
    SpecdecError,
    log_defect,
    to_status,
)
from specdec.telemetry import Telemetry, setup_logging, telemetry_from_environment
from specdec.tls import PemFiles, server_credentials

logger = logging.getLogger(__name__)

_Message = TypeVar("_Message")
ConfigT = TypeVar("ConfigT")
_OUR_METHODS = "/specdec.v1."
_HEALTH_METHODS = "/grpc.health.v1.Health/"
_METHOD_KINDS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


LIVENESS = "liveness"
"""Health service name that is SERVING from the start until the drain, whatever is loaded or reachable: a
process that does not answer for it is to be started anew."""

WRITE_TIMEOUT_S = 60.0
"""How long a peer may leave unread what it is sent; it holds memory and a session until then."""


@dataclass(frozen=True, slots=True)
class _Malformed:
    """Stands for a request whose bytes are no message of its type."""

    reason: str


class _HouseInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every method of ours: SpecdecError becomes its status, undecodable bytes INVALID_ARGUMENT."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_OUR_METHODS):
            return handler  # type: ignore[no-any-return]
        kind = next(kind for kind in _METHOD_KINDS if getattr(handler, kind))
        wrapped = _with_errors(getattr(handler, kind), handler.request_streaming)
        decode = _tolerant(handler.request_deserializer)
        return handler._replace(**{kind: wrapped, "request_deserializer": decode})  # type: ignore[no-any-return]


class _AuthInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without credentials, reflection and unknown methods too; health is open to all."""

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
                # The call's task has this context to itself.
                CALLER.set(await self._authenticator.authenticate(metadata))
            except SpecdecError as error:
                return _refusing(error)
            except Exception as error:
                log_defect(logger, "the authenticator failed", error)
                return _refusing(InternalError("The authenticator failed; its log says why."))
        return await continuation(handler_call_details)


def _refusing(error: SpecdecError) -> grpc.RpcMethodHandler[Any, Any]:
    """Answers any call, whatever it streams, with an error, and reads nothing of it."""

    async def refuse(_: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await _abort(context, error)

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(refuse)
    return handler


def _with_errors(behaviour: Callable[..., Awaitable[Any]], streams_requests: bool) -> Callable[..., Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            return await behaviour(_checked(request) if streams_requests else _check(request), context)
        except SpecdecError as error:
            await _abort(context, error)
        except (asyncio.CancelledError, grpc.aio.AbortError):
            raise
        except grpc.aio.InternalError:
            # A write that broke, for the peer is gone; gRPC's own ending of the call finds that out, too.
            logger.info("the peer went away in a write", extra={"peer": context.peer()})
        except Exception as error:
            log_defect(logger, "request failed", error)
            await _abort(context, InternalError(f"Defect in the server: {type(error).__name__}: {error}"))

    return call


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: SpecdecError) -> None:
    status = to_status(error)
    await context.abort(status.code, status.details or "", status.trailing_metadata or ())


def _tolerant(decode: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A decoder that reports what it cannot read to the handler; gRPC itself would answer INTERNAL."""

    def tolerant(data: bytes) -> Any:
        try:
            return decode(data)
        except DecodeError as error:
            return _Malformed(str(error))

    return tolerant


def _check(request: _Message | _Malformed) -> _Message:
    if isinstance(request, _Malformed):
        raise InvalidArgumentError(
            f"The request is no valid protobuf message ({request.reason}); text must be UTF-8.",
            reason="MALFORMED_MESSAGE",
        )
    return request


async def _checked(requests: AsyncIterator[_Message | _Malformed]) -> AsyncIterator[_Message]:
    async for request in requests:
        yield _check(request)


class _WatchContext:
    """A health watch's context that knows whether the peer believes us to be serving."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context
        self.is_down = asyncio.Event()

    async def write(self, response: health_pb2.HealthCheckResponse) -> None:
        await self._context.write(response)
        if response.status == health_pb2.HealthCheckResponse.SERVING:
            self.is_down.clear()
        else:
            self.is_down.set()


class _Health(health_aio.HealthServicer):
    """Health whose watches end with NOT_SERVING: a drain would wait for them until its grace is over."""

    def __init__(self) -> None:
        super().__init__()
        self._draining = asyncio.Event()

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """Report each change of the status until the server drains."""
        watched: Any = _WatchContext(context)
        watching = asyncio.ensure_future(super().Watch(request, watched))
        ending = asyncio.ensure_future(self._drained(watched))
        try:
            await asyncio.wait((watching, ending), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (watching, ending):
                task.cancel()
            await asyncio.wait((watching, ending))
        if not watching.cancelled():
            watching.result()

    async def _drained(self, watched: _WatchContext) -> None:
        await self._draining.wait()
        await watched.is_down.wait()

    async def enter_graceful_shutdown(self) -> None:
        """Report NOT_SERVING from now on and end every watch."""
        await super().enter_graceful_shutdown()
        self._draining.set()


class ServiceHost:
    """One gRPC server on one address.

    Args:
        service: full name of the service, whose health is reported besides the server's own ("").
        register: adds the servicer to the server.
        listen: host:port (port 0: a free one) or unix:/path.
        tls: certificate and key of the port, and who may sign callers'; None: plaintext.
        authenticator: who may call; None: everyone that can connect.
        health_listen: host:port of a plaintext port with health alone; empty: none.

    Raises:
        InvalidArgumentError: the TLS files are no good.
    """

    def __init__(
        self,
        service: str,
        register: Callable[[grpc.aio.Server], None],
        listen: str,
        *,
        tls: PemFiles | None = None,
        authenticator: Authenticator | None = None,
        health_listen: str = "",
    ) -> None:
        self.address = listen
        """Where it listens, with the real port once it does."""
        self.health_address = health_listen
        """Where health alone is answered, likewise; empty: nowhere."""
        self._service = service
        self._listen = listen
        self._credentials = server_credentials(tls) if tls else None
        interceptors: list[grpc.aio.ServerInterceptor] = [_HouseInterceptor()]
        if authenticator:
            interceptors.insert(0, _AuthInterceptor(authenticator))
        self._server = grpc.aio.server(interceptors=interceptors, options=server_options())
        self._health = _Health()
        register(self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection(
            (service, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME),
            self._server,
        )
        self._health_server = grpc.aio.server(options=server_options())
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._health_server)

    async def start(self) -> str:
        """Bind and answer, NOT_SERVING until `set_serving`. Returns the address with its real port.

        Raises:
            InvalidArgumentError: an address cannot be bound.
        """
        await self._set_health(serving=False)
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        self.address = _bind(self._server, self._listen, "listen", self._credentials)
        if self.health_address:
            self.health_address = _bind(self._health_server, self.health_address, "health_listen")
            await self._health_server.start()
        await self._server.start()
        return self.address

    async def set_serving(self) -> None:
        """Report SERVING."""
        await self._set_health(serving=True)

    async def _set_health(self, *, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in ("", self._service):
            await self._health.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, refuse new calls, give running ones `grace_s` seconds, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        if self.health_address:
            await self._health_server.stop(0)


def _bind(
    server: grpc.aio.Server, listen: str, option: str, credentials: grpc.ServerCredentials | None = None
) -> str:
    """Give a server its port. Returns the address with the real one."""
    try:
        _require_unused(listen)
        if credentials:
            port = server.add_secure_port(listen, credentials)
        else:
            port = server.add_insecure_port(listen)
    except (RuntimeError, FileExistsError) as error:
        raise InvalidArgumentError(
            f"Cannot listen on {listen}: the port is in use or the address is not this host's. "
            f"Pass another one with --{option.replace('_', '-')}.",
            field=option,
            reason="ADDRESS_IN_USE",
        ) from error
    return listen if listen.startswith("unix") else f"{listen.rpartition(':')[0]}:{port}"


def _require_unused(listen: str) -> None:
    """Refuse a unix socket that a server answers on; gRPC would take it away from that server."""
    path = listen.removeprefix("unix:")
    if path == listen:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return  # nobody there: a file left behind is replaced
    raise FileExistsError(path)


async def run_service(
    host: ServiceHost,
    *,
    load: Callable[[], Awaitable[None]],
    close: Callable[[], Awaitable[None]],
    grace_s: float,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Args:
        load: makes the service ready; runs after the port is open, so that probes get an answer.
        close: frees what load made.

    Raises:
        SpecdecError: the address cannot be bound, or `load` failed.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    address = await host.start()
    logger.info("listening", extra={"address": address})
    loading = asyncio.ensure_future(load())
    stopped = asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            await host.set_serving()
            logger.info("serving", extra={"address": address})
            await stopped
        logger.info("draining", extra={"grace_s": grace_s})
    finally:
        for task in (loading, stopped):
            task.cancel()
        await asyncio.gather(loading, stopped, return_exceptions=True)
        await host.stop(grace_s)
        await close()
    logger.info("stopped")


class RunnableServer(Protocol):
    """A service put together."""

    async def run(self) -> None:
        """Serve until a signal, then drain."""


def serve_from_command_line(
    name: str,
    config_type: Callable[..., ConfigT],
    options: Mapping[str, object],
    make_server: Callable[[ConfigT, Telemetry], RunnableServer],
) -> NoReturn:
    """Run a service process; exits with 0 after a drain, with 2 and a message for a wrong set-up."""
    try:
        config = config_type(**options)
    except SpecdecError as error:
        raise click.UsageError(error.message) from error
    setup_logging(name, str(options["log_level"]))

    async def serve() -> None:
        # Made on the loop it serves on.
        telemetry = telemetry_from_environment(name, str(options["metrics_listen"]))
        await make_server(config, telemetry).run()

    try:
        asyncio.run(serve())
    except SpecdecError as error:
        logger.error(error.message, extra={"reason": error.reason})
        _exit(2)
    except Exception:
        logger.exception("the service failed")
        _exit(1)
    _exit(0)


def _exit(code: int) -> NoReturn:
    """End the process at once: a load that was cut short still runs native code on its thread, which would
    abort the interpreter's own way out."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@dataclass(frozen=True, slots=True)
class SessionRules:
    """Who may open sessions at a model service, and how long one may be silent.

    Args:
        callers: DNS names one of which a caller's certificate must carry; empty: anyone may.
        idle_timeout_s: longest time between two messages.
    """

    callers: frozenset[str] = frozenset()
    idle_timeout_s: float = 300.0

    def admit(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Refuse a caller that may not open a session.

        Raises:
            PermissionDeniedError: its certificate carries none of the names.
        """
        if not self.callers:
            return
        names = context.auth_context().get("x509_subject_alternative_name", ())
        if self.callers.isdisjoint(name.decode(errors="replace") for name in names):
            raise PermissionDeniedError(
                "This certificate may not open sessions; --tls-session-callers names those that may.",
                reason="NOT_A_SESSION_CALLER",
            )

    async def messages(self, requests: AsyncIterator[_Message]) -> AsyncIterator[_Message]:
        """A session's messages.

        Raises:
            DeadlineExceededError: none came for too long.
        """
        while True:
            try:
                async with asyncio.timeout(self.idle_timeout_s):
                    request = await anext(requests, None)
            except TimeoutError:
                raise DeadlineExceededError(
                    f"The session had no message for {self.idle_timeout_s:g} s and has ended; open another.",
                    reason="IDLE_SESSION",
                ) from None
            if request is None:
                return
            yield request


async def send(
    context: grpc.aio.ServicerContext[Any, Any], message: Any, timeout_s: float = WRITE_TIMEOUT_S
) -> None:
    """Write a message of a stream.

    Raises:
        DeadlineExceededError: the peer does not read.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(message)
    except TimeoutError:
        raise DeadlineExceededError(
            f"What was sent has not been read for {timeout_s:g} s, so the call has ended.",
            reason="NOT_READ",
        ) from None


def remaining_timeout_s(context: grpc.aio.ServicerContext[Any, Any], margin_s: float = 0.05) -> float | None:
    """Seconds left of the caller's deadline, less a margin for the answer; None: no deadline."""
    remaining = context.time_remaining()
    return None if remaining is None else max(0.0, remaining - margin_s)
