"""Spans of one request: the request, its rounds, and the transport within each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from gateway.rounds.stats import SpeculationStats
from gateway.rounds.vocabulary import PLAIN_SIZE, DraftSize, Round
from specdec.contract.errors import kind_of
from specdec.contract.request_id import REQUEST_ID
from specdec.service.telemetry import (
    REQUEST_ID_ATTRIBUTE,
    context_of,
    links_to,
    record_span,
    trace_id_of,
    traceparent_of,
)


class RoundSpan:
    """An open span, the parent of the services' own spans."""

    def __init__(self, tracer: Tracer, name: str, parent: Context) -> None:
        self._tracer = tracer
        self.span: Span = tracer.start_span(
            name, context=parent, attributes={REQUEST_ID_ATTRIBUTE: REQUEST_ID.get()}
        )
        self.traceparent = traceparent_of(self.span)
        """The span's context as the round's messages carry it; empty if the request is not traced."""

    def describe(self, completed: Round, size: DraftSize = PLAIN_SIZE) -> None:
        """Record what the round was to draft, what it did, and the time it spent on the wire."""
        if not self.span.is_recording():
            return
        draft, verified = completed.draft, completed.verified
        self.span.set_attributes(
            {
                "specdec.num_draft_tokens": len(draft.token_ids),
                "specdec.draft_depth": size.draft_depth,
                "specdec.draft_nodes": size.draft_nodes,
                "specdec.num_accepted_tokens": verified.num_accepted_tokens,
                "specdec.fallback_code": draft.fallback_code if draft.fallback_reason else "",
                "specdec.is_reopened": verified.is_reopened,
            }
        )
        waits_ns = {
            f"specdec.transport.{peer}_ns": answer.elapsed_ns - answer.server_ns
            for peer, answer in (("drafter", draft), ("verifier", verified))
            if answer.elapsed_ns > answer.server_ns
        }
        if waits_ns:
            record_span(
                self._tracer,
                "specdec.transport",
                set_span_in_context(self.span),
                duration_ns=sum(waits_ns.values()),
                attributes=waits_ns,
            )


class RequestTrace:
    """The span of one request, and its children.

    Args:
        traceparent: span of the caller; empty or malformed: it has none.
        is_trusted: the request belongs to the caller's trace, which also says whether it is recorded.
            Otherwise it has a trace of its own with a link to the caller's span: whoever knows the id of a
            trace could write into it, and whoever asks not to be recorded would not be.
    """

    def __init__(self, tracer: Tracer, traceparent: str, *, is_trusted: bool = False) -> None:
        self._tracer = tracer
        caller = context_of(traceparent)
        self.span: Span = tracer.start_span(
            "specdec.generate",
            context=caller if is_trusted else Context(),
            links=() if is_trusted else links_to(caller),
            kind=SpanKind.SERVER,
            attributes={REQUEST_ID_ATTRIBUTE: REQUEST_ID.get()},
        )
        self._context = set_span_in_context(self.span)
        self._num_preemptions = 0

    @property
    def trace_id(self) -> str:
        """Id of the request's trace, 32 hex digits; empty if it is not traced."""
        return trace_id_of(self.span)

    def describe(self, model_id: str, method: str, num_input_tokens: int) -> None:
        """Record what was asked for, under OpenTelemetry's GenAI names where there are any."""
        self.span.set_attributes(
            {
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": "specdec",
                "gen_ai.request.model": model_id,
                "gen_ai.usage.input_tokens": num_input_tokens,
                "specdec.method": method,
            }
        )

    def waited(self, waited_s: float) -> None:
        """Record how long the request waited for room, in all."""
        self.span.set_attribute("specdec.waiting_ns", int(waited_s * 1e9))

    def preempted(self, num_output_tokens: int) -> None:
        """Record that a verifier needed the request's room, after so many tokens."""
        self._num_preemptions += 1
        self.span.set_attribute("specdec.num_preemptions", self._num_preemptions)
        self.span.add_event("specdec.preempted", {"gen_ai.usage.output_tokens": num_output_tokens})

    def finish(self, num_output_tokens: int, speculation: SpeculationStats) -> None:
        """Record what came out, be it only up to an error or a cancellation."""
        self.span.set_attributes(
            {
                "gen_ai.usage.output_tokens": num_output_tokens,
                "specdec.num_rounds": speculation.num_rounds,
                "specdec.num_draft_tokens": speculation.num_draft_tokens,
                "specdec.num_accepted_tokens": speculation.num_accepted_tokens,
                "specdec.num_fallback_rounds": speculation.num_fallback_rounds,
                "specdec.num_draft_tokens_per_position": speculation.num_draft_tokens_per_position,
                "specdec.num_accepted_tokens_per_position": speculation.num_accepted_tokens_per_position,
            }
        )

    def prefill(self) -> AbstractContextManager[RoundSpan]:
        """Record a span around the opening of the sessions."""
        return self._child("specdec.prefill")

    def round(self) -> AbstractContextManager[RoundSpan]:
        """Record a span around one draft and one verify."""
        return self._child("specdec.round")

    def fail(self, error: BaseException) -> None:
        """Mark the request as failed."""
        _fail(self.span, error)

    @contextmanager
    def _child(self, name: str) -> Iterator[RoundSpan]:
        child = RoundSpan(self._tracer, name, self._context)
        try:
            yield child
        except BaseException as error:
            _fail(child.span, error)
            raise
        finally:
            child.span.end()


def _fail(span: Span, error: BaseException) -> None:
    span.set_attribute("error.type", kind_of(error))
    span.set_status(Status(StatusCode.ERROR, kind_of(error)))
