"""The gateway's gRPC edge."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import Any

import grpc
from opentelemetry.context import attach
from opentelemetry.trace import set_span_in_context

from gateway.callers import CallerLimits
from gateway.metrics import outcome_of
from gateway.replicas.failover import VerifierLease
from gateway.replicas.replica import Replica
from gateway.request.backends import Backends
from gateway.request.peers import Peers
from gateway.request.plan import make_plan
from gateway.request.running import RunningRequest
from gateway.rounds.ahead import buffered
from gateway.rounds.tracing import RequestTrace
from specdec.contract.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from specdec.contract.finish_reasons import FINISH_REASONS
from specdec.contract.methods import PLAIN
from specdec.contract.protocol import MIN_PROTOCOL_VERSION, PROTOCOL_VERSION
from specdec.contract.request_id import REQUEST_ID
from specdec.service.auth import CALLER
from specdec.service.retry import retry_after_s
from specdec.service.sessions import remaining_timeout_s, send
from specdec.service.telemetry import Telemetry
from specdec.v1 import gateway_pb2, gateway_pb2_grpc

SERVICE_NAME = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name

GenerateContext = grpc.aio.ServicerContext[gateway_pb2.GenerateRequest, gateway_pb2.GenerateResponse]


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    """Answers clients."""

    def __init__(self, telemetry: Telemetry) -> None:
        self.backends: Backends | None = None
        self._tracer = telemetry.tracer
        self.num_requests = 0
        """Requests under way."""
        self._running: dict[RunningRequest, str] = {}
        """What has been admitted and planned, with the name of its caller."""
        self._callers = CallerLimits(self._retry_after_s)

    def _loaded(self) -> Backends:
        if self.backends is None:
            raise UnavailableError("The gateway is still loading its tokenizer; try again.", retry_after_s=1)
        return self.backends

    async def Generate(  # noqa: N802
        self, request: gateway_pb2.GenerateRequest, context: GenerateContext
    ) -> None:
        """Run one generation and stream its text."""
        arrived_ns = time.monotonic_ns()
        backends = self._loaded()
        metadata = dict(context.invocation_metadata() or ())
        trace = RequestTrace(
            self._tracer,
            str(metadata.get("traceparent", "")),
            is_trusted=backends.config.trust_traceparent,
        )
        # The call's task has this context to itself; log lines of the request carry its trace id.
        attach(set_span_in_context(trace.span))
        self.num_requests += 1
        admission = ExitStack()
        wanted = request.max_new_tokens if request.HasField("max_new_tokens") else None
        try:
            with backends.metrics.counting_refusals():
                _require_length(wanted, backends.config.max_output_tokens)
                self._require_room(backends)
                max_new_tokens = admission.enter_context(
                    self._callers.admitted(wanted, backends.config.default_max_new_tokens)
                )
                # It counts from the pick on: requests that come together must not all take the same replica.
                lease = backends.verifiers.pick().lease()
            admission.callback(lease.end)
            async with _at_most(backends.config.max_request_s):
                await self._generate(request, context, backends, lease, trace, arrived_ns, max_new_tokens)
        except BaseException as error:
            trace.fail(error)
            raise
        finally:
            admission.close()
            self.num_requests -= 1
            trace.span.end()

    def _require_room(self, backends: Backends) -> None:
        if self.num_requests > backends.config.max_requests:
            raise ResourceExhaustedError(
                f"The gateway runs {backends.config.max_requests} requests already; try again later.",
                reason="TOO_MANY_REQUESTS",
                retry_after_s=self._retry_after_s(),
            )

    def _retry_after_s(self, caller: str | None = None) -> float:
        """Return when a request of a caller should end, or the first of all requests."""
        return retry_after_s(
            request.progress() for request, owner in self._running.items() if caller in (None, owner)
        )

    async def _generate(
        self,
        request: gateway_pb2.GenerateRequest,
        context: GenerateContext,
        backends: Backends,
        lease: VerifierLease,
        trace: RequestTrace,
        arrived_ns: int,
        max_new_tokens: int,
    ) -> None:
        verifier = lease.replica
        assert verifier.info is not None
        with backends.metrics.counting_refusals():
            plan = await make_plan(request, backends, verifier.info, max_new_tokens=max_new_tokens)
        model_id = verifier.info.model.model_id
        trace.describe(model_id, backends.label(plan.method), len(plan.prompt_token_ids))
        started = gateway_pb2.GenerateStarted(
            input_tokens=len(plan.prompt_token_ids),
            method=plan.method,
            draft_depth=plan.drafting.size.draft_depth,
            draft_nodes=plan.drafting.draft_nodes,
            trace_id=trace.trace_id,
            model_id=model_id,
            request_id=REQUEST_ID.get(),
            seed=None if plan.sampling.is_greedy else plan.sampling.seed,
        )
        await send(context, gateway_pb2.GenerateResponse(started=started))
        peers = Peers(plan, backends, lease, _timeout_s(context, backends.config.max_request_s))
        running = RunningRequest(plan, backends, peers, trace, arrived_ns=arrived_ns)
        outcome = "cancelled"
        self._running[running] = _caller_name()
        try:
            async with aclosing(buffered(running.responses())) as responses:
                async for response in responses:
                    await send(context, response)
            outcome = FINISH_REASONS[response.finished.finish_reason]
        except Exception as error:
            outcome = outcome_of(error)
            raise
        finally:
            del self._running[running]
            trace.finish(running.num_output_tokens, running.speculation())
            backends.metrics.add_request(model_id, running.label, outcome, running.timing())

    async def GetInfo(  # noqa: N802
        self,
        request: gateway_pb2.GatewayServiceGetInfoRequest,
        context: grpc.aio.ServicerContext[
            gateway_pb2.GatewayServiceGetInfoRequest, gateway_pb2.GatewayServiceGetInfoResponse
        ],
    ) -> gateway_pb2.GatewayServiceGetInfoResponse:
        """Tell which models, methods and replicas there are."""
        backends = self._loaded()
        await asyncio.gather(backends.verifiers.refresh(), backends.drafters.refresh())
        known = backends.verifiers.known_infos
        default = backends.default_method
        return gateway_pb2.GatewayServiceGetInfoResponse(
            protocol_version=PROTOCOL_VERSION,
            min_protocol_version=MIN_PROTOCOL_VERSION,
            model=known[0].model if known else None,
            methods=backends.methods,
            default_method=default if backends.offers(default) else PLAIN,
            default_max_new_tokens=backends.config.default_max_new_tokens,
            verifiers=[_replica_info(r, verifier=r.info) for r in backends.verifiers.replicas],
            drafters=[_replica_info(r, drafter=r.info) for r in backends.drafters.replicas],
        )


def _caller_name() -> str:
    caller = CALLER.get()
    return caller.name if caller else ""


def _require_length(max_new_tokens: int | None, most: int) -> None:
    """Refuse an answer that is longer than any may be.

    Raises:
        InvalidArgumentError: it is.
    """
    if max_new_tokens is not None and max_new_tokens > most:
        raise InvalidArgumentError(
            f"max_new_tokens is {max_new_tokens}; an answer of this gateway has at most {most} tokens.",
            field="max_new_tokens",
        )


@asynccontextmanager
async def _at_most(seconds: float) -> AsyncIterator[None]:
    """Limit the time of a request, whatever its client does.

    Raises:
        DeadlineExceededError: the time is over.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise DeadlineExceededError(
            f"The request took longer than {seconds:g} s, which is the most this gateway gives one; ask for "
            "fewer tokens, and read them as they come.",
            reason="REQUEST_TOO_LONG",
        ) from None


def _timeout_s(context: GenerateContext, most: float) -> float:
    """Return the seconds that the services have: until the caller's deadline, or the gateway's own."""
    remaining = remaining_timeout_s(context)
    return most if remaining is None else min(remaining, most)


def _replica_info(replica: Replica[Any], **info: Any) -> gateway_pb2.ReplicaInfo:
    return gateway_pb2.ReplicaInfo(
        uri=replica.uri,
        ready=replica.is_ready,
        num_sessions=replica.num_sessions,
        reason=replica.reason,
        **info,
    )
