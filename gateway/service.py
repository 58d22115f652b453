"""The gateway's gRPC edge."""

from __future__ import annotations

import grpc

from gateway.generations import Generations
from gateway.request.padding import pad
from specdec.service.sessions import remaining_timeout_s, send
from specdec.v1 import gateway_pb2, gateway_pb2_grpc

SERVICE_NAME = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name

GenerateContext = grpc.aio.ServicerContext[gateway_pb2.GenerateRequest, gateway_pb2.GenerateResponse]


class _Peer:
    """Gets an answer as messages of its call.

    Args:
        padding: each message's size is a multiple of so many bytes; 0: it is as it is.
    """

    def __init__(self, context: GenerateContext, padding: int) -> None:
        self._context, self._padding = context, padding

    def remaining_s(self) -> float | None:
        """Return the seconds until the call's deadline."""
        return remaining_timeout_s(self._context)

    async def send(self, response: gateway_pb2.GenerateResponse) -> None:
        """Write a message to the call's stream."""
        pad(response, self._padding)
        await send(self._context, response)


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    """Answers clients that speak gRPC."""

    def __init__(self, generations: Generations, stream_padding: int) -> None:
        self._generations, self._padding = generations, stream_padding

    async def Generate(  # noqa: N802
        self, request: gateway_pb2.GenerateRequest, context: GenerateContext
    ) -> None:
        """Run one generation and stream its text."""
        metadata = dict(context.invocation_metadata() or ())
        peer = _Peer(context, self._padding)
        await self._generations.run(request, peer, traceparent=str(metadata.get("traceparent", "")))

    async def GetInfo(  # noqa: N802
        self,
        request: gateway_pb2.GatewayServiceGetInfoRequest,
        context: grpc.aio.ServicerContext[
            gateway_pb2.GatewayServiceGetInfoRequest, gateway_pb2.GatewayServiceGetInfoResponse
        ],
    ) -> gateway_pb2.GatewayServiceGetInfoResponse:
        """Tell which models, methods and replicas there are."""
        return await self._generations.info()
