"""The seam between a client and its gateway: what carries a request there and brings the responses back.

A client speaks gRPC unless it is given a transport. Whoever writes one (to try again, to record, to answer
without a server) wraps or replaces `GrpcTransport`; `specdec.testing.MockTransport` is one for tests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Protocol

from specdec.v1 import gateway_pb2

Metadata = tuple[tuple[str, str], ...]
"""What travels beside a request: keys, in lower case, and values."""


class Call(Protocol):
    """A generation under way."""

    def __iter__(self) -> Iterator[gateway_pb2.GenerateResponse]:
        """Yield the responses as they come; a failure is raised as the SpecdecError that fits."""

    def cancel(self) -> None:
        """End the generation; an iteration under way raises RequestCancelledError."""


class AsyncCall(Protocol):
    """A generation under way, on asyncio."""

    def __aiter__(self) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        """Yield the responses as they come; a failure is raised as the SpecdecError that fits."""

    def cancel(self) -> None:
        """End the generation; an iteration under way raises RequestCancelledError."""


class Transport(Protocol):
    """What a `Client` sends its requests through; a deadline of None means no deadline."""

    def generate(
        self, request: gateway_pb2.GenerateRequest, metadata: Metadata, timeout_s: float | None
    ) -> Call:
        """Start a generation; what fails is raised by the iteration."""

    def info(self, metadata: Metadata, timeout_s: float | None) -> gateway_pb2.GatewayServiceGetInfoResponse:
        """Ask what the gateway is.

        Raises:
            SpecdecError: the one that fits.
        """

    def close(self) -> None:
        """End the calls under way and free what is held."""


class AsyncTransport(Protocol):
    """What an `AsyncClient` sends its requests through; the same as `Transport`."""

    def generate_async(
        self, request: gateway_pb2.GenerateRequest, metadata: Metadata, timeout_s: float | None
    ) -> AsyncCall:
        """Start a generation; what fails is raised by the iteration."""

    async def info_async(
        self, metadata: Metadata, timeout_s: float | None
    ) -> gateway_pb2.GatewayServiceGetInfoResponse:
        """Ask what the gateway is.

        Raises:
            SpecdecError: the one that fits.
        """

    async def close_async(self) -> None:
        """End the calls under way and free what is held."""
