"""The client SDK: `Client` on the blocking gRPC stack, `AsyncClient` on asyncio. Needs no torch.

    with Client("127.0.0.1:50050") as client:
        print(client.generate("Write a haiku about rivers.").text)
        with client.stream("Count to ten.", GenerateOptions(method="ngram")) as stream:
            for token in stream:
                print(token.text, end="", flush=True)
        print(stream.result.speculation.mean_acceptance_length)

Every failed call raises a `specdec.errors.SpecdecError`. The caller's trace goes on in the services.
"""

from __future__ import annotations

import math
import os
from typing import Any, Self

import grpc
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from specdec.channel import TlsConfig, aio_channel, is_local, parse_uris, sync_channel
from specdec.errors import (
    InvalidArgumentError,
    RequestCancelledError,
    SpecdecError,
    UnavailableError,
    from_rpc_error,
)
from specdec.gateway_info import (
    DrafterInfo,
    DrafterServiceInfo,
    GatewayInfo,
    ModelInfo,
    ReplicaInfo,
    VerifierInfo,
)
from specdec.generation import (
    DEFAULT_OPTIONS,
    GenerateOptions,
    Generation,
    Message,
    Prompt,
    ProposerStats,
    Speculation,
    Started,
    Timing,
    Token,
    Usage,
)
from specdec.local_state import read_live_state
from specdec.sampling import SamplingParams
from specdec.streams import AsyncGenerationStream, GenerationStream
from specdec.v1 import gateway_pb2, gateway_pb2_grpc
from specdec.wire import build_request

__all__ = [
    "GATEWAY_VARIABLE",
    "AsyncClient",
    "AsyncGenerationStream",
    "Client",
    "DrafterInfo",
    "DrafterServiceInfo",
    "GatewayInfo",
    "GenerateOptions",
    "Generation",
    "GenerationStream",
    "Message",
    "ModelInfo",
    "Prompt",
    "ProposerStats",
    "ReplicaInfo",
    "SamplingParams",
    "Speculation",
    "Started",
    "Timing",
    "TlsConfig",
    "Token",
    "Usage",
    "VerifierInfo",
    "find_gateway",
]

GATEWAY_VARIABLE = "SPECDEC_GATEWAY"
"""Environment variable that names the gateway's address."""

TOKEN_VARIABLE = "SPECDEC_TOKEN"
"""Environment variable of the bearer token."""

DEFAULT_TIMEOUT_S = 300.0
"""Seconds a call may take when neither the client nor the call says."""


_CANCELLED_HERE = "Locally cancelled by application!"
"""What gRPC's own stacks say of a call that this process cancelled."""


class _ClientDefault:
    """Marks a timeout that was not given, since None means no deadline."""


_CLIENT_DEFAULT = _ClientDefault()
Timeout = float | None | _ClientDefault


def find_gateway(target: str = "") -> str:
    """The gateway's address: `target`, else $SPECDEC_GATEWAY, else the system that `specdec up` started.

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


class _Base:
    """What the two clients share: the address, the default deadline and the naming of failures."""

    def __init__(self, target: str, tls: TlsConfig | None, timeout_s: float | None, token: str) -> None:
        self.target = find_gateway(target)
        self._tls = tls or TlsConfig.from_environment()
        self._timeout_s = _checked_timeout(timeout_s)
        self._token = token or os.environ.get(TOKEN_VARIABLE, "")
        if self._token and not self._tls and not is_local(self.target):
            raise InvalidArgumentError(
                f"A token is not sent to {self.target} in plain text, where others can read it: set "
                "SPECDEC_TLS_AUTHORITIES, or pass tls=TlsConfig().",
                field="token",
            )

    @property
    def _metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        token = (("authorization", f"Bearer {self._token}"),) if self._token else ()
        return (*_trace_context(), *token)

    def _timeout(self, timeout_s: Timeout) -> float | None:
        return self._timeout_s if isinstance(timeout_s, _ClientDefault) else _checked_timeout(timeout_s)

    def _error(self, error: grpc.RpcError) -> SpecdecError:
        typed = from_rpc_error(error)
        metadata: Any = error.trailing_metadata() or ()
        from_server = any(key == "grpc-status-details-bin" for key, _ in metadata)
        is_lost = isinstance(typed, UnavailableError) or (
            # A gateway that stops cancels what its grace did not suffice for.
            isinstance(typed, RequestCancelledError) and error.details() != _CANCELLED_HERE
        )
        if is_lost and not from_server:
            return UnavailableError(
                f"The gateway at {self.target} does not answer or went away; check that it runs "
                f"(`specdec up` starts one here). {typed.message}",
                reason="GATEWAY_UNREACHABLE",
            )
        return typed


def _trace_context() -> tuple[tuple[str, str], ...]:
    """The caller's span, if there is one, so that its trace goes on in the services."""
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return tuple(carrier.items())


def _stub(channel: grpc.Channel | grpc.aio.Channel) -> Any:
    return gateway_pb2_grpc.GatewayServiceStub(channel)


def _checked_timeout(timeout_s: float | None) -> float | None:
    if timeout_s is not None and not 0 < timeout_s < math.inf:
        raise InvalidArgumentError(
            f"timeout_s is {timeout_s}; it must be a number of seconds > 0, or None for no deadline.",
            field="timeout_s",
        )
    return timeout_s


class Client(_Base):
    """Blocking client of a gateway; safe to share between threads.

    Args:
        target: address of the gateway, HOST:PORT or a gRPC URI; empty: see `find_gateway`.
        tls: PEM files for TLS; None: those of the SPECDEC_TLS_* variables, no encryption without them.
        timeout_s: deadline of every call that names none, seconds; None: no deadline.
        token: bearer token for the gateway; empty: $SPECDEC_TOKEN. Sent over TLS or within this host only.

    Raises:
        InvalidArgumentError: an argument is malformed.
        UnavailableError: no target is given and none is running.
    """

    def __init__(
        self,
        target: str = "",
        *,
        tls: TlsConfig | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        token: str = "",
    ) -> None:
        super().__init__(target, tls, timeout_s, token)
        self._channel = sync_channel(self.target, tls=self._tls)
        self._stub = _stub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        options: GenerateOptions = DEFAULT_OPTIONS,
        *,
        timeout_s: Timeout = _CLIENT_DEFAULT,
    ) -> Generation:
        """Generate the whole answer.

        Raises:
            SpecdecError: the one that fits; see `specdec.errors`.
        """
        with self.stream(prompt, options, timeout_s=timeout_s) as stream:
            for _ in stream:
                pass
            return stream.result

    def stream(
        self,
        prompt: Prompt,
        options: GenerateOptions = DEFAULT_OPTIONS,
        *,
        timeout_s: Timeout = _CLIENT_DEFAULT,
    ) -> GenerationStream:
        """Start a generation and iterate over its tokens; leaving the `with` block early cancels it.

        Raises:
            InvalidArgumentError: the request cannot be sent; later failures are raised by the iteration.
        """
        request = build_request(prompt, options)
        call = self._stub.Generate(request, timeout=self._timeout(timeout_s), metadata=self._metadata)
        return GenerationStream(call, self._error)

    def info(self, *, timeout_s: Timeout = _CLIENT_DEFAULT) -> GatewayInfo:
        """What the gateway and the services behind it are and how loaded they are."""
        try:
            request = gateway_pb2.GatewayServiceGetInfoRequest()
            return GatewayInfo.from_proto(
                self._stub.GetInfo(request, timeout=self._timeout(timeout_s), metadata=self._metadata)
            )
        except grpc.RpcError as error:
            raise self._error(error) from error

    def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Base):
    """Asyncio client of a gateway; belongs to the event loop of its first call. Arguments as `Client`."""

    def __init__(
        self,
        target: str = "",
        *,
        tls: TlsConfig | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        token: str = "",
    ) -> None:
        super().__init__(target, tls, timeout_s, token)
        self._channel: grpc.aio.Channel | None = None
        self._lazy_stub: Any = None

    @property
    def _stub(self) -> Any:
        # A channel binds to the running loop, which there may not be yet where the client is made.
        if self._channel is None:
            self._channel = aio_channel(self.target, tls=self._tls)
            self._lazy_stub = _stub(self._channel)
        return self._lazy_stub

    async def generate(
        self,
        prompt: Prompt,
        options: GenerateOptions = DEFAULT_OPTIONS,
        *,
        timeout_s: Timeout = _CLIENT_DEFAULT,
    ) -> Generation:
        """Generate the whole answer.

        Raises:
            SpecdecError: the one that fits; see `specdec.errors`.
        """
        async with self.stream(prompt, options, timeout_s=timeout_s) as stream:
            async for _ in stream:
                pass
            return stream.result

    def stream(
        self,
        prompt: Prompt,
        options: GenerateOptions = DEFAULT_OPTIONS,
        *,
        timeout_s: Timeout = _CLIENT_DEFAULT,
    ) -> AsyncGenerationStream:
        """Start a generation and iterate over its tokens; leaving the `async with` block early cancels it.

        Raises:
            InvalidArgumentError: the request cannot be sent; later failures are raised by the iteration.
        """
        request = build_request(prompt, options)
        call = self._stub.Generate(request, timeout=self._timeout(timeout_s), metadata=self._metadata)
        return AsyncGenerationStream(call, self._error)

    async def info(self, *, timeout_s: Timeout = _CLIENT_DEFAULT) -> GatewayInfo:
        """What the gateway and the services behind it are and how loaded they are."""
        try:
            request = gateway_pb2.GatewayServiceGetInfoRequest()
            return GatewayInfo.from_proto(
                await self._stub.GetInfo(request, timeout=self._timeout(timeout_s), metadata=self._metadata)
            )
        except grpc.RpcError as error:
            raise self._error(error) from error

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled."""
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
