"""The transports that clients have by default: a gateway over gRPC, blocking and on asyncio."""

from __future__ import annotations

import asyncio
import os
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
    SpecdecError,
    UnavailableError,
    from_rpc_error,
)
from specdec.local.state_file import read_live_state
from specdec.transport.channel import TlsConfig, aio_channel, is_local, parse_uris, sync_channel
from specdec.v1 import gateway_pb2, gateway_pb2_grpc

GATEWAY_VARIABLE = "SPECDEC_GATEWAY"
"""Environment variable that names the gateway's address."""

TOKEN_VARIABLE = "SPECDEC_TOKEN"
"""Environment variable of the bearer token."""

_CANCELLED_HERE = ("Locally cancelled by application!", "Channel closed!")
"""What gRPC's own stacks say of a call that this process cancelled, or whose channel it closed."""

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
        return typed


class GrpcTransport(_GatewayConnection):
    """A gateway over gRPC's blocking stack; safe to share between threads. Arguments as `Client`."""

    def __init__(self, target: str = "", *, tls: TlsConfig | None = None, token: str = "") -> None:
        super().__init__(target, tls=tls, token=token)
        self._channel = sync_channel(self.target, tls=self._tls)
        self._stub = _stub_of(self._channel)

    def generate(
        self, request: gateway_pb2.GenerateRequest, metadata: Metadata, timeout_s: float | None
    ) -> Call:
        """Start a generation; see `Transport`."""
        call = self._stub.Generate(request, timeout=timeout_s, metadata=(*metadata, *self._credentials))
        return _GrpcCall(call, partial(self._error, timeout_s=timeout_s))

    def info(self, metadata: Metadata, timeout_s: float | None) -> gateway_pb2.GatewayServiceGetInfoResponse:
        """Ask what the gateway is; see `Transport`."""
        request, metadata = gateway_pb2.GatewayServiceGetInfoRequest(), (*metadata, *self._credentials)
        try:
            response: gateway_pb2.GatewayServiceGetInfoResponse = self._stub.GetInfo(
                request, timeout=timeout_s, metadata=metadata
            )
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

    def _connected(self) -> Any:
        """Return the stub of the running loop's channel: loops come and go with every `asyncio.run`.

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
        if self._channel is None:
            self._channel, self._loop = aio_channel(self.target, tls=self._tls), loop
            self._stub = _stub_of(self._channel)
        return self._stub

    def generate_async(
        self, request: gateway_pb2.GenerateRequest, metadata: Metadata, timeout_s: float | None
    ) -> AsyncCall:
        """Start a generation; see `AsyncTransport`."""
        metadata = (*metadata, *self._credentials)
        call = self._connected().Generate(request, timeout=timeout_s, metadata=metadata)
        return _AsyncGrpcCall(call, partial(self._error, timeout_s=timeout_s))

    async def info_async(
        self, metadata: Metadata, timeout_s: float | None
    ) -> gateway_pb2.GatewayServiceGetInfoResponse:
        """Ask what the gateway is; see `AsyncTransport`."""
        request, metadata = gateway_pb2.GatewayServiceGetInfoRequest(), (*metadata, *self._credentials)
        try:
            response: gateway_pb2.GatewayServiceGetInfoResponse = await self._connected().GetInfo(
                request, timeout=timeout_s, metadata=metadata
            )
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
