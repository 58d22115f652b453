"""What clients send and get stays out of logs and spans, also where something goes wrong."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import Drafter, DrafterTraits, DraftItem
from drafter_service.families import FAMILIES, DrafterSpec
from specdec.client import AsyncClient, GenerateOptions, Message
from specdec.contract.errors import InternalError, InvalidArgumentError, SpecdecError
from specdec.service.exporters import make_telemetry
from specdec.service.telemetry import Telemetry
from tests.http_front import CHAT, ask
from tests.systems import running_gateway, running_system, running_verifier

SECRET = "the password is swordfish"
REFUSING_TEMPLATE = "{{ raise_exception('nobody may say ' ~ messages[0]['content']) }}"


class Witness:
    """All that services tell of their work."""

    def __init__(self, log: pytest.LogCaptureFixture) -> None:
        self._log = log
        self._spans = InMemorySpanExporter()

    def telemetry(self) -> Telemetry:
        """Return the telemetry for the services that are to be watched."""
        return make_telemetry("test", span_processor=SimpleSpanProcessor(self._spans))

    @property
    def failures(self) -> list[str]:
        """The spans' descriptions of why they failed."""
        spans = self._spans.get_finished_spans()
        return [str(span.status.description) for span in spans if span.status.status_code is StatusCode.ERROR]

    def lines_with(self, *texts: str) -> list[str]:
        """Return the spans and log records that contain a text."""
        formatter = logging.Formatter()
        told = [span.to_json() for span in self._spans.get_finished_spans()]
        told += [f"{formatter.format(record)} {record.__dict__}" for record in self._log.records]
        assert told
        return [line for line in told if any(text in line for text in texts)]


@pytest.fixture
def witness(caplog: pytest.LogCaptureFixture) -> Witness:
    caplog.set_level(logging.DEBUG)
    return Witness(caplog)


async def test_no_text_in_logs_and_spans(tiny_llama: Path, witness: Witness) -> None:
    async with running_system(tiny_llama, "ngram", telemetry=witness.telemetry()) as system:
        options = GenerateOptions(max_new_tokens=24, ignore_eos=True, stop=(SECRET,), draft_depth=4)
        answer = await system.client.generate(SECRET, options)
        chat = await system.client.generate([Message("user", SECRET)], options)
        with pytest.raises(SpecdecError):
            await system.client.generate(SECRET * 100, options)
    assert not witness.lines_with(SECRET, "swordfish", answer.text[4:20], chat.text[4:20])


async def test_no_text_of_what_is_refused(tiny_llama: Path, tmp_path: Path, witness: Witness) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    (model / "chat_template.jinja").write_text(REFUSING_TEMPLATE)
    async with running_system(model, "ngram", telemetry=witness.telemetry()) as system:
        refused = (
            ([Message(SECRET, "hello")], GenerateOptions()),
            ([Message("user", SECRET)], GenerateOptions()),
            ("hello", GenerateOptions(method=SECRET)),
        )
        for prompt, options in refused:
            with pytest.raises(InvalidArgumentError, match="swordfish"):  # the client itself is told
                await system.client.generate(prompt, options)
    assert witness.failures == ["INVALID_ARGUMENT", "INVALID_ARGUMENT", "UNKNOWN_METHOD"]
    assert not witness.lines_with("swordfish")


async def test_no_text_of_a_defect(
    tiny_llama: Path, witness: Witness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(messages: Sequence[tuple[str, str]], **_: object) -> list[int]:
        raise KeyError(messages[0][1])

    async with running_system(tiny_llama, "ngram", telemetry=witness.telemetry()) as system:
        backends = system.gateway.generations.backends
        assert backends is not None
        monkeypatch.setattr(backends.codec, "encode_chat", fail)
        with pytest.raises(InternalError):
            await system.client.generate(SECRET)
    assert witness.failures == ["KeyError"]
    assert witness.lines_with("request failed"), "a defect is reported"
    assert witness.lines_with("in fail"), "and where it is"
    assert not witness.lines_with("swordfish")


async def test_no_text_over_http(tiny_llama: Path, witness: Witness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> list[int]:
        raise KeyError(SECRET)

    options = {"http_listen": "127.0.0.1:0"}
    async with running_system(
        tiny_llama, "ngram", telemetry=witness.telemetry(), gateway_options=options
    ) as system:
        front, backends = system.gateway.http, system.gateway.generations.backends
        assert front is not None
        assert backends is not None
        body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 8, "stop": SECRET}
        assert (await ask(front.address, CHAT, body)).status == 200
        for wrong in ({"method": SECRET}, {"model": SECRET}, {"temperature": SECRET}, {"tools": [SECRET]}):
            assert (await ask(front.address, CHAT, body | wrong)).status in (400, 404)
        assert (await ask(front.address, f"/v1/{SECRET.replace(' ', '-')}")).status == 404
        monkeypatch.setattr(backends.codec, "encode_chat", fail)
        for stream in (False, True):
            reply = await ask(front.address, CHAT, body | {"stream": stream})
            assert (reply.status, b"swordfish" in reply.body) == (500, False)
    assert witness.lines_with("request failed"), "a defect is reported"
    assert not witness.lines_with("swordfish")


class Quoting(Drafter):
    """Fails with what it was told on its lips."""

    def __init__(self, spec: DrafterSpec, config: DrafterConfig) -> None:
        self.traits = DrafterTraits(spec.name, spec.family, config.max_draft_depth, 4)

    def propose(self, items: Sequence[DraftItem]) -> list[list[int]]:
        raise ValueError(SECRET)


async def test_no_text_a_drafter_quotes(
    tiny_llama: Path, witness: Witness, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    families = {**FAMILIES, "quoting": Quoting}
    async with running_system(
        tiny_llama, "quoting", telemetry=witness.telemetry(), families=families
    ) as system:
        answer = await system.client.generate("hello", GenerateOptions(max_new_tokens=8, method="quoting"))
    assert "swordfish" in answer.speculation.fallback_reason
    assert witness.lines_with("drafter failed", "drafting without")
    assert not witness.lines_with("swordfish")


async def test_no_method_a_client_made_up_in_spans(tiny_llama: Path, witness: Witness) -> None:
    """As long as no drafter was reached, any name may be a method."""
    telemetry = witness.telemetry()
    nobody = "127.0.0.1:1"
    async with (
        running_verifier(tiny_llama, telemetry=telemetry) as (verifier, _),
        running_gateway(
            tiny_llama, verifier=verifier, drafter=nobody, drafter_wait_s=0.0, telemetry=telemetry
        ) as (address, _),
        AsyncClient(address, timeout_s=60) as client,
    ):
        answer = await client.generate("hello", GenerateOptions(max_new_tokens=4, method="swordfish"))
    assert answer.speculation.method == "swordfish"
    assert not witness.lines_with("swordfish")
