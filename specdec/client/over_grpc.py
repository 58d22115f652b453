"""The transports that clients have by default: a gateway over gRPC, blocking and on asyncio."""

from __future__ import annotations

import asyncio
import os
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import grpc

from specdec.client.transport import AsyncCall, Call, Metadata
from specdec.contract.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    RequestCancelledError,
    ResourceExhaustedError,
    SpecdecError,
    UnavailableError,
    from_rpc_error,
)
from specdec.local.state_file import read_live_state
from specdec.transport.channel import (
    CLIENT_IDLE_S,
    TlsConfig,
    aio_channel,
    is_local,
    parse_uris,
    sync_channel,
)
from specdec.v1 import gateway_pb2, gateway_pb2_grpc

GATEWAY_VARIABLE = "SPECDEC_GATEWAY"
"""Environment variable that names the gateway's address."""

TOKEN_VARIABLE = "SPECDEC_TOKEN"
"""Environment variable of the bearer token."""

_CANCELLED_HERE = ("Locally cancelled by application!", "Channel closed!")
"""What gRPC's own stacks say of a call that this process cancelled, or whose channel it closed."""
_NOT_RECEIVED = "SERVER: Received message larger than max"
"""What gRPC says for a server that was sent a larger message than it receives, with both sizes."""

_ToError = Callable[[grpc.RpcError], SpecdecError]


def find_gateway(target: str = "") -> str:
    """Return the gateway's address: `target`, else $SPECDEC_GATEWAY, else that of `specdec up`.

    Raises:
        InvalidArgumentError: the address is malformed.
        UnavailableError: none is given and nothing runs.
    """
    target = target or os.environ.get(GATEWAY_VARIABLE, "")
    if target:
        addresses = parse_uris(target)
        if len(addresses) > 1:
            raise InvalidArgumentError(
                f"{target!r} is more than one address; pass one gateway.", field="target"
            )
        return addresses[0]
    state = read_live_state()
    if state is None:
        raise UnavailableError(
            f"No gateway is running here. Start one with `specdec up`, or name one with --gateway or "
            f"{GATEWAY_VARIABLE}=HOST:PORT.",
            reason="NO_GATEWAY",
        )
    return state.gateway


class _Use:
    """Whether a channel has let its connection go, because nobody called for a while.

    gRPC lets it go once in the life of a channel, and after that keeps it. So the next call needs another
    channel. Safe to share between threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_calls = 0
        self._left_at = time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether the pause has been long enough."""
        with self._lock:
            return not self._num_calls and time.monotonic() - self._left_at >= CLIENT_IDLE_S

    def add(self, call: Any) -> None:
        """Count a call until it is done."""
        with self._lock:
            self._num_calls += 1
        call.add_done_callback(self._done)

    def _done(self, _: object) -> None:
        with self._lock:
            self._num_calls -= 1
            self._left_at = time.monotonic()


class _GatewayConnection:
    """What the two transports share: where the gateway is, with what credentials, and what failures mean."""

    def __init__(self, target: str = "", *, tls: TlsConfig | None = None, token: str = "") -> None:
        self.target = find_gateway(target)
        self._tls = tls or TlsConfig.from_environment()
        token = token or os.environ.get(TOKEN_VARIABLE, "")
        if token and not self._tls and not is_local(self.target):
            raise InvalidArgumentError(
                f"A token is not sent to {self.target} in plain text, where others can read it: set "
                "SPECDEC_TLS_AUTHORITIES, or pass tls=TlsConfig().",
                field="token",
            )
        self._credentials: Metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._channel: Any = None
        self._stub: Any = None
        self._use = _Use()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.target!r})"

    def __del__(self) -> None:
        if getattr(self, "_channel", None) is not None:
            message = f"The connection to {self.target} was never closed; use the client in a with block."
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    def _error(self, error: grpc.RpcError, timeout_s: float | None) -> SpecdecError:
        typed = from_rpc_error(error)
        metadata: Any = error.trailing_metadata() or ()
        from_server = any(key == "grpc-status-details-bin" for key, _ in metadata)
        if isinstance(typed, DeadlineExceededError) and not from_server and timeout_s is not None:
            return DeadlineExceededError(
                f"The gateway at {self.target} did not finish within {timeout_s:g} s; allow more time with "
                "--timeout, or timeout_s in Python."
            )
        is_lost = isinstance(typed, UnavailableError) or (
            # A gateway that stops cancels what its grace did not suffice for.
            isinstance(typed, RequestCancelledError) and not _was_cancelled_here(error)
        )
        if is_lost and not from_server:
            return UnavailableError(
                f"The gateway at {self.target} does not answer or went away; check that it runs "
                f"(`specdec up` starts one here). {typed.message}",
                reason="GATEWAY_UNREACHABLE",
            )
        if isinstance(typed, ResourceExhaustedError) and _NOT_RECEIVED in typed.message:
            return InvalidArgumentError(
                f"The request with its prompt is longer than the gateway at {self.target} takes; shorten the "
                f"prompt. {typed.message}",
                field="prompt",
                reason="PROMPT_TOO_LONG",
            )
        return typed


class GrpcTransport(_GatewayConnection):
    """A gateway over gRPC's blocking stack; safe to share between threads. Arguments as `Client`."""

    def __init__(self, target: str = "", *, tls: TlsConfig | None = None, token: str = "") -> None:
        super().__init__(target, tls=tls, token=token)
        self._starting = threading.Lock()
        self._connect()

    def _connect(self) -> None:
        self._channel, self._use = sync_channel(self.target, tls=self._tls), _Use()
        self._stub = _stub_of(self._channel)

    def _start(self, method: str, request: object, metadata: Metadata, timeout_s: float | None) -> Any:
        with self._starting:
            if self._use.is_over:
                self._channel.close()
                self._connect()
            start = getattr(self._stub, method)
            call = getattr(start, "future", start)(
                request, timeout=timeout_s, metadata=(*metadata, *self._credentials)
            )
            self._use.add(call)
        return call

    def generate(
        self, request: gateway_pb2.GenerateRequest, metadata: Metadata, timeout_s: float | None
    ) -> Call:
        """Start a generation; see `Transport`."""
        call = self._start("Generate", request, metadata, timeout_s)
        return _GrpcCall(call, partial(self._error, timeout_s=timeout_s))

    def info(self, metadata: Metadata, timeout_s: float | None) -> gateway_pb2.GatewayServiceGetInfoResponse:
        """Ask what the gateway is; see `Transport`."""
        call = self._start("GetInfo", gateway_pb2.GatewayServiceGetInfoRequest(), metadata, timeout_s)
        try:
            response: gateway_pb2.GatewayServiceGetInfoResponse = call.result()
        except grpc.RpcError as error:
            raise self._error(error, timeout_s) from error
        return response

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class AsyncGrpcTransport(_GatewayConnection):
    """A gateway over gRPC on asyncio, in one event loop at a time. Arguments as `Client`."""

    _loop: asyncio.AbstractEventLoop | None = None
    """The loop that the channel belongs to."""

    def _start(self, method: str, request: object, metadata: Metadata, timeout_s: float | None) -> Any:
        """Start a call on the running loop's channel: loops come and go with every `asyncio.run`.

        Raises:
            FailedPreconditionError: another loop uses the client now.
        """
        # A channel binds to the running loop, which there may not be yet where the client is made.
        loop = asyncio.get_event_loop()
        if self._channel is not None and loop is not self._loop:
            if self._loop is not None and not self._loop.is_closed():
                raise FailedPreconditionError(
                    "This client is in use in another event loop; make a client in each loop.",
                    reason="OTHER_EVENT_LOOP",
                )
            self._channel = None  # nobody can close it any more: its loop has ended
        if self._channel is None or self._use.is_over:
            # One that was let go closes itself, as nothing refers to it any more.
            self._channel, self._use, self._loop = aio_channel(self.target, tls=self._tls), _Use(), loop
            self._stub = _stub_of(self._channel)
        call = getattr(self._stub, method)(
            request, timeout=timeout_s, metadata=(*metadata, *self._credentials)
        )
        self._use.add(call)
        return call

    def generate_async(
        self, request: gateway_pb2.GenerateRequest, metadata: Metadata, timeout_s: float | None
    ) -> AsyncCall:
        """Start a generation; see `AsyncTransport`."""
        call = self._start("Generate", request, metadata, timeout_s)
        return _AsyncGrpcCall(call, partial(self._error, timeout_s=timeout_s))

    async def info_async(
        self, metadata: Metadata, timeout_s: float | None
    ) -> gateway_pb2.GatewayServiceGetInfoResponse:
        """Ask what the gateway is; see `AsyncTransport`."""
        call = self._start("GetInfo", gateway_pb2.GatewayServiceGetInfoRequest(), metadata, timeout_s)
        try:
            response: gateway_pb2.GatewayServiceGetInfoResponse = await call
        except grpc.RpcError as error:
            raise self._error(error, timeout_s) from error
        return response

    async def close_async(self) -> None:
        """Close the connection; calls under way are cancelled."""
        if self._channel is not None:
            channel, self._channel = self._channel, None
            if self._loop is asyncio.get_running_loop():
                await channel.close()


class _GrpcCall:
    """A generation under way on the blocking stack, its failures as typed errors."""

    def __init__(self, call: Any, to_error: _ToError) -> None:
        self._call = call
        self._to_error = to_error

    def __iter__(self) -> Iterator[gateway_pb2.GenerateResponse]:
        try:
            yield from self._call
        except grpc.RpcError as error:
            raise self._to_error(error) from error

    def cancel(self) -> None:
        self._call.cancel()


class _AsyncGrpcCall:
    """The same on asyncio."""

    def __init__(self, call: Any, to_error: _ToError) -> None:
        self._call = call
        self._to_error = to_error

    async def __aiter__(self) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        try:
            async for response in self._call:
                yield response
        except grpc.RpcError as error:
            raise self._to_error(error) from error
        except asyncio.CancelledError:
            # grpc.aio raises this for a call that was cancelled as well; only a cancelled task may see it.
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise RequestCancelledError("The generation was cancelled.") from None

    def cancel(self) -> None:
        self._call.cancel()


def _stub_of(channel: grpc.Channel | grpc.aio.Channel) -> Any:
    return gateway_pb2_grpc.GatewayServiceStub(channel)


def _was_cancelled_here(error: grpc.RpcError) -> bool:
    details = error.details() or ""
    return any(saying in details for saying in _CANCELLED_HERE)
