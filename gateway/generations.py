"""All generations of a gateway, however they are asked for: admitted, run in their turn, and counted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from opentelemetry.context import attach
from opentelemetry.trace import set_span_in_context

from gateway.callers import CallerLimits, require_length
from gateway.config import GatewayConfig
from gateway.metrics import outcome_of
from gateway.place import Place
from gateway.replicas.failover import VerifierLease, is_full
from gateway.replicas.replica import Replica
from gateway.request.answer_times import ExpectedTime
from gateway.request.backends import Backends
from gateway.request.deadlines import at_most, may_begin, timeout_s, turn, verifier_ready
from gateway.request.peers import OTHER_WEIGHTS, Peers, can_run
from gateway.request.plan import Plan, make_plan
from gateway.request.running import RunningRequest
from gateway.rounds.ahead import buffered
from gateway.rounds.tracing import RequestTrace
from gateway.waiting import WaitingQueue
from specdec.contract.errors import ResourceExhaustedError, UnavailableError
from specdec.contract.finish_reasons import FINISH_REASONS
from specdec.contract.methods import PLAIN
from specdec.contract.protocol import MIN_PROTOCOL_VERSION, PROTOCOL_VERSION
from specdec.contract.request_id import REQUEST_ID
from specdec.contract.retry import SOONEST_S, retry_after_s
from specdec.service.auth import CALLER
from specdec.service.telemetry import Telemetry
from specdec.v1 import common_pb2, gateway_pb2, verifier_pb2


class Recipient(Protocol):
    """Who asked for a generation, and gets it."""

    def remaining_s(self) -> float | None:
        """Return the seconds until the deadline; None: there is none."""

    async def send(self, response: gateway_pb2.GenerateResponse) -> None:
        """Hand over a message of the answer, once the one before it was taken.

        Raises:
            DeadlineExceededError: it was not taken in time.
        """


@dataclass
class _Call:
    """One generation and what is known of it so far."""

    request: gateway_pb2.GenerateRequest
    recipient: Recipient
    backends: Backends
    trace: RequestTrace
    arrived_ns: int
    place: Place
    expected: ExpectedTime
    plan: Plan | None = None
    model: common_pb2.ModelInfo | None = None
    """The model that answers; it and the plan are settled at once if a verifier is ready."""
    is_started: bool = False
    """Whether the client was told what answers."""

    @property
    def label(self) -> str:
        """The method as metrics name it; empty: it is not settled yet."""
        return self.backends.label(self.plan.method) if self.plan else ""


class Generations:
    """Runs what clients ask for. The values of the current task say who asks, and what the request is called:
    `CALLER` and `REQUEST_ID`."""

    def __init__(self, config: GatewayConfig, telemetry: Telemetry) -> None:
        self.backends: Backends | None = None
        """What the gateway works with; None: it still loads."""
        self._tracer = telemetry.tracer
        self._running: dict[RunningRequest, str] = {}
        """What runs and is planned, with the name of its caller."""
        self._callers = CallerLimits(self._retry_after_s)
        self._queue = WaitingQueue(
            config.max_requests,
            config.max_waiting,
            max_waiting_bytes=config.max_waiting_bytes,
            refusal=self._queue_is_full,
        )

    @property
    def num_requests(self) -> int:
        """Requests that run; may be read by any thread."""
        return self._queue.num_running

    @property
    def num_waiting(self) -> int:
        """Requests that wait for room; may be read by any thread."""
        return self._queue.num_waiting

    def drain(self) -> None:
        """Send away all requests that wait, and begin none that would have to: clients find another gateway
        sooner than this one gets to them."""
        self._queue.drain(_draining)

    def loaded(self) -> Backends:
        """Return what the gateway works with.

        Raises:
            UnavailableError: it still loads.
        """
        if self.backends is None:
            raise UnavailableError("The gateway is still loading its tokenizer; try again.", retry_after_s=1)
        return self.backends

    async def run(
        self, request: gateway_pb2.GenerateRequest, recipient: Recipient, *, traceparent: str = ""
    ) -> None:
        """Run one generation, in a task of its own, and send its messages as they come.

        Args:
            traceparent: W3C traceparent of the caller; empty: it named none.

        Raises:
            SpecdecError: the request is refused, or its answer broke off.
        """
        arrived_ns = time.monotonic_ns()
        backends = self.loaded()
        trace = RequestTrace(self._tracer, traceparent, is_trusted=backends.config.trust_traceparent)
        # The task has this context to itself; log lines of the request carry its trace id.
        attach(set_span_in_context(trace.span))
        num_bytes = request.ByteSize()
        wanted = request.max_new_tokens if request.HasField("max_new_tokens") else None
        try:
            with ExitStack() as admission:
                with backends.metrics.counting_refusals():
                    require_length(wanted, backends.config.max_output_tokens)
                    # Before the limits count it: a request that is refused does not use them up.
                    self._queue.require_room(_caller_name(), num_bytes)
                    max_new_tokens = admission.enter_context(
                        self._callers.admitted(wanted, backends.config.default_max_new_tokens)
                    )
                    expected = ExpectedTime(backends.answer_times, max_new_tokens)
                    may = may_begin(recipient.remaining_s, expected.longest_s)
                    place = admission.enter_context(self._queue.place(_caller_name(), num_bytes, may))
                call = _Call(request, recipient, backends, trace, arrived_ns, place, expected)
                try:
                    await self._run_in_turn(call)
                finally:
                    trace.waited(place.waited_s)
                    backends.metrics.add_wait(place.waited_s)
        except BaseException as error:
            trace.fail(error)
            raise
        finally:
            trace.span.end()

    def _queue_is_full(self) -> ResourceExhaustedError:
        return ResourceExhaustedError(
            f"The gateway runs {self.num_requests} requests, and {self.num_waiting} wait; try again later.",
            reason="TOO_MANY_REQUESTS",
            retry_after_s=self._retry_after_s(),
        )

    def _retry_after_s(self, caller: str | None = None) -> float:
        """Return when a request of a caller should end, or the first of all requests."""
        return retry_after_s(
            request.progress() for request, owner in self._running.items() if caller in (None, owner)
        )

    async def _run_in_turn(self, call: _Call) -> None:
        """Run a request when its turn has come, and again if the verifiers turn out to have no room."""
        backends = call.backends
        ready = [one.info for one in backends.verifiers.replicas if one.is_ready and one.info]
        if ready:
            # What is wrong with a request is said at once, and not after a wait. Verifiers of an earlier
            # version take no formats, and others may.
            await self._plan(call, max(ready, key=lambda info: info.takes_output_formats))
        while True:
            with backends.metrics.counting_refusals(call.label):
                await turn(
                    call.place,
                    call.recipient.remaining_s,
                    backends.config.max_wait_s,
                    call.expected.longest_s,
                )
                if call.place.has_waited:
                    await verifier_ready(backends.verifiers, backends.config.failover_wait_s)
                # It counts from the pick on: requests that come together must not all take the same replica.
                lease = backends.verifiers.pick(partial(_runs, call), unsuited=OTHER_WEIGHTS).lease()
            try:
                async with at_most(backends.config.max_request_s):
                    return await self._generate(call, lease)
            except ResourceExhaustedError as error:
                if call.place.has_run or not is_full(error):
                    raise
                refusal = error
            finally:
                lease.end()
            call.place.send_back(refusal)

    async def _generate(self, call: _Call, lease: VerifierLease) -> None:
        backends, trace = call.backends, call.trace
        if call.plan is None:
            assert lease.replica.info is not None
            await self._plan(call, lease.replica.info)
        assert call.plan is not None
        assert call.model is not None
        limit_s = timeout_s(call.recipient.remaining_s, backends.config.max_request_s)
        peers = Peers(call.plan, backends, lease, limit_s)
        running = RunningRequest(call.plan, backends, peers, trace, call.place, arrived_ns=call.arrived_ns)
        outcome = "cancelled"
        self._running[running] = _caller_name()
        try:
            # A client that does not read keeps nobody from the room that its request does not take yet.
            async with aclosing(buffered(_responses(call, running))) as responses:
                async for response in responses:
                    await call.recipient.send(response)
            outcome = FINISH_REASONS[response.finished.finish_reason]
        except Exception as error:
            outcome = "" if is_full(error) and not call.place.has_run else outcome_of(error)
            raise
        finally:
            del self._running[running]
            if outcome:
                trace.finish(running.num_output_tokens, running.speculation())
                backends.metrics.add_request(call.model.model_id, running.label, outcome, running.timing())

    async def _plan(self, call: _Call, info: verifier_pb2.VerifierServiceGetInfoResponse) -> None:
        """Settle what the request asks for and what answers it."""
        with call.backends.metrics.counting_refusals():
            call.plan = await make_plan(
                call.request, call.backends, info, max_new_tokens=call.expected.max_new_tokens
            )
        call.expected.num_prompt_tokens = len(call.plan.prompt_token_ids)
        call.model = info.model
        call.trace.describe(info.model.model_id, call.label, len(call.plan.prompt_token_ids))

    async def info(self) -> gateway_pb2.GatewayServiceGetInfoResponse:
        """Return which models, methods and replicas there are.

        Raises:
            UnavailableError: the gateway still loads.
        """
        backends = self.loaded()
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


def _draining() -> UnavailableError:
    return UnavailableError(
        "The gateway is about to stop and begins no more requests; try again, at another gateway if there is "
        "one.",
        reason="DRAINING",
        retry_after_s=SOONEST_S,
    )


def _runs(call: _Call, info: verifier_pb2.VerifierServiceGetInfoResponse) -> bool:
    """Return whether a verifier can answer a call; any will do where nothing is planned yet."""
    return call.plan is None or call.model is None or can_run(call.plan, call.model, info)


async def _responses(call: _Call, running: RunningRequest) -> AsyncGenerator[gateway_pb2.GenerateResponse]:
    """Yield what answers a request, then the answer."""
    plan, model = call.plan, call.model
    assert plan is not None
    assert model is not None
    if not call.is_started:
        call.is_started = True
        yield gateway_pb2.GenerateResponse(
            started=gateway_pb2.GenerateStarted(
                input_tokens=len(plan.prompt_token_ids),
                method=plan.method,
                draft_depth=plan.drafting.size.draft_depth,
                draft_nodes=plan.drafting.draft_nodes,
                trace_id=call.trace.trace_id,
                model_id=model.model_id,
                request_id=REQUEST_ID.get(),
                seed=None if plan.sampling.is_greedy else plan.sampling.seed,
            )
        )
    async with aclosing(running.responses()) as responses:
        async for response in responses:
            yield response


def _caller_name() -> str:
    caller = CALLER.get()
    return caller.name if caller else ""


def _replica_info(replica: Replica[Any], **info: Any) -> gateway_pb2.ReplicaInfo:
    return gateway_pb2.ReplicaInfo(
        uri=replica.uri,
        ready=replica.is_ready,
        num_sessions=replica.num_sessions,
        reason=replica.reason,
        **info,
    )
