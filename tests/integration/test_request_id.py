"""One name for a request, wherever it is spoken of: answers, logs and spans of every service, and errors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from specdec.client import GenerateOptions
from specdec.contract.errors import InvalidArgumentError, NotFoundError, SpecdecError, from_rpc_error
from specdec.contract.request_id import REQUEST_ID
from specdec.contract.sampling import SamplingParams
from specdec.service.exporters import make_telemetry
from specdec.v1 import gateway_pb2, gateway_pb2_grpc
from tests.raw_streams import draft_stream, verify_stream
from tests.refusals import shared
from tests.systems import System, running_system

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
OPTIONS = GenerateOptions(max_new_tokens=8, ignore_eos=True, method="ngram", draft_depth=3)


@pytest.fixture
def records() -> Iterator[list[tuple[str, str]]]:
    """Collect (logger, request id) of every log record, as the services' filter would see it."""
    seen: list[tuple[str, str]] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append((record.name, REQUEST_ID.get()))

    handler, root = Note(), logging.getLogger()
    root.addHandler(handler)
    yield seen
    root.removeHandler(handler)


@shared
async def test_the_clients_own_comes_back(small: System) -> None:
    answer = await small.client.generate(
        PROMPT, GenerateOptions(max_new_tokens=2, request_id="order-66/retry=2")
    )
    assert answer.request_id == "order-66/retry=2"


@shared
async def test_the_gateway_makes_one_for_each_request_without(small: System) -> None:
    ids = [
        (await small.client.generate(PROMPT, GenerateOptions(max_new_tokens=2))).request_id for _ in range(2)
    ]
    assert all(len(request_id) == 32 for request_id in ids)
    assert len(set(ids)) == 2


@shared
@pytest.mark.parametrize("request_id", ["two words", "a" * 129, "tab\t", "ümlaut"])
async def test_a_malformed_one_is_refused_by_the_client(request_id: str, small: System) -> None:
    with pytest.raises(InvalidArgumentError, match="printable ASCII") as raised:
        await small.client.generate(PROMPT, GenerateOptions(request_id=request_id))
    assert raised.value.field == "x-request-id"


@shared
async def test_a_malformed_one_is_refused_by_the_gateway(small: System) -> None:
    request = gateway_pb2.GenerateRequest(text="Hi", max_new_tokens=2)
    async with grpc.aio.insecure_channel(small.address) as channel:
        call = gateway_pb2_grpc.GatewayServiceStub(channel).Generate(
            request, metadata=(("x-request-id", "a" * 129),)
        )
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await call.read()
    error = from_rpc_error(raised.value)
    assert (type(error), error.field) == (InvalidArgumentError, "x-request-id")
    assert len(error.request_id) == 32, "it has a name all the same"


@shared
async def test_errors_carry_it(small: System) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        await small.client.generate(PROMPT, GenerateOptions(method="oracle", request_id="lost-7"))
    assert raised.value.request_id == "lost-7"


@shared
async def test_errors_of_the_model_services_carry_it(small: System) -> None:
    async with draft_stream(small.drafter_address) as stream:
        with pytest.raises(NotFoundError) as of_drafter:
            await stream.open("oracle", PROMPT, request_id="lost-8")
    async with verify_stream(small.verifier_address) as stream:
        with pytest.raises(SpecdecError) as of_verifier:
            await stream.open(PROMPT, request_id="lost-9", max_new_tokens=0)
    assert of_drafter.value.request_id == "lost-8"
    assert of_verifier.value.request_id == "lost-9"


async def test_every_span_of_every_service_carries_it(tiny_llama: Path) -> None:
    exporter = InMemorySpanExporter()
    telemetry = make_telemetry("test", span_processor=SimpleSpanProcessor(exporter))
    async with running_system(tiny_llama, "ngram", telemetry=telemetry) as system:
        answer = await system.client.generate(PROMPT, OPTIONS)
    spans = exporter.get_finished_spans()
    assert {span.name for span in spans} >= {
        *("specdec.generate", "specdec.prefill", "specdec.round"),
        *("specdec.draft", "specdec.verify", "specdec.transport"),
    }
    assert {(span.attributes or {}).get("specdec.request_id") for span in spans} == {answer.request_id}


async def test_log_records_carry_it(
    tiny_llama: Path, records: list[tuple[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "gateway")
    async with running_system(tiny_llama, "ngram") as system:
        await system.drafter.host.stop(0)
        options = GenerateOptions(max_new_tokens=6, ignore_eos=True, method="ngram", request_id="logged-1")
        await system.client.generate(PROMPT, options)
    assert ("gateway.rounds.drafting", "logged-1") in records


class TestSeeds:
    """A sampled request without a seed gets one of its own, and is told which."""

    SAMPLED = GenerateOptions(max_new_tokens=24, ignore_eos=True)

    @shared
    async def test_it_is_drawn_for_each_request_and_gives_the_text_again(self, small: System) -> None:
        hot = SamplingParams(temperature=1.5)
        first, second = [
            await small.client.generate(PROMPT, replace(self.SAMPLED, sampling=hot)) for _ in range(2)
        ]
        assert first.seed is not None
        assert first.seed != second.seed
        assert first.token_ids != second.token_ids
        again = await small.client.generate(
            PROMPT, replace(self.SAMPLED, sampling=replace(hot, seed=first.seed), method="ngram")
        )
        assert (again.token_ids, again.seed) == (first.token_ids, first.seed)

    @shared
    async def test_a_greedy_answer_has_none(self, small: System) -> None:
        assert (await small.client.generate(PROMPT, self.SAMPLED)).seed is None
