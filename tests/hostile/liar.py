"""A drafter service that lies: a real gRPC server whose every answer a test makes up."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from specdec.contract.protocol import PROTOCOL_VERSION
from specdec.service.shared_call import serve_many
from specdec.transport.handshake import make_handshake
from specdec.transport.server import server_options
from specdec.v1 import common_pb2, drafter_pb2

SERVICE = "specdec.v1.DrafterService"
NAME = "liar"

DraftContext = grpc.aio.ServicerContext[Any, Any]
Requests = AsyncIterator[drafter_pb2.DraftRequest]


class Part:
    """A session's part in the call that it shares. Bytes are sent as they are: a message of the call."""

    def __init__(self, call: OneAtATime, number: int) -> None:
        self._call, self._number = call, number

    def message(self, response: drafter_pb2.DraftResponse) -> drafter_pb2.DraftManyResponse:
        """Return the call's message that has an answer of the session."""
        item = drafter_pb2.DraftManyResponse.Item(session=self._number, response=response)
        return drafter_pb2.DraftManyResponse(items=[item])

    async def write(self, answer: Any) -> None:
        """Send an answer."""
        await self._call.write(answer if isinstance(answer, bytes) else self.message(answer))

    async def abort(self, code: grpc.StatusCode, details: str, trailing: Sequence[tuple[str, Any]]) -> None:
        """End the session with a status."""
        metadata = dict(trailing).get("grpc-status-details-bin", b"")
        end = common_pb2.SessionEnd(code=code.value[0], message=details, details=metadata)
        item = drafter_pb2.DraftManyResponse.Item(session=self._number, end=end)
        await self._call.write(drafter_pb2.DraftManyResponse(items=[item]))
        self._call.ended.add(self._number)
        raise asyncio.CancelledError


class OneAtATime:
    """A call's context for several who write to it."""

    def __init__(self, call: DraftContext) -> None:
        self._call, self._lock = call, asyncio.Lock()
        self.ended: set[int] = set()
        """Sessions of which nothing is sent any more."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    async def write(self, message: Any) -> None:
        """Send a message when those before it are sent."""
        if not isinstance(message, bytes) and all(item.session in self.ended for item in message.items):
            return
        async with self._lock:
            await self._call.write(message)


class Liar:
    """An honest drafter without a guess. A kind of lie overrides what it lies about.

    Answers may be bytes: they are sent as they are.
    """

    def __init__(self) -> None:
        self.num_streams = 0
        """Sessions open now."""
        self.num_drafts = 0
        """Rounds answered, or not answered, so far."""
        self.committed: list[int] = []
        """Tokens of the session that was told last."""
        self.expected: list[int] = []
        """Prompt and output of the request under way, where a lie needs to know them."""

    def info(self) -> Any:
        """Return the answer to GetInfo."""
        return drafter_pb2.DrafterServiceGetInfoResponse(
            protocol_version=PROTOCOL_VERSION, drafters=[self.drafter()], max_sessions=64
        )

    def drafter(self, **fields: Any) -> drafter_pb2.DrafterInfo:
        """Return what the service says of its only drafter, changed in `fields`."""
        right = {"name": NAME, "family": NAME, "max_draft_depth": 8, "default_draft_depth": 4}
        return drafter_pb2.DrafterInfo(**(right | {"max_draft_nodes": 32} | fields))

    async def open(self, message: drafter_pb2.DraftOpen) -> Any:
        """Return the answer to an open."""
        return drafter_pb2.DraftResponse(opened=drafter_pb2.DraftOpened(handshake=make_handshake()))

    async def round(self, message: drafter_pb2.DraftRound) -> Any:
        """Return the answer to a round."""
        return drafter_pb2.DraftResponse(result=self.draft(message))

    def draft(self, message: drafter_pb2.DraftRound) -> drafter_pb2.DraftResult:
        """Return the draft of a round."""
        return drafter_pb2.DraftResult()

    async def session(self, requests: Requests, context: Part) -> None:
        """Serve a whole session."""
        async for request in requests:
            if request.WhichOneof("message") == "open":
                self.committed = list(request.open.committed_token_ids)
                await context.write(await self.open(request.open))
            else:
                self.num_drafts += 1
                self.committed += request.round.committed_token_ids
                await context.write(await self.round(request.round))

    def health(self) -> health_pb2_grpc.HealthServicer:
        """Return the health service."""
        return health_aio.HealthServicer()

    async def _draft_many(self, requests: AsyncIterator[Any], context: DraftContext) -> None:
        call = OneAtATime(context)

        async def serve(messages: Requests, session: Any) -> None:
            self.num_streams += 1
            try:
                await self.session(messages, Part(call, session.number))
            finally:
                self.num_streams -= 1

        await serve_many(serve, requests, cast(Any, call), drafter_pb2.DraftManyResponse)

    async def _get_info(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return self.info()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the handlers of the service's methods."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "DraftMany": grpc.stream_stream_rpc_method_handler(
                    self._draft_many,
                    request_deserializer=drafter_pb2.DraftManyRequest.FromString,
                    response_serializer=_serialise,
                ),
                "GetInfo": grpc.unary_unary_rpc_method_handler(
                    self._get_info,
                    request_deserializer=drafter_pb2.DrafterServiceGetInfoRequest.FromString,
                    response_serializer=_serialise,
                ),
            },
        )


def _serialise(message: Any) -> bytes:
    return message if isinstance(message, bytes) else bytes(message.SerializeToString())


def lying_timings() -> common_pb2.PhaseTimings:
    """Return the timings of a drafter that was busy since long before the universe began."""
    longest_ns = 2**64 - 1
    return common_pb2.PhaseTimings(
        total_ns=longest_ns, queue_ns=longest_ns, compute_ns=longest_ns, batch_size=2**32 - 1
    )


@asynccontextmanager
async def running_liar(liar: Liar) -> AsyncIterator[str]:
    """Run the liar's server, SERVING, and yield its address."""
    server = grpc.aio.server(options=[*server_options(), ("grpc.max_metadata_size", 64 * 2**20)])
    server.add_generic_rpc_handlers((liar.handlers(),))
    health = liar.health()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    if isinstance(health, health_aio.HealthServicer):
        await health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(0)
