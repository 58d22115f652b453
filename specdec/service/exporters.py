"""Where traces and metrics of a service go: OTLP and Prometheus, by OpenTelemetry's standard variables.

Without an OTLP endpoint in the environment, or a Prometheus endpoint asked for on the command line, nothing
is exported and spans and metrics cost next to nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from opentelemetry import metrics, trace
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NoOpTracerProvider

from specdec.contract.errors import InvalidArgumentError
from specdec.service.telemetry import Telemetry

if TYPE_CHECKING:
    from specdec.service.prometheus import PrometheusEndpoint

_SCOPE = "specdec"


def make_telemetry(
    service_name: str,
    *,
    span_processor: SpanProcessor | None = None,
    metric_reader: MetricReader | None = None,
    metrics_listen: str = "",
) -> Telemetry:
    """Make telemetry with the given sinks; without one, spans or metrics go nowhere.

    Args:
        metrics_listen: host:port of a Prometheus endpoint, besides the reader; empty: none.

    Raises:
        InvalidArgumentError: the Prometheus endpoint cannot listen there.
    """
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", service_name)})
    closers: list[Callable[[], None]] = []
    tracer_provider: trace.TracerProvider = NoOpTracerProvider()
    if span_processor:
        tracer_provider = sdk_tracer_provider = TracerProvider(resource=resource)
        sdk_tracer_provider.add_span_processor(span_processor)
        closers.append(sdk_tracer_provider.shutdown)
    endpoint = _prometheus_endpoint(metrics_listen) if metrics_listen else None
    readers = [reader for reader in (metric_reader, endpoint and endpoint.reader) if reader]
    meter_provider: metrics.MeterProvider = NoOpMeterProvider()
    if readers:
        meter_provider = sdk_meter_provider = MeterProvider(readers, resource=resource)
        closers.append(sdk_meter_provider.shutdown)
    if endpoint:
        closers.append(endpoint.close)
    return Telemetry(
        tracer_provider.get_tracer(_SCOPE),
        meter_provider.get_meter(_SCOPE),
        tracer_provider,
        meter_provider,
        endpoint,
        tuple(closers),
    )


def telemetry_from_environment(service_name: str, metrics_listen: str = "") -> Telemetry:
    """Make telemetry as OTEL_EXPORTER_OTLP_ENDPOINT and its relatives ask for; it is off when they are unset.

    Args:
        metrics_listen: host:port of a Prometheus endpoint besides; empty: none.

    Raises:
        InvalidArgumentError: the Prometheus endpoint cannot listen there, the SDK is disabled, or the
            environment asks for a protocol other than gRPC.
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
    if not any(os.environ.get(name) for name in names):
        return False
    _require_grpc(signal)
    return True


def _require_grpc(signal: str) -> None:
    """Refuse another protocol: what is sent by gRPC to a port of HTTP is lost."""
    # The signal's own variable comes before that of all signals.
    names = (f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    name = next((name for name in names if os.environ.get(name)), "")
    protocol = os.environ.get(name, "grpc")
    if protocol.lower() != "grpc":
        raise InvalidArgumentError(
            f"{name} is {protocol!r}, but telemetry is exported by gRPC only. Set it to grpc, and "
            "OTEL_EXPORTER_OTLP_ENDPOINT to the collector's port for gRPC, which is usually 4317.",
            field=name,
            reason="UNSUPPORTED_OTLP_PROTOCOL",
        )


def _otlp_span_processor() -> SpanProcessor:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return BatchSpanProcessor(OTLPSpanExporter())


def _otlp_metric_reader() -> MetricReader:
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

    return PeriodicExportingMetricReader(OTLPMetricExporter())
