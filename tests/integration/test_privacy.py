"""What clients send and get stays out of logs and spans."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from specdec.client import GenerateOptions
from specdec.errors import SpecdecError
from specdec.telemetry import make_telemetry
from tests.systems import running_system

SECRET = "the password is swordfish"


async def test_no_text_in_logs_and_spans(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    spans = InMemorySpanExporter()
    telemetry = make_telemetry("test", span_processor=SimpleSpanProcessor(spans))
    async with running_system(tiny_llama, "ngram", telemetry=telemetry) as system:
        options = GenerateOptions(max_new_tokens=24, ignore_eos=True, stop=(SECRET,), num_draft_tokens=4)
        answer = await system.client.generate(SECRET, options)
        with pytest.raises(SpecdecError):
            await system.client.generate(SECRET * 100, options)
    finished = spans.get_finished_spans()
    assert finished
    assert caplog.records
    told = [span.to_json() for span in finished]
    told += [f"{record.getMessage()} {record.__dict__}" for record in caplog.records]
    for text in (SECRET, "swordfish", answer.text[4:20]):
        assert not [line for line in told if text in line]
