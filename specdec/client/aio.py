"""The client on asyncio."""

from __future__ import annotations

from typing import Any, Self

import grpc

from specdec.client.common import CLIENT_DEFAULT, DEFAULT_TIMEOUT_S, ClientBase, Timeout, gateway_stub
from specdec.client.gateway_info import GatewayInfo
from specdec.client.generation import DEFAULT_OPTIONS, GenerateOptions, Generation, Prompt
from specdec.client.streams import AsyncGenerationStream
from specdec.client.wire import build_request, request_metadata
from specdec.transport.channel import TlsConfig, aio_channel
from specdec.v1 import gateway_pb2


class AsyncClient(ClientBase):
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
            self._lazy_stub = gateway_stub(self._channel)
        return self._lazy_stub

    async def generate(
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
        async with self.stream(prompt, options, timeout_s=timeout_s) as stream:
            async for _ in stream:
                pass
            return stream.result

    def stream(
        self,
        prompt: Prompt,
        options: GenerateOptions = DEFAULT_OPTIONS,
        *,
        timeout_s: Timeout = CLIENT_DEFAULT,
    ) -> AsyncGenerationStream:
        """Start a generation and iterate over its tokens; leaving the `async with` block early cancels it.

        Raises:
            InvalidArgumentError: the request cannot be sent; later failures are raised by the iteration.
        """
        request = build_request(prompt, options)
        metadata = (*self._metadata, *request_metadata(options))
        call = self._stub.Generate(request, timeout=self._timeout(timeout_s), metadata=metadata)
        return AsyncGenerationStream(call, self._error)

    async def info(self, *, timeout_s: Timeout = CLIENT_DEFAULT) -> GatewayInfo:
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
