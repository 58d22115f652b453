"""The drafter service's gRPC edge: it parses requests, calls the host and answers."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import grpc
from opentelemetry.context import attach
from opentelemetry.trace import SpanKind

from drafter_service.drafters.base import Drafter, DrafterTraits, DraftSession, OpenDraft
from drafter_service.host import DrafterHost
from drafter_service.metrics import DrafterMetrics
from specdec.contract.draft_tree import DraftTree
from specdec.contract.errors import FailedPreconditionError, UnavailableError
from specdec.contract.protocol import MIN_PROTOCOL_VERSION, PROTOCOL_VERSION
from specdec.contract.request_id import adopt_request_id
from specdec.contract.request_limits import validate_cache_key
from specdec.contract.sampling import SamplingParams, validate_probability
from specdec.contract.target_state import STORAGE_TO_PROTO, TargetStateRef
from specdec.runtime.engine import EngineResult
from specdec.service.interceptors import OpenCalls
from specdec.service.sessions import SessionContext, SessionRules, send
from specdec.service.shared_call import serve_many
from specdec.service.telemetry import Telemetry, context_of, record_span
from specdec.transport.handshake import check_handshake, make_handshake
from specdec.transport.server import SPARE_STREAMS
from specdec.v1 import common_pb2, drafter_pb2, drafter_pb2_grpc

SERVICE_NAME = drafter_pb2.DESCRIPTOR.services_by_name["DrafterService"].full_name

ManyContext = grpc.aio.ServicerContext[drafter_pb2.DraftManyRequest, drafter_pb2.DraftManyResponse]


class DrafterServicer(drafter_pb2_grpc.DrafterServiceServicer):
    """Serves drafters when they are loaded."""

    def __init__(self, telemetry: Telemetry, rules: SessionRules, calls: OpenCalls) -> None:
        self._rules, self._calls = rules, calls
        self.host: DrafterHost | None = None
        self._tracer = telemetry.tracer
        self.metrics = DrafterMetrics(telemetry.meter)

    def _loaded(self) -> DrafterHost:
        if self.host is None:
            raise UnavailableError("The drafters are still loading; try again shortly.", retry_after_s=2)
        return self.host

    async def Draft(  # noqa: N802
        self, requests: AsyncIterator[drafter_pb2.DraftRequest], context: SessionContext
    ) -> None:
        """Serve a session: an open, then rounds."""
        host = self._loaded()
        self._rules.admit(context)
        messages = self._rules.messages(requests)
        request = await anext(messages, None)
        if request is None:
            return
        if request.WhichOneof("message") != "open":
            raise FailedPreconditionError(
                "The first message of a Draft stream must be an open.", reason="ROUND_BEFORE_OPEN"
            )
        arrived_ns = time.monotonic_ns()
        attach(context_of(request.traceparent))  # log records of the session carry its trace and request id
        adopt_request_id(request.open.request_id)
        drafter = host.drafter(request.open.drafter)
        # The handshake names the target; an independent draft model has another id and the same vocabulary.
        check_handshake(
            request.open.handshake,
            model_id="",
            vocabulary_fingerprint=drafter.traits.vocabulary_fingerprint,
        )
        async with host.open(drafter, _open_draft(request.open)) as session:
            await host.prefill(drafter, session)
            opened = drafter_pb2.DraftOpened(
                handshake=make_handshake(drafter.traits.model_id, drafter.traits.vocabulary_fingerprint),
                timings=common_pb2.PhaseTimings(total_ns=time.monotonic_ns() - arrived_ns),
                load=host.current_load.to_proto(),
            )
            await send(context, drafter_pb2.DraftResponse(opened=opened))
            async for request in messages:
                result = await self._round(host, drafter, session, request)
                await send(context, drafter_pb2.DraftResponse(result=result))

    async def DraftMany(  # noqa: N802
        self, requests: AsyncIterator[drafter_pb2.DraftManyRequest], context: ManyContext
    ) -> None:
        """Serve any number of sessions."""
        self._rules.admit(context)
        await serve_many(
            self.Draft,
            requests,
            context,
            drafter_pb2.DraftManyResponse,
            calls=self._calls,
            max_sessions=self._loaded().config.max_sessions + SPARE_STREAMS,
        )

    async def _round(
        self, host: DrafterHost, drafter: Drafter, session: DraftSession, request: drafter_pb2.DraftRequest
    ) -> drafter_pb2.DraftResult:
        arrived_ns = time.monotonic_ns()
        if request.WhichOneof("message") != "round":
            raise FailedPreconditionError(
                "A Draft stream is opened once; send rounds, or start another stream.", reason="SECOND_OPEN"
            )
        message = request.round
        host.commit(drafter, session, message.committed_token_ids, message.committed_length)
        ref = message.target_state if message.HasField("target_state") else None
        await host.read_state(drafter, session, TargetStateRef.from_proto(ref) if ref else None)
        state_ns = time.monotonic_ns() - arrived_ns
        session.min_path_confidence = _path_confidence(message, session.sampling)
        drafted = await host.propose(drafter, session, message.draft_depth, message.draft_nodes)
        self.metrics.add_round(drafter.traits.name)
        total_ns = time.monotonic_ns() - arrived_ns
        record_span(
            self._tracer,
            "specdec.draft",
            request.traceparent,
            duration_ns=total_ns,
            kind=SpanKind.SERVER,
            attributes={
                "specdec.method": drafter.traits.name,
                "specdec.num_draft_tokens": len(drafted.value),
                "specdec.queue_ns": drafted.queue_ns,
                "specdec.compute_ns": drafted.compute_ns,
                "specdec.batch_size": drafted.batch_size,
                **self._describe_state(session, state_ns),
            },
        )
        return drafter_pb2.DraftResult(
            draft_token_ids=drafted.value.token_ids,
            parent_indices=drafted.value.parent_indices,
            timings=_timings(drafted, total_ns),
            load=host.current_load.to_proto(),
        )

    def _describe_state(self, session: DraftSession, state_ns: int) -> dict[str, str | int]:
        """Count the target state that was read, and return its span attributes."""
        if session.state is None or session.view is None or session.state.link is None:
            return {}
        storage = session.state.link.storage.value
        num_bytes = session.state.take_num_new_bytes()
        self.metrics.add_state_bytes(storage, num_bytes)
        return {
            "specdec.target_state.storage": storage,
            "specdec.target_state.bytes": num_bytes,
            "specdec.target_state.wait_ns": state_ns,
        }

    async def GetInfo(  # noqa: N802
        self,
        request: drafter_pb2.DrafterServiceGetInfoRequest,
        context: grpc.aio.ServicerContext[
            drafter_pb2.DrafterServiceGetInfoRequest, drafter_pb2.DrafterServiceGetInfoResponse
        ],
    ) -> drafter_pb2.DrafterServiceGetInfoResponse:
        """Describe the drafters and the load."""
        host = self._loaded()
        return drafter_pb2.DrafterServiceGetInfoResponse(
            protocol_version=PROTOCOL_VERSION,
            min_protocol_version=MIN_PROTOCOL_VERSION,
            drafters=[_info(drafter.traits) for drafter in host.drafters.values()],
            max_sessions=host.config.max_sessions,
            num_sessions=host.num_sessions,
            state_links=[
                drafter_pb2.StateLink(
                    verifier_uri=link.verifier_uri,
                    storage=STORAGE_TO_PROTO[link.storage],
                    num_sessions=count,
                    fallback_reason=link.fallback_reason,
                )
                for link, count in (host.reader.links if host.reader else ())
            ],
            load=host.current_load.to_proto(),
        )


def _path_confidence(message: drafter_pb2.DraftRound, sampling: SamplingParams) -> float:
    """Return the least probability of a path in a round. Above temperature 0 there is none: which token the
    shared noise picks says little about how likely the target picks it as well.

    Raises:
        InvalidArgumentError: it is not a probability.
    """
    validate_probability("min_path_confidence", message.min_path_confidence)
    return message.min_path_confidence if sampling.is_greedy else 0.0


def _open_draft(message: drafter_pb2.DraftOpen) -> OpenDraft:
    validate_cache_key("cache_salt", message.cache_salt)
    validate_cache_key("caller_key", message.caller_key)
    return OpenDraft(
        committed_token_ids=tuple(message.committed_token_ids),
        prompt_length=message.prompt_length or len(message.committed_token_ids),
        max_length=message.max_length,
        sampling=SamplingParams.from_proto(message.sampling),
        min_draft_confidence=message.min_draft_confidence,
        caller_key=message.caller_key,
        cache_salt=message.cache_salt,
        vocabulary_fingerprint=message.handshake.vocabulary_fingerprint,
    )


def _timings(drafted: EngineResult[DraftTree], total_ns: int) -> common_pb2.PhaseTimings:
    return common_pb2.PhaseTimings(
        total_ns=total_ns,
        queue_ns=drafted.queue_ns,
        compute_ns=drafted.compute_ns,
        batch_size=drafted.batch_size,
        batch_tokens=drafted.batch_tokens,
        batch_background_tokens=drafted.batch_background_tokens,
    )


def _info(traits: DrafterTraits) -> drafter_pb2.DrafterInfo:
    return drafter_pb2.DrafterInfo(
        name=traits.name,
        family=traits.family,
        model=common_pb2.ModelInfo(
            model_id=traits.model_id,
            vocabulary_fingerprint=traits.vocabulary_fingerprint,
            vocab_size=traits.vocab_size,
            max_length=traits.max_length,
            revision=traits.revision,
            dtype=traits.dtype,
            device=traits.device,
            model_impl=traits.model_impl,
        ),
        max_draft_depth=traits.max_draft_depth,
        default_draft_depth=traits.default_draft_depth,
        target_state_spec=traits.target_state_spec.to_proto() if traits.target_state_spec else None,
        max_draft_nodes=traits.max_draft_nodes,
    )
