"""The client on the blocking gRPC stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from specdec.client.common import (
    CLIENT_DEFAULT,
    DEFAULT_TIMEOUT_S,
    ClientBase,
    Timeout,
    call_metadata,
    check_connection,
)
from specdec.client.gateway_info import GatewayInfo
from specdec.client.generation import DEFAULT_OPTIONS, GenerateOptions, Generation, Prompt, with_keywords
from specdec.client.over_grpc import GrpcTransport
from specdec.client.streams import GenerationStream
from specdec.client.transport import Transport
from specdec.client.wire import build_request
from specdec.transport.channel import TlsConfig


class Client(ClientBase):
    """Blocking client of a gateway; safe to share between threads.

    `generate` and `stream` take a prompt (a string, messages, or token ids), a `GenerateOptions`, and
    keywords for what is asked for most; a keyword that is not None replaces the field of the options.

    Args:
        target: address of the gateway, HOST:PORT or a gRPC URI; empty: see `find_gateway`.
        tls: PEM files for TLS; None: those of the SPECDEC_TLS_* variables, no encryption without them.
        timeout_s: deadline of every call that names none, seconds; None: no deadline.
        token: bearer token for the gateway; empty: $SPECDEC_TOKEN. Sent over TLS or within this host only.
        transport: what requests go through, in place of gRPC to `target`; closed with the client.

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
        transport: Transport | None = None,
    ) -> None:
        super().__init__(timeout_s)
        check_connection(Transport, transport, target, tls, token)
        self._transport: Transport = transport or GrpcTransport(target, tls=tls, token=token)

    def generate(
        self,
        prompt: Prompt,
        options: GenerateOptions = DEFAULT_OPTIONS,
        *,
        method: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        timeout_s: Timeout = CLIENT_DEFAULT,
    ) -> Generation:
        """Generate the whole answer.

        Raises:
            SpecdecError: the one that fits; see `specdec.errors`.
        """
        options = with_keywords(options, method, max_new_tokens, temperature, top_p, seed, stop)
        with self.stream(prompt, options, timeout_s=timeout_s) as stream:
            for _ in stream:
                pass
            return stream.result

    def stream(
        self,
        prompt: Prompt,
        options: GenerateOptions = DEFAULT_OPTIONS,
        *,
        method: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        timeout_s: Timeout = CLIENT_DEFAULT,
    ) -> GenerationStream:
        """Start a generation and iterate over its tokens; leaving the `with` block early cancels it.

        Raises:
            InvalidArgumentError: the request cannot be sent; later failures are raised by the iteration.
            FailedPreconditionError: the client is closed.
        """
        options = with_keywords(options, method, max_new_tokens, temperature, top_p, seed, stop)
        deadline_s = self._timeout(timeout_s)
        request, metadata = build_request(prompt, options), call_metadata(options.request_id)
        call = self._transport.generate(request, metadata, deadline_s)
        return GenerationStream(call, options.request_id)

    def info(self, *, timeout_s: Timeout = CLIENT_DEFAULT) -> GatewayInfo:
        """Return what the gateway and the services behind it are and how loaded they are.

        Raises:
            SpecdecError: the one that fits; see `specdec.errors`.
        """
        return GatewayInfo.from_proto(self._transport.info(call_metadata(), self._timeout(timeout_s)))

    def close(self) -> None:
        """Close the connection; calls under way are cancelled. Closing again does nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
