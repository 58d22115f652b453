"""What a request leaves behind: a tree of spans over three services, counters, logs, and OTLP exports."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, format_trace_id

from gateway.request.text import TextCodec
from specdec.client import AsyncClient, GenerateOptions, Generation
from specdec.contract.errors import InternalError, InvalidArgumentError
from specdec.contract.target_state import TargetStateSpec
from specdec.service.exporters import make_telemetry, telemetry_from_environment
from specdec.service.telemetry import Telemetry
from specdec.transport.channel import aio_channel
from specdec.v1 import gateway_pb2, gateway_pb2_grpc
from tests.integration.gated_drafter import eventually, gated_system
from tests.state_probe import StateProbe
from tests.systems import running_drafter, running_gateway, running_system, running_verifier
from tests.tiny_models import VOCAB_SIZE
from tests.unit.test_stats import points, sums

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
REFUSED = GenerateOptions(stop_token_ids=(VOCAB_SIZE,))
"""Something only the verifier can refuse."""
CLOCK_SKEW_NS = 1_000_000
"""Ends are read from the wall clock, durations from the monotonic one; they may drift apart this much."""


class Recorded:
    """Finished spans of all services."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.telemetry = make_telemetry("test", span_processor=SimpleSpanProcessor(self._exporter))

    @property
    def spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    def forget(self) -> None:
        """Drop the spans so far."""
        self._exporter.clear()

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def children(self, parent: ReadableSpan, name: str = "") -> list[ReadableSpan]:
        return [
            span
            for span in self.spans
            if span.parent and span.parent.span_id == context(parent).span_id and name in ("", span.name)
        ]

    async def request(self) -> ReadableSpan:
        """Return the span of the only request; it ends a little after the client has its answer."""
        await eventually(lambda: bool(self.named("specdec.generate")))
        (span,) = self.named("specdec.generate")
        return span


def context(span: ReadableSpan) -> Any:
    assert span.context is not None
    return span.context


def attribute(span: ReadableSpan, name: str) -> Any:
    assert span.attributes is not None
    return span.attributes[name]


def duration_ns(span: ReadableSpan) -> int:
    assert span.start_time is not None
    assert span.end_time is not None
    return span.end_time - span.start_time


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@asynccontextmanager
async def traced_generation(
    recorded: Recorded, model: Path, drafter: str, **options: Any
) -> AsyncIterator[tuple[Generation, ReadableSpan]]:
    """Run one generation; yield it and its request span."""
    async with running_system(model, drafter, telemetry=recorded.telemetry) as system:
        result = await system.client.generate(PROMPT, GenerateOptions(ignore_eos=True, **options))
        yield result, await recorded.request()


class TestSpanTree:
    async def test_every_round_of_a_request_is_a_complete_tree(
        self, recorded: Recorded, tiny_llama: Path, noisy_llama: Path
    ) -> None:
        options = {"method": "noisy", "draft_depth": 3, "max_new_tokens": 32}
        async with traced_generation(recorded, tiny_llama, f"noisy=causal-lm:{noisy_llama}", **options) as (
            result,
            request,
        ):
            speculation = result.speculation
            assert 0 < speculation.num_accepted_tokens < speculation.num_draft_tokens
            assert request.parent is None
            assert request.kind is SpanKind.SERVER
            assert {format_trace_id(context(span).trace_id) for span in recorded.spans} == {result.trace_id}

            prefill, *rounds = recorded.children(request)
            assert prefill.name == "specdec.prefill"
            assert [span.name for span in rounds] == ["specdec.round"] * speculation.num_rounds
            assert Counter(span.name for span in recorded.children(prefill)) == {
                "specdec.verify": 1,
                "specdec.transport": 1,
            }
            for round_span in rounds:
                is_drafted = attribute(round_span, "specdec.num_draft_tokens") > 0
                assert Counter(span.name for span in recorded.children(round_span)) == {
                    "specdec.verify": 1,
                    "specdec.transport": 1,
                    **({"specdec.draft": 1} if is_drafted else {}),
                }
            accounted = 2 + len(rounds) + sum(len(recorded.children(parent)) for parent in [prefill, *rounds])
            assert len(recorded.spans) == accounted

    async def test_no_round_runs_past_a_stop_string(self, recorded: Recorded, tiny_llama: Path) -> None:
        async with running_system(tiny_llama, "ngram", telemetry=recorded.telemetry) as system:
            options = {"method": "ngram", "draft_depth": 1, "ignore_eos": True, "max_new_tokens": 32}
            whole = await system.client.generate(PROMPT, GenerateOptions(**options))
            await recorded.request()
            recorded.forget()
            middle = len(whole.text) // 2
            stop = whole.text[middle : middle + 2]
            result = await system.client.generate(PROMPT, GenerateOptions(**options, stop=(stop,)))
            assert result.finish_reason == "stop_string"
            assert 0 < result.speculation.num_rounds < whole.speculation.num_rounds
            rounds = [
                span for span in recorded.children(await recorded.request()) if span.name == "specdec.round"
            ]
            assert len(rounds) == result.speculation.num_rounds
            assert all(span.status.is_ok for span in rounds)

    async def test_attributes_agree_with_the_answer(
        self, recorded: Recorded, tiny_llama: Path, noisy_llama: Path
    ) -> None:
        options = {"method": "noisy", "draft_depth": 3, "max_new_tokens": 32}
        async with traced_generation(recorded, tiny_llama, f"noisy=causal-lm:{noisy_llama}", **options) as (
            result,
            request,
        ):
            speculation = result.speculation
            assert request.attributes == {
                "specdec.waiting_ns": pytest.approx(result.timing.waiting_ms * 1e6),
                "gen_ai.operation.name": "chat",
                "gen_ai.provider.name": "specdec",
                "gen_ai.request.model": tiny_llama.name,
                "gen_ai.usage.input_tokens": len(PROMPT),
                "gen_ai.usage.output_tokens": 32,
                "specdec.method": "noisy",
                "specdec.request_id": result.request_id,
                "specdec.num_rounds": speculation.num_rounds,
                "specdec.num_draft_tokens": speculation.num_draft_tokens,
                "specdec.num_accepted_tokens": speculation.num_accepted_tokens,
                "specdec.num_fallback_rounds": 0,
                "specdec.num_draft_tokens_per_position": speculation.num_draft_tokens_per_position,
                "specdec.num_accepted_tokens_per_position": speculation.num_accepted_tokens_per_position,
            }
            rounds = recorded.named("specdec.round")
            for name in ("num_draft_tokens", "num_accepted_tokens"):
                total = sum(attribute(round_span, f"specdec.{name}") for round_span in rounds)
                assert total == getattr(speculation, name)
            committed = len(PROMPT) + 1
            for round_span in rounds:
                (verify,) = recorded.children(round_span, "specdec.verify")
                assert verify.kind is SpanKind.SERVER
                for name in ("specdec.num_draft_tokens", "specdec.num_accepted_tokens"):
                    assert attribute(verify, name) == attribute(round_span, name)
                committed += attribute(round_span, "specdec.num_accepted_tokens") + 1
                assert attribute(verify, "specdec.committed_length") == committed
                for draft in recorded.children(round_span, "specdec.draft"):
                    assert draft.kind is SpanKind.SERVER
                    assert attribute(draft, "specdec.method") == "noisy"
                    assert attribute(draft, "specdec.num_draft_tokens") == attribute(
                        round_span, "specdec.num_draft_tokens"
                    )
            for span in recorded.named("specdec.verify") + recorded.named("specdec.draft"):
                assert attribute(span, "specdec.batch_size") == 1
                phases_ns = attribute(span, "specdec.queue_ns") + attribute(span, "specdec.compute_ns")
                assert 0 < phases_ns <= duration_ns(span)

    async def test_every_span_lies_within_its_parent(self, recorded: Recorded, tiny_llama: Path) -> None:
        async with traced_generation(recorded, tiny_llama, "ngram", method="ngram", max_new_tokens=20) as (
            result,
            _,
        ):
            by_id = {context(span).span_id: span for span in recorded.spans}
            nested = [span for span in recorded.spans if span.parent]
            assert len(nested) == len(recorded.spans) - 1
            for span in nested:
                assert span.parent
                parent = by_id[span.parent.span_id]
                assert span.start_time
                assert span.end_time
                assert parent.start_time
                assert parent.end_time
                assert parent.start_time - CLOCK_SKEW_NS <= span.start_time <= span.end_time
                assert span.end_time <= parent.end_time + CLOCK_SKEW_NS
            transport_ns = sum(
                duration_ns(span)
                for round_span in recorded.named("specdec.round")
                for span in recorded.children(round_span, "specdec.transport")
            )
            assert transport_ns / 1e6 == pytest.approx(result.speculation.transport_ms)

    async def test_transport_says_how_much_of_it_was_to_whom(
        self, recorded: Recorded, tiny_llama: Path
    ) -> None:
        async with traced_generation(recorded, tiny_llama, "ngram", method="ngram", max_new_tokens=8) as (
            _,
            request,
        ):
            first_round = recorded.children(request, "specdec.round")[0]
            for parent, peers in (
                (recorded.named("specdec.prefill")[0], {"specdec.transport.verifier_ns"}),
                (first_round, {"specdec.transport.drafter_ns", "specdec.transport.verifier_ns"}),
            ):
                (transport,) = recorded.children(parent, "specdec.transport")
                assert set(transport.attributes or ()) == {*peers, "specdec.request_id"}
                assert sum(attribute(transport, peer) for peer in peers) == duration_ns(transport)


class TestTraceContext:
    async def test_the_span_of_a_trusted_client_is_the_parent(
        self, recorded: Recorded, tiny_llama: Path
    ) -> None:
        async with running_system(
            tiny_llama, telemetry=recorded.telemetry, gateway_options={"trust_traceparent": True}
        ) as system:
            with recorded.telemetry.tracer.start_as_current_span("client") as client_span:
                result = await system.client.generate(PROMPT, GenerateOptions(max_new_tokens=4))
            request = await recorded.request()
            assert request.parent
            assert request.parent.span_id == client_span.get_span_context().span_id
            assert result.trace_id == format_trace_id(client_span.get_span_context().trace_id)

    @pytest.mark.parametrize("flags", ["00", "01"])
    async def test_a_stranger_neither_joins_a_trace_nor_ends_recording(
        self, flags: str, recorded: Recorded, tiny_llama: Path
    ) -> None:
        trace_id, span_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
        async with (
            running_system(tiny_llama, telemetry=recorded.telemetry) as system,
            aio_channel(system.address) as channel,
        ):
            message = gateway_pb2.GenerateRequest(text="abc", max_new_tokens=4)
            call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate(
                message, metadata=(("traceparent", f"00-{trace_id}-{span_id}-{flags}"),)
            )
            started, *_ = [response.started async for response in call]
            request = await recorded.request()
        assert request.parent is None
        assert started.trace_id == format_trace_id(context(request).trace_id) != trace_id
        (link,) = request.links
        assert (link.context.trace_id, link.context.span_id) == (int(trace_id, 16), int(span_id, 16))
        assert {format_trace_id(context(span).trace_id) for span in recorded.spans} == {started.trace_id}
        assert {"specdec.verify", "specdec.round"} <= {span.name for span in recorded.spans}

    async def test_a_malformed_traceparent_starts_a_new_trace(
        self, recorded: Recorded, tiny_llama: Path
    ) -> None:
        async with (
            running_system(tiny_llama, telemetry=recorded.telemetry) as system,
            aio_channel(system.address) as channel,
        ):
            message = gateway_pb2.GenerateRequest(text="abc", max_new_tokens=2)
            call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate(
                message, metadata=(("traceparent", "00-not-a-trace"),)
            )
            started, *_ = [response.started async for response in call]
            request = await recorded.request()
            assert request.parent is None
            assert started.trace_id == format_trace_id(context(request).trace_id)

    async def test_without_telemetry_there_is_no_trace(self, recorded: Recorded, tiny_llama: Path) -> None:
        async with running_system(tiny_llama) as system:
            with recorded.telemetry.tracer.start_as_current_span("client"):
                result = await system.client.generate(PROMPT, GenerateOptions(max_new_tokens=4))
            assert result.trace_id == ""

    async def test_concurrent_requests_do_not_mix(self, recorded: Recorded, tiny_llama: Path) -> None:
        async with running_system(tiny_llama, telemetry=recorded.telemetry) as system:
            options = GenerateOptions(draft_depth=4, max_new_tokens=10, ignore_eos=True)
            results = await asyncio.gather(*(system.client.generate(PROMPT, options) for _ in range(3)))
            await eventually(lambda: len(recorded.named("specdec.generate")) == 3)
            assert len({result.trace_id for result in results}) == 3
            for result in results:
                (request,) = (
                    span
                    for span in recorded.named("specdec.generate")
                    if format_trace_id(context(span).trace_id) == result.trace_id
                )
                rounds = recorded.children(request, "specdec.round")
                assert len(rounds) == result.speculation.num_rounds
                for round_span in rounds:
                    (verify,) = recorded.children(round_span, "specdec.verify")
                    assert context(verify).trace_id == context(request).trace_id


class TestUnhappyEnds:
    async def test_a_failed_request_is_an_error(self, recorded: Recorded, tiny_llama: Path) -> None:
        async with running_system(tiny_llama, telemetry=recorded.telemetry) as system:
            with pytest.raises(InvalidArgumentError) as caught:
                await system.client.generate(PROMPT, REFUSED)
            request = await recorded.request()
            assert request.status.status_code is StatusCode.ERROR
            assert request.status.description == caught.value.reason
            assert request.attributes
            assert request.attributes["error.type"] == caught.value.reason
            (prefill,) = recorded.children(request)
            assert prefill.status.status_code is StatusCode.ERROR

    async def test_a_good_request_is_none(self, recorded: Recorded, tiny_llama: Path) -> None:
        async with traced_generation(recorded, tiny_llama, "ngram", max_new_tokens=4):
            assert all(span.status.is_ok for span in recorded.spans)

    async def test_a_cancelled_requests_spans_end(self, recorded: Recorded, tiny_llama: Path) -> None:
        async with gated_system(tiny_llama, telemetry=recorded.telemetry) as (system, gate):
            async with system.client.stream(PROMPT, GenerateOptions(method="gated")):
                await gate.reached()
                assert not recorded.named("specdec.generate")
            request = await recorded.request()
            assert request.status.status_code is StatusCode.ERROR
            assert [span.name for span in recorded.children(request)] == ["specdec.prefill", "specdec.round"]


class BrokenCodec(TextCodec):
    """Has defects."""

    def __init__(self) -> None:
        self.vocabulary_fingerprint = ""

    def encode_text(self, text: str) -> list[int]:
        raise ValueError("a defect")

    def decode(self, token_ids: Sequence[int]) -> str:
        raise KeyError("a defect")


class TestMetrics:
    async def test_counters_equal_the_sum_of_the_answers(self, tiny_llama: Path, noisy_llama: Path) -> None:
        reader = InMemoryMetricReader()
        telemetry = make_telemetry("test", metric_reader=reader)
        async with running_system(
            tiny_llama, "ngram", f"noisy=causal-lm:{noisy_llama}", telemetry=telemetry
        ) as system:
            results = [
                await system.client.generate(
                    prompt, GenerateOptions(method=method, draft_depth=4, max_new_tokens=24)
                )
                for method in ("noisy", "ngram", "none")
                for prompt in (PROMPT, [40, 41, 42])
            ]
            await eventually(lambda: sum(sums(reader, "specdec.requests").values()) == len(results))
            for instrument, name in (
                ("specdec.rounds", "num_rounds"),
                ("specdec.draft_tokens", "num_draft_tokens"),
                ("specdec.accepted_tokens", "num_accepted_tokens"),
            ):
                expected: Counter[str] = Counter()
                for result in results:
                    expected[result.speculation.method] += getattr(result.speculation, name)
                assert Counter(sums(reader, instrument)) == expected
            num_rounds = sum(result.speculation.num_rounds for result in results)
            (verified,) = points(reader, "specdec.verifier.rounds")
            assert verified.value == num_rounds
            for result in results:
                timing, num_later = result.timing, result.usage.output_tokens - 1
                assert 0 < timing.ttft_ms < timing.total_ms
                # Whole nanoseconds are told.
                usual_ms = (timing.total_ms - timing.ttft_ms) / num_later
                assert timing.tpot_ms == pytest.approx(usual_ms, abs=1.1e-6)
            outcomes = Counter(result.finish_reason for result in results)
            assert Counter(sums(reader, "specdec.requests", "outcome")) == outcomes

    async def test_failures_are_counted_by_status(self, tiny_llama: Path) -> None:
        reader = InMemoryMetricReader()
        telemetry = make_telemetry("test", metric_reader=reader)
        async with running_system(tiny_llama, telemetry=telemetry) as system:
            with pytest.raises(InvalidArgumentError):
                await system.client.generate(PROMPT, REFUSED)
            await eventually(lambda: bool(points(reader, "specdec.requests")))
            assert sums(reader, "specdec.requests", "outcome") == {"invalid_argument": 1}
            # A defect is a failure as well, whether the request has begun or not.
            backends = system.gateway.generations.backends
            assert backends
            system.gateway.generations.backends = replace(backends, codec=BrokenCodec())
            for prompt in ("text", PROMPT):
                with pytest.raises(InternalError):
                    await system.client.generate(prompt, GenerateOptions(method="none"))
            await eventually(
                lambda: sums(reader, "specdec.requests", "outcome") == {"invalid_argument": 1, "internal": 2}
            )


@pytest.mark.parametrize("mode", ["handle", "stream"])
async def test_drafts_say_how_target_state_was_read(
    mode: str, recorded: Recorded, tiny_llama: Path, tmp_path: Path
) -> None:
    probe = StateProbe(TargetStateSpec((0, 2), True, (1,)))
    row_bytes = 3 * 128 + 2 * 64
    reader = InMemoryMetricReader()
    metered = make_telemetry("test", metric_reader=reader)
    telemetry = replace(recorded.telemetry, meter=metered.meter)
    here = {"shared_dir": str(tmp_path)}
    async with running_system(
        tiny_llama,
        "probe",
        families=probe.families,
        telemetry=telemetry,
        verifier_options=here,
        drafter_options={**here, "target_state": mode},
    ) as system:
        options = GenerateOptions(method="probe", draft_depth=4, max_new_tokens=24, ignore_eos=True)
        result = await system.client.generate(PROMPT, options)
        await recorded.request()
        drafts = recorded.named("specdec.draft")
        assert len(drafts) == len(probe.sessions[0].readings) >= result.speculation.num_rounds - 1
        storage = {"handle": "shared_memory", "stream": "stream"}[mode]
        assert {attribute(draft, "specdec.target_state.storage") for draft in drafts} == {storage}
        read = sum(attribute(draft, "specdec.target_state.bytes") for draft in drafts)
        assert read == row_bytes * probe.sessions[0].readings[-1].length
        assert attribute(drafts[0], "specdec.target_state.bytes") == row_bytes * len(PROMPT)
        for draft in drafts:
            assert 0 < attribute(draft, "specdec.target_state.wait_ns") <= duration_ns(draft)
        assert sums(reader, "specdec.drafter.target_state", "storage") == {storage: read}
        sent = sum(point.value for point in points(reader, "specdec.verifier.streamed_state"))
        assert sent >= read if mode == "stream" else sent == 0
    metered.shutdown()  # until then it keeps the services, whose load it reads


class Collector(
    trace_service_pb2_grpc.TraceServiceServicer,  # type: ignore[misc]
    metrics_service_pb2_grpc.MetricsServiceServicer,  # type: ignore[misc]
):
    """The least of an OTLP collector."""

    def __init__(self) -> None:
        self.spans: dict[str, list[Any]] = {}
        self.metrics: dict[str, set[str]] = {}

    async def Export(self, request: Any, context: Any) -> Any:  # noqa: N802
        if isinstance(request, metrics_service_pb2.ExportMetricsServiceRequest):
            for resource in request.resource_metrics:
                names = {metric.name for scope in resource.scope_metrics for metric in scope.metrics}
                self.metrics.setdefault(service_name(resource), set()).update(names)
            return metrics_service_pb2.ExportMetricsServiceResponse()
        for resource in request.resource_spans:
            spans = [span for scope in resource.scope_spans for span in scope.spans]
            self.spans.setdefault(service_name(resource), []).extend(spans)
        return trace_service_pb2.ExportTraceServiceResponse()


def service_name(resource: Any) -> str:
    values = {entry.key: entry.value.string_value for entry in resource.resource.attributes}
    return str(values["service.name"])


@asynccontextmanager
async def running_collector() -> AsyncIterator[tuple[str, Collector]]:
    collector, server = Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"http://127.0.0.1:{port}", collector
    finally:
        await server.stop(0)


def exports(telemetry: Telemetry) -> tuple[bool, bool]:
    """Return whether spans and whether metrics are exported."""
    return (
        isinstance(telemetry.tracer_provider, TracerProvider),
        isinstance(telemetry.meter_provider, MeterProvider),
    )


class TestEnvironment:
    @pytest.fixture(autouse=True)
    def no_settings(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for variable in (
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
            "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
            "OTEL_EXPORTER_OTLP_PROTOCOL",
            "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
            "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL",
            "OTEL_TRACES_EXPORTER",
            "OTEL_METRICS_EXPORTER",
            "OTEL_SDK_DISABLED",
            "OTEL_SERVICE_NAME",
        ):
            monkeypatch.delenv(variable, raising=False)

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, (False, False)),
            ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, (True, True)),
            ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"}, (True, False)),
            ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, (False, False)),
            (
                {
                    "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
                    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
                    "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc",
                },
                (True, True),
            ),
            (
                {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_METRICS_EXPORTER": "none"},
                (True, False),
            ),
            (
                {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
                (False, False),
            ),
        ],
    )
    def test_exports_only_what_is_asked_for(
        self,
        monkeypatch: pytest.MonkeyPatch,
        settings: dict[str, str],
        expected: tuple[bool, bool],
    ) -> None:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        telemetry = telemetry_from_environment("service")
        assert exports(telemetry) == expected
        telemetry.shutdown()

    async def test_a_collector_gets_one_trace_of_three_services(
        self, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
    ) -> None:
        async with running_collector() as (endpoint, collector):
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
            async with (
                running_verifier(tiny_llama, telemetry=telemetry_from_environment("verifier")) as (
                    verifier,
                    _,
                ),
                running_drafter("ngram", telemetry=telemetry_from_environment("drafter")) as (drafter, _),
                running_gateway(
                    tiny_llama,
                    verifier=verifier,
                    drafter=drafter,
                    telemetry=telemetry_from_environment("gateway"),
                ) as (gateway, _),
                AsyncClient(gateway) as client,
            ):
                options = GenerateOptions(method="ngram", max_new_tokens=10)
                result = await client.generate(PROMPT, options)
            # Closing a service sends what it has buffered.
            names = {service: {span.name for span in spans} for service, spans in collector.spans.items()}
            assert names == {
                "gateway": {"specdec.generate", "specdec.prefill", "specdec.round", "specdec.transport"},
                "verifier": {"specdec.verify"},
                "drafter": {"specdec.draft"},
            }
            spans = [span for spans in collector.spans.values() for span in spans]
            assert {span.trace_id.hex() for span in spans} == {result.trace_id}
            assert collector.metrics["gateway"] >= {"specdec.rounds", "specdec.requests"}
            assert collector.metrics["verifier"] >= {
                "specdec.verifier.rounds",
                "specdec.verifier.step_duration",
            }


LOGGING_SCRIPT = """
import logging
from opentelemetry.sdk.trace import TracerProvider
from specdec.service.logs import setup_logging
from specdec.contract.request_id import REQUEST_ID
setup_logging("specdec-test", "info")
log = logging.getLogger("here")
log.debug("too quiet")
log.info("plain é %s", 1, extra={"uri": "dns:///x"})
REQUEST_ID.set("order-66")
with TracerProvider().get_tracer("t").start_as_current_span("s") as span:
    log.warning("traced\\nover two lines")
    context = span.get_span_context()
try:
    raise ValueError("broken")
except ValueError:
    log.exception("failed")
print(f"{context.trace_id:032x} {context.span_id:016x}")
"""


def test_logs_are_one_json_object_per_line_with_trace_ids() -> None:
    result = subprocess.run(
        [sys.executable, "-c", LOGGING_SCRIPT], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    trace_id, span_id = result.stdout.split()
    lines: Sequence[dict[str, Any]] = [json.loads(line) for line in result.stderr.splitlines()]
    plain, traced, failed = lines
    assert plain["time"]
    assert (plain["level"], plain["logger"], plain["message"]) == ("INFO", "here", "plain é 1")
    assert (plain["service"], plain["uri"]) == ("specdec-test", "dns:///x")
    assert not {"trace_id", "request_id"} & plain.keys()
    assert (traced["request_id"], failed["request_id"]) == ("order-66", "order-66")
    assert (traced["trace_id"], traced["span_id"]) == (trace_id, span_id)
    assert traced["message"] == "traced\nover two lines"
    assert "ValueError: broken" in failed["exc_info"]


DROPPED_SERVER_SCRIPT = """
import asyncio, gc, logging
import grpc.aio
from specdec.service.logs import setup_logging
setup_logging("specdec-test", "debug")
records = []
logging.getLogger().handlers[0].addFilter(lambda record: records.append(record) or True)
async def main():
    server = grpc.aio.server()
    del server
    gc.collect()
asyncio.run(main())
print(len(records))
records.clear()
"""


def test_a_server_freed_while_records_are_kept_is_freed_once() -> None:
    result = subprocess.run(
        [sys.executable, "-c", DROPPED_SERVER_SCRIPT], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Exception ignored" not in result.stderr
    assert int(result.stdout) > 0
