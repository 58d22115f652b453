"""The client on the blocking gRPC stack."""

from __future__ import annotations

from typing import Self

import grpc

from specdec.client.common import CLIENT_DEFAULT, DEFAULT_TIMEOUT_S, ClientBase, Timeout, gateway_stub
from specdec.client.gateway_info import GatewayInfo
from specdec.client.generation import DEFAULT_OPTIONS, GenerateOptions, Generation, Prompt
from specdec.client.streams import GenerationStream
from specdec.client.wire import build_request, request_metadata
from specdec.transport.channel import TlsConfig, sync_channel
from specdec.v1 import gateway_pb2


class Client(ClientBase):
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
        self._stub = gateway_stub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        options: GenerateOptions = DEFAULT_OPTIONS,
        *,
        timeout_s: Timeout = CLIENT_DEFAULT,
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
        timeout_s: Timeout = CLIENT_DEFAULT,
    ) -> GenerationStream:
        """Start a generation and iterate over its tokens; leaving the `with` block early cancels it.

        Raises:
            InvalidArgumentError: the request cannot be sent; later failures are raised by the iteration.
        """
        request = build_request(prompt, options)
        metadata = (*self._metadata, *request_metadata(options))
        call = self._stub.Generate(request, timeout=self._timeout(timeout_s), metadata=metadata)
        return GenerationStream(call, self._error)

    def info(self, *, timeout_s: Timeout = CLIENT_DEFAULT) -> GatewayInfo:
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
