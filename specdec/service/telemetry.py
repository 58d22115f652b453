"""Traces, metrics and logs of a service, by OpenTelemetry's standard environment variables.

Without an OTLP endpoint in the environment, or a Prometheus endpoint asked for on the command line, nothing
is exported and spans and metrics cost next to nothing. Contexts are passed by hand: one stream carries many
rounds, so the context travels in its messages as a W3C traceparent.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opentelemetry import metrics, trace
from opentelemetry.context import Context
from opentelemetry.metrics import Meter, NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NoOpTracerProvider, Span, SpanKind, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from pythonjsonlogger.json import JsonFormatter

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.request_id import REQUEST_ID

if TYPE_CHECKING:
    from specdec.service.prometheus import PrometheusEndpoint

AttributeValue = str | bool | int | float
Attributes = Mapping[str, AttributeValue]

_SCOPE = "specdec"
REQUEST_ID_ATTRIBUTE = "specdec.request_id"
"""Attribute of every span: the request it belongs to."""
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

    def shutdown(self) -> None:
        """Send what is buffered, then close the Prometheus endpoint."""
        for provider in (self.tracer_provider, self.meter_provider):
            if isinstance(provider, TracerProvider | MeterProvider):
                provider.shutdown()
        if self.prometheus:
            self.prometheus.close()


def make_telemetry(
    service_name: str,
    *,
    span_processor: SpanProcessor | None = None,
    metric_reader: MetricReader | None = None,
    metrics_listen: str = "",
) -> Telemetry:
    """Telemetry with the given sinks; without one, spans or metrics go nowhere.

    Args:
        metrics_listen: host:port of a Prometheus endpoint, besides the reader; empty: none.

    Raises:
        InvalidArgumentError: the Prometheus endpoint cannot listen there.
    """
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", service_name)})
    tracer_provider: trace.TracerProvider = NoOpTracerProvider()
    if span_processor:
        sdk_tracer_provider = TracerProvider(resource=resource)
        sdk_tracer_provider.add_span_processor(span_processor)
        tracer_provider = sdk_tracer_provider
    readers = [metric_reader] if metric_reader else []
    endpoint = _prometheus_endpoint(metrics_listen) if metrics_listen else None
    if endpoint:
        readers.append(endpoint.reader)
    meter_provider: metrics.MeterProvider = NoOpMeterProvider()
    if readers:
        meter_provider = MeterProvider(readers, resource=resource)
    return Telemetry(
        tracer_provider.get_tracer(_SCOPE),
        meter_provider.get_meter(_SCOPE),
        tracer_provider,
        meter_provider,
        endpoint,
    )


def telemetry_from_environment(service_name: str, metrics_listen: str = "") -> Telemetry:
    """Telemetry as OTEL_EXPORTER_OTLP_ENDPOINT and its relatives ask for; off when they are unset.

    Args:
        metrics_listen: host:port of a Prometheus endpoint besides; empty: none.

    Raises:
        InvalidArgumentError: the Prometheus endpoint cannot listen there, or the SDK is disabled.
    """
    if metrics_listen and _is_disabled():
        raise InvalidArgumentError(
            "--metrics-listen asks for metrics and OTEL_SDK_DISABLED for none; drop one of the two.",
            field="metrics_listen",
        )
    return make_telemetry(
        service_name,
        span_processor=_otlp_span_processor() if _endpoint_is_set("TRACES") else None,
        metric_reader=_otlp_metric_reader() if _endpoint_is_set("METRICS") else None,
        metrics_listen=metrics_listen,
    )


def _prometheus_endpoint(listen: str) -> PrometheusEndpoint:
    from specdec.service.prometheus import PrometheusEndpoint

    return PrometheusEndpoint(listen)


def _is_disabled() -> bool:
    return os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"


def _endpoint_is_set(signal: str) -> bool:
    if _is_disabled():
        return False
    if os.environ.get(f"OTEL_{signal}_EXPORTER", "otlp") != "otlp":
        return False
    names = ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    return any(os.environ.get(name) for name in names)


def _otlp_span_processor() -> SpanProcessor:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return BatchSpanProcessor(OTLPSpanExporter())


def _otlp_metric_reader() -> MetricReader:
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

    return PeriodicExportingMetricReader(OTLPMetricExporter())


def traceparent_of(span: Span) -> str:
    """W3C traceparent of a span; empty if it is not recorded anywhere."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def context_of(traceparent: str) -> Context:
    """Context whose current span is the remote one; a malformed traceparent gives an empty context."""
    return _propagator.extract({"traceparent": traceparent}, Context())


def trace_id_of(span: Span) -> str:
    """Trace id as 32 hex digits; empty if the span is not traced."""
    context = span.get_span_context()
    return trace.format_trace_id(context.trace_id) if context.is_valid else ""


def record_span(
    tracer: Tracer,
    name: str,
    parent: Context,
    *,
    duration_ns: int,
    attributes: Attributes,
    kind: SpanKind = SpanKind.INTERNAL,
) -> None:
    """Record a span that ends now, after the fact: cheaper than one kept open across awaits."""
    end_ns = time.time_ns()
    attributes = {REQUEST_ID_ATTRIBUTE: REQUEST_ID.get(), **attributes}
    span = tracer.start_span(
        name, context=parent, kind=kind, attributes=attributes, start_time=end_ns - duration_ns
    )
    span.end(end_ns)


class _RequestFilter(logging.Filter):
    """Adds the current request's id, and its trace and span id, to log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        if request_id := REQUEST_ID.get():
            record.request_id = request_id
        context = trace.get_current_span().get_span_context()
        if context.is_valid:
            record.trace_id = trace.format_trace_id(context.trace_id)
            record.span_id = trace.format_span_id(context.span_id)
        return True


def setup_logging(service_name: str, level: str = "INFO") -> None:
    """One JSON object per line on stderr, with trace ids where there is a trace."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            "{asctime}{levelname}{name}{message}",
            style="{",
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
            static_fields={"service": service_name},
        )
    )
    handler.addFilter(_RequestFilter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    quiet_grpc()


def quiet_grpc() -> None:
    """No debug records from gRPC's core: at that level it logs a server that is being freed, and the
    record, with the server in it, is freed a second time: the process dies."""
    logging.getLogger("grpc._cython").setLevel(logging.INFO)
