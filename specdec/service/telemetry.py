"""What a service reports with: tracer, meter, and spans whose context is passed by hand.

One stream carries many rounds, so the context travels in its messages as a W3C traceparent. Only
OpenTelemetry's API is needed here; where spans and metrics go is the business of `exporters`.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import Meter
from opentelemetry.trace import Link, NoOpTracer, Span, SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from specdec.contract.request_id import REQUEST_ID

if TYPE_CHECKING:
    from specdec.service.prometheus import PrometheusEndpoint

AttributeValue = str | bool | int | float
Attributes = Mapping[str, AttributeValue]

logger = logging.getLogger(__name__)

REQUEST_ID_ATTRIBUTE = "specdec.request_id"
"""Attribute of every span: the request it belongs to."""

SHUTDOWN_S = 0.9
"""Seconds that the last spans and metrics have to reach their collector. The services of a system stop one
after the other, so that a collector that does not answer costs the three of them less than 3 s."""

_propagator = TraceContextTextMapPropagator()


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Where a service reports. Handed to constructors; nothing here is global."""

    tracer: Tracer
    meter: Meter
    tracer_provider: trace.TracerProvider
    meter_provider: metrics.MeterProvider
    prometheus: PrometheusEndpoint | None = None
    """Where metrics can be scraped; None: nowhere."""
    closers: tuple[Callable[[], None], ...] = field(default=(), repr=False)
    """What `shutdown` calls: each sends what is buffered or frees what it holds."""

    def shutdown(self) -> None:
        """Send what is buffered and close the Prometheus endpoint, within SHUTDOWN_S seconds."""
        # Exporters try again for as long as 10 s each, and take no limit for their end that they would keep.
        threads = [threading.Thread(target=close, daemon=True) for close in self.closers]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + SHUTDOWN_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            logger.warning(
                f"The last spans and metrics are lost: no collector took them within {SHUTDOWN_S:g} s. "
                "Check OTEL_EXPORTER_OTLP_ENDPOINT and the collector there."
            )


def traceparent_of(span: Span) -> str:
    """Return the W3C traceparent of a span; it is empty if the span is not recorded anywhere."""
    if not span.get_span_context().is_valid:
        return ""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def context_of(traceparent: str) -> Context:
    """Return a context whose current span is the remote one; it is empty if traceparent is malformed."""
    return _propagator.extract({"traceparent": traceparent}, Context())


def links_to(context: Context) -> list[Link]:
    """Return a link to the current span of a context; none where there is no such span."""
    span_context = trace.get_current_span(context).get_span_context()
    return [Link(span_context)] if span_context.is_valid else []


def trace_id_of(span: Span) -> str:
    """Trace id as 32 hex digits; empty if the span is not traced."""
    context = span.get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def record_span(
    tracer: Tracer,
    name: str,
    parent: Context | str,
    *,
    duration_ns: int,
    attributes: Attributes,
    kind: SpanKind = SpanKind.INTERNAL,
) -> None:
    """Record a span that ends now, after the fact, which is cheaper than a span that is open across awaits.

    The event loop builds the span in its next turn: what the caller does at once, such as sending an answer,
    does not wait for that.

    Args:
        parent: context or traceparent of the parent.
    """
    if isinstance(tracer, NoOpTracer):
        return
    end_ns = time.time_ns()
    attributes = {REQUEST_ID_ATTRIBUTE: REQUEST_ID.get(), **attributes}

    def record() -> None:
        context = context_of(parent) if isinstance(parent, str) else parent
        start_ns = end_ns - duration_ns
        tracer.start_span(name, context, kind, attributes, start_time=start_ns).end(end_ns)

    asyncio.get_running_loop().call_soon(record)
