"""The gRPC edge of the verifier: it parses requests, calls the verifier and answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc
from opentelemetry.context import attach
from opentelemetry.trace import SpanKind

from specdec.contract.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    UnavailableError,
    UnimplementedError,
)
from specdec.contract.methods import MAX_DRAFTERS
from specdec.contract.output_format import OutputFormat
from specdec.contract.protocol import MIN_PROTOCOL_VERSION, PROTOCOL_VERSION
from specdec.contract.request_id import adopt_request_id
from specdec.contract.request_limits import (
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    validate_cache_key,
    validate_length,
)
from specdec.contract.sampling import SamplingParams
from specdec.contract.target_state import STORAGE_TO_PROTO, ProjectionInfo, TargetStateSpec
from specdec.service.interceptors import OpenCalls
from specdec.service.sessions import WRITE_TIMEOUT_S, SessionContext, SessionRules, send
from specdec.service.shared_call import serve_many
from specdec.service.telemetry import Telemetry, context_of, record_span
from specdec.state.view import Projection, num_projection_bytes
from specdec.transport.handshake import check_handshake, make_handshake
from specdec.transport.server import SPARE_STREAMS
from specdec.v1 import common_pb2, target_state_pb2, verifier_pb2, verifier_pb2_grpc
from verifier_service.acceptance import FinishReason
from verifier_service.metrics import VerifierMetrics
from verifier_service.session import OpenRequest, Session
from verifier_service.state_stream import StateChunk
from verifier_service.verifier import Timed, Verifier

SERVICE_NAME = verifier_pb2.DESCRIPTOR.services_by_name["VerifierService"].full_name

UPLOAD_TIMEOUT_S = 60.0
"""Seconds within which a projection must arrive."""

_FINISH_REASONS = {
    None: verifier_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP_TOKEN: verifier_pb2.FINISH_REASON_STOP_TOKEN,
    FinishReason.LENGTH: verifier_pb2.FINISH_REASON_LENGTH,
}

ManyContext = grpc.aio.ServicerContext[verifier_pb2.VerifyManyRequest, verifier_pb2.VerifyManyResponse]


class VerifierServicer(verifier_pb2_grpc.VerifierServiceServicer):
    """Serves a verifier. Until the verifier is loaded, every call gets UnavailableError."""

    def __init__(self, telemetry: Telemetry, rules: SessionRules, calls: OpenCalls) -> None:
        self._rules, self._calls = rules, calls
        self.verifier: Verifier | None = None
        self.write_timeout_s = WRITE_TIMEOUT_S
        self.upload_timeout_s = UPLOAD_TIMEOUT_S
        self._tracer = telemetry.tracer
        self.metrics = VerifierMetrics(telemetry.meter)
        self._projection_upload = asyncio.Lock()

    def _loaded(self) -> Verifier:
        if self.verifier is None:
            raise UnavailableError("The model is still loading; try again in a few seconds.", retry_after_s=2)
        return self.verifier

    async def Verify(  # noqa: N802
        self, requests: AsyncIterator[verifier_pb2.VerifyRequest], context: SessionContext
    ) -> None:
        """Serve one session: an open, then rounds."""
        verifier = self._loaded()
        self._rules.admit(context)
        messages = self._rules.messages(requests)
        request = await anext(messages, None)
        if request is None:
            return
        if request.WhichOneof("message") != "open":
            raise FailedPreconditionError(
                "The first message of a Verify stream must be an open.", reason="ROUND_BEFORE_OPEN"
            )
        arrived_ns = time.monotonic_ns()
        attach(context_of(request.traceparent))  # log records of the session carry its trace and request id
        adopt_request_id(request.open.request_id)
        check_handshake(
            request.open.handshake,
            model_id=verifier.loaded.model_id,
            vocabulary_fingerprint=verifier.loaded.vocabulary_fingerprint,
        )
        async with verifier.open(_open_request(request.open)) as session:
            timed = await verifier.prefill(session)
            result = self._result(session, timed, arrived_ns, request.traceparent, 0, is_first=True)
            handshake = make_handshake(verifier.loaded.model_id, verifier.loaded.vocabulary_fingerprint)
            opened = verifier_pb2.VerifyOpened(
                handshake=handshake, first=result, num_reused_tokens=session.num_reused_tokens
            )
            self.metrics.reused_tokens.add(session.num_reused_tokens)
            if session.state is None:
                opened.target_state_refusal = next(iter(session.state_refusals), "")
            if request.open.drafter_state_specs:
                opened.drafter_state_refusals.extend(session.state_refusals)
            await send(context, verifier_pb2.VerifyResponse(opened=opened), self.write_timeout_s)
            async for request in messages:
                result = await self._round(verifier, session, request)
                await send(context, verifier_pb2.VerifyResponse(result=result), self.write_timeout_s)

    async def VerifyMany(  # noqa: N802
        self, requests: AsyncIterator[verifier_pb2.VerifyManyRequest], context: ManyContext
    ) -> None:
        """Serve any number of sessions."""
        self._rules.admit(context)
        await serve_many(
            self.Verify,
            requests,
            context,
            verifier_pb2.VerifyManyResponse,
            calls=self._calls,
            max_sessions=self._loaded().config.max_sessions + SPARE_STREAMS,
            write_timeout_s=self.write_timeout_s,
        )

    async def _round(
        self, verifier: Verifier, session: Session, request: verifier_pb2.VerifyRequest
    ) -> verifier_pb2.VerifyResult:
        arrived_ns = time.monotonic_ns()
        if request.WhichOneof("message") != "round":
            raise FailedPreconditionError(
                "A Verify stream is opened once; send rounds, or start another stream.", reason="SECOND_OPEN"
            )
        message = request.round
        timed = await verifier.verify(
            session, message.base_committed_length, message.draft_token_ids, message.parent_indices
        )
        self.metrics.rounds.add(1)
        return self._result(session, timed, arrived_ns, request.traceparent, len(message.draft_token_ids))

    def _result(
        self,
        session: Session,
        timed: Timed,
        arrived_ns: int,
        traceparent: str,
        num_draft_tokens: int,
        *,
        is_first: bool = False,
    ) -> verifier_pb2.VerifyResult:
        total_ns = time.monotonic_ns() - arrived_ns
        acceptance, path = timed.verdict.acceptance, timed.accepted_node_indices
        state = session.state
        record_span(
            self._tracer,
            "specdec.verify",
            traceparent,
            duration_ns=total_ns,
            kind=SpanKind.SERVER,
            attributes={
                "specdec.num_draft_tokens": num_draft_tokens,
                "specdec.num_accepted_tokens": acceptance.num_accepted_tokens,
                "specdec.committed_length": session.committed_length,
                "specdec.queue_ns": timed.queue_ns,
                "specdec.compute_ns": timed.compute_ns,
                "specdec.batch_size": timed.batch_size,
            },
        )
        return verifier_pb2.VerifyResult(
            num_accepted_tokens=acceptance.num_accepted_tokens,
            accepted_node_indices=() if path == tuple(range(len(path))) else path,
            bonus_token_id=acceptance.bonus_token_id,
            committed_length=session.committed_length,
            cached_length=session.cached_length,
            finish_reason=_FINISH_REASONS[acceptance.finish_reason],
            logprobs=[
                common_pb2.TokenLogprobs(
                    logprob=own, top=[common_pb2.Candidate(token_id=i, logprob=lp) for i, lp in top]
                )
                for own, top in timed.verdict.logprobs
            ],
            target_state=(state.first_ref() if is_first else state.next_ref()).to_proto() if state else None,
            timings=common_pb2.PhaseTimings(
                total_ns=total_ns,
                queue_ns=timed.queue_ns,
                compute_ns=timed.compute_ns,
                batch_size=timed.batch_size,
                batch_tokens=timed.batch_tokens,
                batch_background_tokens=timed.batch_background_tokens,
            ),
            load=self._loaded().current_load.to_proto(),
        )

    async def StreamTargetState(  # noqa: N802
        self,
        request: target_state_pb2.StreamTargetStateRequest,
        context: grpc.aio.ServicerContext[
            target_state_pb2.StreamTargetStateRequest, target_state_pb2.StreamTargetStateResponse
        ],
    ) -> None:
        """Stream the state of a session as positions become final, until the session ends."""
        verifier = self._loaded()
        if verifier.config.target_state == "handle":
            raise UnimplementedError(
                "This verifier shares target state by handle only; it streams with --target-state auto.",
                reason="NO_STATE_STREAM",
            )
        export = verifier.export
        state = export.find(request.session_id)
        projection = export.projection(request.projection_sha256) if request.projection_sha256 else None
        names = frozenset(request.tensor_names)
        async with aclosing(export.stream(state, request.start_position, projection, names)) as chunks:
            async for chunk in chunks:
                self.metrics.state_bytes.add(sum(map(len, chunk.rows.values())))
                await send(context, _chunk(chunk), self.write_timeout_s)

    async def PutProjection(  # noqa: N802
        self,
        requests: AsyncIterator[target_state_pb2.PutProjectionRequest],
        context: grpc.aio.ServicerContext[
            target_state_pb2.PutProjectionRequest, target_state_pb2.PutProjectionResponse
        ],
    ) -> target_state_pb2.PutProjectionResponse:
        """Receive the weights of a projection."""
        export = self._loaded().export
        try:
            async with asyncio.timeout(self.upload_timeout_s):
                first = await anext(aiter(requests), None)
        except TimeoutError:
            raise DeadlineExceededError(
                f"No projection came within {self.upload_timeout_s:g} s; send it at once."
            ) from None
        if first is None or not first.HasField("projection"):
            raise InvalidArgumentError("No projection was sent; send it first.", field="projection")
        info = ProjectionInfo.from_proto(first.projection)
        export.expect_projection(info)
        async with self._projection_upload:  # one upload at a time: projections may be large
            try:
                # A peer that stops sending must not block the other uploads.
                async with asyncio.timeout(self.upload_timeout_s):
                    data = await _receive(info, first.data, requests)
            except TimeoutError:
                raise DeadlineExceededError(
                    f"The projection did not arrive within {self.upload_timeout_s:g} s; send it again."
                ) from None
            # Hashing a large projection takes a while; it runs no torch operation on that thread.
            projection = await asyncio.to_thread(Projection.from_bytes, info, data)
            export.put_projection(projection)
        return target_state_pb2.PutProjectionResponse()

    async def GetTargetWeights(  # noqa: N802
        self,
        request: target_state_pb2.GetTargetWeightsRequest,
        context: grpc.aio.ServicerContext[
            target_state_pb2.GetTargetWeightsRequest, target_state_pb2.GetTargetWeightsResponse
        ],
    ) -> target_state_pb2.GetTargetWeightsResponse:
        """Say where the target's embedding and LM head are."""
        return (await self._loaded().weights()).to_proto()

    async def GetInfo(  # noqa: N802
        self,
        request: verifier_pb2.VerifierServiceGetInfoRequest,
        context: grpc.aio.ServicerContext[
            verifier_pb2.VerifierServiceGetInfoRequest, verifier_pb2.VerifierServiceGetInfoResponse
        ],
    ) -> verifier_pb2.VerifierServiceGetInfoResponse:
        """Describe the model, the limits and the current load."""
        verifier = self._loaded()
        return verifier_pb2.VerifierServiceGetInfoResponse(
            protocol_version=PROTOCOL_VERSION,
            min_protocol_version=MIN_PROTOCOL_VERSION,
            model=common_pb2.ModelInfo(
                model_id=verifier.loaded.model_id,
                vocabulary_fingerprint=verifier.loaded.vocabulary_fingerprint,
                vocab_size=verifier.vocab_size,
                max_length=verifier.max_length,
                revision=verifier.loaded.revision,
                dtype=verifier.config.dtype,
                device=verifier.config.device,
                model_impl=verifier.model_impl,
            ),
            max_draft_nodes=verifier.config.max_draft_nodes,
            kv_capacity_tokens=verifier.pool.capacity_tokens,
            kv_free_tokens=verifier.pool.free_tokens,
            max_sessions=verifier.config.max_sessions,
            num_sessions=verifier.num_sessions,
            eos_token_ids=verifier.loaded.eos_token_ids,
            state_storage=STORAGE_TO_PROTO[verifier.export.storage],
            num_state_sessions=verifier.export.num_sessions,
            num_state_streams=verifier.export.num_streams,
            load=verifier.current_load.to_proto(),
            takes_output_formats=not verifier.formats.refusal,
        )


async def _receive(
    info: ProjectionInfo, first: bytes, requests: AsyncIterator[target_state_pb2.PutProjectionRequest]
) -> bytearray:
    """Collect the weights of a projection from its messages."""
    data = bytearray(first)
    async for request in requests:
        if len(data) + len(request.data) > num_projection_bytes(info):
            raise InvalidArgumentError("There is more data than the projection's sizes say.", field="data")
        data += request.data
    return data


def _open_request(message: verifier_pb2.VerifyOpen) -> OpenRequest:
    validate_cache_key("cache_salt", message.cache_salt)
    validate_cache_key("caller_key", message.caller_key)
    # Stop strings that are special tokens join those of the request.
    most = MAX_STOP_TOKEN_IDS + MAX_STOP_STRINGS
    validate_length("stop_token_ids", len(message.stop_token_ids), most)
    validate_length("drafter_state_specs", len(message.drafter_state_specs), MAX_DRAFTERS)
    specs = list(message.drafter_state_specs)
    if not specs and message.HasField("target_state_spec"):
        specs = [message.target_state_spec]
    return OpenRequest(
        committed_token_ids=tuple(message.committed_token_ids),
        max_new_tokens=message.max_new_tokens,
        sampling=SamplingParams.from_proto(message.sampling),
        stop_token_ids=frozenset(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        prompt_length=message.prompt_length,
        num_top_logprobs=message.num_top_logprobs if message.HasField("num_top_logprobs") else None,
        draft_nodes=message.draft_nodes,
        output_format=OutputFormat.of_request(message),
        target_state_specs=tuple(map(TargetStateSpec.from_proto, specs)),
        owner=(message.caller_key, message.cache_salt),
    )


def _chunk(chunk: StateChunk) -> target_state_pb2.StreamTargetStateResponse:
    return target_state_pb2.StreamTargetStateResponse(
        start_position=chunk.start,
        num_positions=chunk.stop - chunk.start,
        tensors=[
            target_state_pb2.TensorRows(name=name, data=data, num_gone_positions=chunk.num_gone.get(name, 0))
            for name, data in chunk.rows.items()
        ],
    )
