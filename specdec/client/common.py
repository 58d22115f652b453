"""What the blocking and the asyncio client share: deadlines, what goes with a call, and their end."""

from __future__ import annotations

from numbers import Real

from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from specdec.client.transport import Metadata
from specdec.contract.bounds import MAX_NUMBER
from specdec.contract.errors import FailedPreconditionError, InvalidArgumentError
from specdec.contract.protocol import REQUEST_ID_METADATA
from specdec.contract.request_id import checked_request_id
from specdec.transport.channel import TlsConfig

DEFAULT_TIMEOUT_S = 300.0
"""Seconds a call may take when neither the client nor the call says."""


class ClientDefault:
    """Marks a timeout that was not given, since None means no deadline."""

    def __repr__(self) -> str:
        return "<the client's>"


CLIENT_DEFAULT = ClientDefault()
Timeout = float | None | ClientDefault


class ClientBase:
    """What the two clients share."""

    _transport: object

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = _checked_timeout(timeout_s)
        self._is_closed = False

    @property
    def is_closed(self) -> bool:
        """Whether the client was closed; it takes no more calls then."""
        return self._is_closed

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._transport!r}{', closed' if self._is_closed else ''}>"

    def _timeout(self, timeout_s: Timeout) -> float | None:
        """Return the deadline of a call.

        Raises:
            FailedPreconditionError: the client is closed.
            InvalidArgumentError: the deadline is malformed.
        """
        if self._is_closed:
            raise FailedPreconditionError("The client is closed; make a new one.", reason="CLIENT_CLOSED")
        return self._timeout_s if isinstance(timeout_s, ClientDefault) else _checked_timeout(timeout_s)


def check_connection(
    kind: type[object], transport: object, target: str, tls: TlsConfig | None, token: str
) -> None:
    """Refuse values of wrong types, and a transport beside an address, for a transport knows where it goes.

    Raises:
        InvalidArgumentError: a value is of a wrong type, or both ways are given.
    """
    for name, text in (("target", target), ("token", token)):
        if not isinstance(text, str):
            raise InvalidArgumentError(f"{name} is {text!r}; it must be a string.", field=name)
    if tls is not None and not isinstance(tls, TlsConfig):
        raise InvalidArgumentError(f"tls is {tls!r}; it must be a TlsConfig.", field="tls")
    methods = [name for name in vars(kind) if not name.startswith("_")]
    if transport is not None and not all(callable(getattr(transport, name, None)) for name in methods):
        raise InvalidArgumentError(
            f"transport is {transport!r}; it must have the methods {', '.join(methods)}.", field="transport"
        )
    if transport is not None and (target or tls is not None or token):
        raise InvalidArgumentError(
            "Give the client a transport or an address with its tls and token, not both; "
            "GrpcTransport(target, tls=..., token=...) is the transport of an address.",
            field="transport",
        )


def call_metadata(request_id: str = "") -> Metadata:
    """Return what goes with a call beside its message: the caller's span, so that its trace goes on in the
    services, or has a link there, and the request's id; empty: it has none.

    Raises:
        InvalidArgumentError: the request id is malformed.
    """
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    if request_id:
        carrier[REQUEST_ID_METADATA] = checked_request_id(request_id)
    return tuple(carrier.items())


def _checked_timeout(timeout_s: float | None) -> float | None:
    if timeout_s is not None and not (isinstance(timeout_s, Real) and 0 < timeout_s <= MAX_NUMBER):
        raise InvalidArgumentError(
            f"timeout_s is {timeout_s!r}; it must be a number of seconds > 0 and at most {MAX_NUMBER}, "
            "or None for no deadline.",
            field="timeout_s",
        )
    return timeout_s
