"""The message of a unary call: it is waited for within a limit, and few at a time are received from a host.

gRPC reads the message of a unary call into memory before its handler runs, however long that takes. A peer
that begins many large messages and ends none would hold their memory for ever. So unary calls are served as
streams of one message: a call that waits for its turn has only its first bytes in memory.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc

MAX_AT_A_TIME = 16
"""Most messages that are received from a host at a time; those of other calls wait for their turn."""
TIMEOUT_S = 20.0
"""How long a call may take to send its message, the wait for its turn included, seconds."""

_Context = grpc.aio.ServicerContext[Any, Any]


def host_of(context: _Context) -> str:
    """Return the host of a call's peer, "ipv4:10.0.0.1" for example; all unix sockets are one host."""
    peer = context.peer() or ""
    return peer.rpartition(":")[0] or peer


class Turns:
    """Turns to receive a message, of which few at a time are received from a host."""

    def __init__(self) -> None:
        self.max_at_a_time = MAX_AT_A_TIME
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._waiting: Counter[str] = Counter()

    @property
    def num_waiting(self) -> int:
        """How many messages are received, or wait for their turn."""
        return self._waiting.total()

    @asynccontextmanager
    async def turn(self, host: str) -> AsyncIterator[None]:
        """Wait for the turn of a host's message, and keep it within the block."""
        with self._counted(host) as turn:
            async with turn:
                yield

    @contextmanager
    def _counted(self, host: str) -> Iterator[asyncio.Semaphore]:
        self._waiting[host] += 1
        try:
            yield self._turns.setdefault(host, asyncio.Semaphore(self.max_at_a_time))
        finally:
            self._waiting[host] -= 1
            if not self._waiting[host]:
                del self._waiting[host], self._turns[host]


class FirstMessageInterceptor(grpc.aio.ServerInterceptor):
    """Serves unary calls as streams of one message."""

    def __init__(self) -> None:
        self.timeout_s = TIMEOUT_S
        self.turns = Turns()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler: Any = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler  # type: ignore[no-any-return]
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler
        )
        behaviour = handler.unary_stream or handler.unary_unary
        return make(self._served(behaviour), handler.request_deserializer, handler.response_serializer)

    def _served(self, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(requests: AsyncIterator[Any], context: _Context) -> Any:
            try:
                async with asyncio.timeout(self.timeout_s):
                    request = await self._first(requests, host_of(context))
            except TimeoutError:
                await context.abort(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"The call's message did not arrive within {self.timeout_s:g} s; send it again.",
                )
            except StopAsyncIteration:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "The call has no message.")
            return await behaviour(request, context)

        return call

    async def _first(self, requests: AsyncIterator[Any], host: str) -> Any:
        """Return the first message, received in turn with those of the host's other calls."""
        async with self.turns.turn(host):
            return await anext(aiter(requests))
