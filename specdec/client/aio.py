"""The client on asyncio."""

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
from specdec.client.over_grpc import AsyncGrpcTransport
from specdec.client.streams import AsyncGenerationStream
from specdec.client.transport import AsyncTransport
from specdec.client.wire import build_request
from specdec.transport.channel import TlsConfig


class AsyncClient(ClientBase):
    """Asyncio client of a gateway, in one event loop at a time: it may be used again in a later
    `asyncio.run`. Arguments as `Client`."""

    def __init__(
        self,
        target: str = "",
        *,
        tls: TlsConfig | None = None,
        timeout_s: float | None = DEFAULT_TIMEOUT_S,
        token: str = "",
        transport: AsyncTransport | None = None,
    ) -> None:
        super().__init__(timeout_s)
        check_connection(AsyncTransport, transport, target, tls, token)
        self._transport: AsyncTransport = transport or AsyncGrpcTransport(target, tls=tls, token=token)

    async def generate(
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
        async with self.stream(prompt, options, timeout_s=timeout_s) as stream:
            async for _ in stream:
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
    ) -> AsyncGenerationStream:
        """Start a generation and iterate over its tokens; leaving the `async with` block early cancels it.

        Raises:
            InvalidArgumentError: the request cannot be sent; later failures are raised by the iteration.
            FailedPreconditionError: the client is closed.
        """
        options = with_keywords(options, method, max_new_tokens, temperature, top_p, seed, stop)
        deadline_s = self._timeout(timeout_s)
        request, metadata = build_request(prompt, options), call_metadata(options.request_id)
        call = self._transport.generate_async(request, metadata, deadline_s)
        return AsyncGenerationStream(call, options.request_id)

    async def info(self, *, timeout_s: Timeout = CLIENT_DEFAULT) -> GatewayInfo:
        """Return what the gateway and the services behind it are and how loaded they are.

        Raises:
            SpecdecError: the one that fits; see `specdec.errors`.
        """
        answer = await self._transport.info_async(call_metadata(), self._timeout(timeout_s))
        return GatewayInfo.from_proto(answer)

    async def close(self) -> None:
        """Close the connection; calls under way are cancelled. Closing again does nothing."""
        if not self._is_closed:
            self._is_closed = True
            await self._transport.close_async()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()
