"""What the blocking and the asyncio client share: which gateway, with what credentials, and for how long."""

from __future__ import annotations

import math
import os
from typing import Any

import grpc
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from specdec.contract.errors import (
    InvalidArgumentError,
    RequestCancelledError,
    SpecdecError,
    UnavailableError,
    from_rpc_error,
)
from specdec.local.state_file import read_live_state
from specdec.transport.channel import TlsConfig, is_local, parse_uris
from specdec.v1 import gateway_pb2_grpc

GATEWAY_VARIABLE = "SPECDEC_GATEWAY"
"""Environment variable that names the gateway's address."""

TOKEN_VARIABLE = "SPECDEC_TOKEN"
"""Environment variable of the bearer token."""

DEFAULT_TIMEOUT_S = 300.0
"""Seconds a call may take when neither the client nor the call says."""


_CANCELLED_HERE = "Locally cancelled by application!"
"""What gRPC's own stacks say of a call that this process cancelled."""


class ClientDefault:
    """Marks a timeout that was not given, since None means no deadline."""


CLIENT_DEFAULT = ClientDefault()
Timeout = float | None | ClientDefault


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


class ClientBase:
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
        return self._timeout_s if isinstance(timeout_s, ClientDefault) else _checked_timeout(timeout_s)

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


def gateway_stub(channel: grpc.Channel | grpc.aio.Channel) -> Any:
    return gateway_pb2_grpc.GatewayServiceStub(channel)


def _checked_timeout(timeout_s: float | None) -> float | None:
    if timeout_s is not None and not 0 < timeout_s < math.inf:
        raise InvalidArgumentError(
            f"timeout_s is {timeout_s}; it must be a number of seconds > 0, or None for no deadline.",
            field="timeout_s",
        )
    return timeout_s
