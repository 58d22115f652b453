"""The client SDK against a scripted gateway on a real server, on both gRPC stacks."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from specdec.client import (
    AsyncClient,
    Client,
    DrafterServiceInfo,
    GenerateOptions,
    Generation,
    Message,
    SamplingParams,
    VerifierInfo,
    find_gateway,
)
from specdec.client.wire import build_request
from specdec.contract.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    RequestCancelledError,
    ResourceExhaustedError,
    UnavailableError,
)
from specdec.local.processes import free_ports
from tests.unit.scripted_gateway import (
    TRACE_ID,
    Responses,
    ScriptedGateway,
    chunk,
    finished,
    hang,
    refuse,
    serving,
    started,
    token,
)


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with serving() as scripted:
        yield scripted


@pytest.fixture
def client(gateway: ScriptedGateway) -> Iterator[Client]:
    with Client(gateway.address) as connected:
        yield connected


def check_answer(answer: Generation) -> None:
    assert answer.text == "Hello, world!"
    assert answer.token_ids == (11, 12, 13, 14, 2)
    assert [item.is_draft for item in answer.tokens] == [False, True, False, True, False]
    assert answer.finish_reason == "stop_token"
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (5, 5)
    assert (answer.timing.ttft_ms, answer.timing.tpot_ms, answer.timing.total_ms) == (2.0, 0.5, 4.0)
    assert answer.speculation.mean_acceptance_length == 2.5
    assert answer.speculation.num_draft_tokens_per_position == (2, 2, 1)
    assert answer.speculation.gateway_ms == 0.05
    assert (answer.trace_id, answer.model_id) == (TRACE_ID, "tiny")
    assert (answer.request_id, answer.seed) == ("request-1", None)


def test_generate_folds_the_responses(client: Client) -> None:
    check_answer(client.generate("Hi"))


async def test_async_generate_folds_the_responses(gateway: ScriptedGateway) -> None:
    async with AsyncClient(gateway.address) as client:
        check_answer(await client.generate("Hi"))


def test_stream_yields_tokens_then_has_the_result(client: Client) -> None:
    with client.stream("Hi") as stream:
        assert stream.started is None
        with pytest.raises(FailedPreconditionError, match="iterate"):
            _ = stream.result
        assert next(stream).text == "Hello"
        assert stream.started is not None
        assert (stream.started.method, stream.started.draft_depth) == ("ngram", 4)
        assert "".join(item.text for item in stream) == ", world!"
    check_answer(stream.result)


async def test_async_stream_yields_tokens_then_has_the_result(gateway: ScriptedGateway) -> None:
    async with AsyncClient(gateway.address) as client, client.stream("Hi") as stream:
        assert (await anext(stream)).text == "Hello"
        assert "".join([item.text async for item in stream]) == ", world!"
    check_answer(stream.result)


def test_to_json_has_the_documented_keys(client: Client) -> None:
    result = client.generate("Hi").to_json()
    assert set(result) == {
        "text",
        "token_ids",
        "finish_reason",
        "usage",
        "timing",
        "speculation",
        "request_id",
        "trace_id",
        "model_id",
        "seed",
        "num_failovers",
    }
    assert result["usage"] == {"input_tokens": 5, "output_tokens": 5}
    assert result["timing"] == {"ttft_ms": 2.0, "tpot_ms": 0.5, "total_ms": 4.0}
    assert result["speculation"] == {
        "method": "ngram",
        "num_rounds": 2,
        "num_draft_tokens": 5,
        "num_accepted_tokens": 3,
        "mean_acceptance_length": 2.5,
        "acceptance_histogram": [0, 1, 1],
        "acceptance_by_depth": [1.0, 0.5, 0.0],
        "num_draft_tokens_per_position": [2, 2, 1],
        "num_accepted_tokens_per_position": [2, 1, 0],
        "draft_tokens_per_token": 1.0,
        "draft_ms": 0.1,
        "verify_ms": 1.5,
        "transport_ms": 0.3,
        "gateway_ms": 0.05,
    }


def test_log_probabilities_come_with_the_tokens_that_have_them(client: Client) -> None:
    answer = client.generate("Hi", GenerateOptions(num_top_logprobs=2))
    assert answer.tokens[0].logprob == -0.5
    assert answer.tokens[0].top_logprobs == ((11, -0.5), (12, -1.5))
    assert answer.to_json()["logprobs"][0] == {"logprob": -0.5, "top": [[11, -0.5], [12, -1.5]]}
    assert client.generate("Hi").tokens[0].logprob is None


def test_options_reach_the_gateway(client: Client, gateway: ScriptedGateway) -> None:
    options = GenerateOptions(
        method="none",
        draft_depth=0,
        max_new_tokens=7,
        sampling=SamplingParams(temperature=0.5, seed=3),
        stop=("\n\n", "END"),
        stop_token_ids=(9,),
        ignore_eos=True,
        num_top_logprobs=0,
    )
    client.generate([1, 2, 3], options)
    request = gateway.requests[0]
    assert list(request.token_ids.token_ids) == [1, 2, 3]
    assert request.method == "none"
    assert request.HasField("draft_depth")
    assert request.draft_depth == 0
    assert request.max_new_tokens == 7
    assert (request.sampling.temperature, request.sampling.seed) == (0.5, 3)
    assert list(request.stop_strings) == ["\n\n", "END"]
    assert list(request.stop_token_ids) == [9]
    assert request.ignore_eos
    assert request.HasField("num_top_logprobs")


def test_the_three_forms_of_a_prompt() -> None:
    chat = build_request("Hi", GenerateOptions())
    assert [(turn.role, turn.content) for turn in chat.chat.messages] == [("user", "Hi")]
    assert not chat.HasField("draft_depth")
    assert not chat.HasField("max_new_tokens")
    assert build_request("Hi", GenerateOptions(raw=True)).text == "Hi"
    turns = build_request([Message("system", "Be brief."), Message("user", "Hi")], GenerateOptions())
    assert [turn.role for turn in turns.chat.messages] == ["system", "user"]


@pytest.mark.parametrize(
    ("prompt", "options", "field"),
    [
        ("a\udcff", {}, "prompt"),
        ([Message("user", "a\udcff")], {}, "prompt"),
        ([], {}, "prompt"),
        (b"bytes", {}, "prompt"),
        ([-1], {}, "prompt"),
        ([2**32], {}, "prompt"),
        ([1.5], {}, "prompt"),
        ([Message("user", "a"), 3], {}, "prompt"),
        ([Message("user", "a")], {"raw": True}, "raw"),
        ("a", {"draft_depth": -1}, "draft_depth"),
        ("a", {"max_new_tokens": -1}, "max_new_tokens"),
        ("a", {"max_new_tokens": 2**32}, "max_new_tokens"),
        ("a", {"stop": ("\ud800",)}, "stop_strings"),
        ("a", {"stop": "END"}, "stop"),
        ("a", {"stop_token_ids": (-3,)}, "stop_token_ids"),
        ("a", {"num_top_logprobs": 21}, "num_top_logprobs"),
        ("a", {"method": "\udcff"}, "method"),
        ("a", {"sampling": SamplingParams(temperature=math.nan)}, "temperature"),
        ("a", {"sampling": SamplingParams(seed=-1)}, "seed"),
        ("a", {"sampling": SamplingParams(top_k=2**40)}, "top_k"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(prompt: Any, options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        build_request(prompt, GenerateOptions(**options))
    assert caught.value.field == field


def test_server_errors_are_typed_and_keep_their_details(client: Client, gateway: ScriptedGateway) -> None:
    gateway.script = refuse
    with pytest.raises(ResourceExhaustedError, match="No slot is free") as caught:
        client.generate("Hi")
    assert (caught.value.reason, caught.value.retry_after_s) == ("NO_SLOT", 1.5)


async def test_async_server_errors_are_typed_and_keep_their_details(gateway: ScriptedGateway) -> None:
    gateway.script = refuse
    async with AsyncClient(gateway.address) as client:
        with pytest.raises(ResourceExhaustedError) as caught:
            await client.generate("Hi")
    assert (caught.value.reason, caught.value.retry_after_s) == ("NO_SLOT", 1.5)


def test_an_answer_without_an_end_is_an_error(client: Client, gateway: ScriptedGateway) -> None:
    def cut_short(*_: object) -> Responses:
        yield started()
        yield chunk(token(1, "a"))

    gateway.script = cut_short
    with pytest.raises(InternalError, match="without finishing"):
        client.generate("Hi")


def test_no_rounds_is_an_acceptance_length_of_one(client: Client, gateway: ScriptedGateway) -> None:
    def one_token(*_: object) -> Responses:
        yield started("none")
        last = finished("none")
        last.finished.speculation.Clear()
        yield last

    gateway.script = one_token
    assert client.generate("Hi").speculation.mean_acceptance_length == 1.0


def test_the_deadline_ends_the_call(client: Client, gateway: ScriptedGateway) -> None:
    gateway.script = hang
    start = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        client.generate("Hi", timeout_s=0.3)
    assert time.monotonic() - start < 5
    assert gateway.ended.wait(5)


async def test_the_async_deadline_ends_the_call(gateway: ScriptedGateway) -> None:
    gateway.script = hang
    async with AsyncClient(gateway.address, timeout_s=0.3) as client:
        with pytest.raises(DeadlineExceededError):
            await client.generate("Hi")


def test_leaving_the_block_early_cancels(client: Client, gateway: ScriptedGateway) -> None:
    gateway.script = hang
    with client.stream("Hi") as stream:
        assert next(stream).text == "Hel"
    assert gateway.ended.wait(5)


async def test_leaving_the_async_block_early_cancels(gateway: ScriptedGateway) -> None:
    gateway.script = hang
    async with AsyncClient(gateway.address) as client, client.stream("Hi") as stream:
        assert (await anext(stream)).text == "Hel"
    assert await asyncio.to_thread(gateway.ended.wait, 5)


def test_cancel_from_another_thread(client: Client, gateway: ScriptedGateway) -> None:
    gateway.script = hang
    with client.stream("Hi") as stream:
        timer = threading.Timer(0.2, stream.cancel)
        timer.start()
        with pytest.raises(RequestCancelledError):
            list(stream)
    timer.join()


async def test_async_cancel_is_an_error_and_a_cancelled_task_is_not(gateway: ScriptedGateway) -> None:
    gateway.script = hang
    async with AsyncClient(gateway.address) as client:
        stream = client.stream("Hi")
        await anext(stream)
        stream.cancel()
        with pytest.raises(RequestCancelledError):
            _ = [item async for item in stream]

        assert await asyncio.to_thread(gateway.ended.wait, 5)
        gateway.ended.clear()
        task = asyncio.create_task(client.generate("Hi"))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(gateway.ended.wait, 5)


def test_unreachable_gateway_says_what_to_do() -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with Client(address) as client, pytest.raises(UnavailableError, match=r"specdec up") as caught:
        client.generate("Hi")
    assert address in str(caught.value)
    assert caught.value.reason == "GATEWAY_UNREACHABLE"


async def test_async_unreachable_gateway_says_what_to_do() -> None:
    async with AsyncClient(f"127.0.0.1:{free_ports(1)[0]}") as client:
        with pytest.raises(UnavailableError, match=r"specdec up"):
            await client.info()


def test_info_is_typed(client: Client) -> None:
    info = client.info()
    assert info.methods == ("none", "ngram")
    assert info.model is not None
    assert info.model.model_id == "tiny"
    verifier, drafter = info.verifiers[0].info, info.drafters[0].info
    assert isinstance(verifier, VerifierInfo)
    assert (verifier.kv_free_tokens, verifier.eos_token_ids) == (900, (2,))
    assert isinstance(drafter, DrafterServiceInfo)
    assert (drafter.drafters[0].name, drafter.drafters[0].model) == ("ngram", None)
    assert info.drafters[1].info is None
    assert info.drafters[1].reason == "connection refused"


async def test_async_info_equals_the_blocking_one(gateway: ScriptedGateway, client: Client) -> None:
    async with AsyncClient(gateway.address) as other:
        assert await other.info() == client.info()


def test_target_comes_from_the_argument_then_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_GATEWAY", "from-variable:1")
    assert find_gateway("from-argument:2") == "from-argument:2"
    assert find_gateway() == "from-variable:1"


def test_no_gateway_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SPECDEC_GATEWAY", raising=False)
    monkeypatch.setenv("SPECDEC_STATE_DIR", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"specdec up") as caught:
        Client()
    assert caught.value.reason == "NO_GATEWAY"


@pytest.mark.parametrize("target", ["nonsense", "host:1,host:2", "host:0"])
def test_malformed_targets_are_refused(target: str) -> None:
    with pytest.raises(InvalidArgumentError):
        Client(target)


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, math.inf])
def test_timeouts_out_of_range_are_refused(client: Client, timeout_s: float) -> None:
    with pytest.raises(InvalidArgumentError, match="timeout_s"):
        client.stream("Hi", timeout_s=timeout_s)


def test_the_trace_of_the_caller_goes_on(client: Client, gateway: ScriptedGateway) -> None:
    client.generate("Hi")
    assert "traceparent" not in gateway.metadata
    context = SpanContext(int(TRACE_ID, 16), 0xB7AD6B7169203331, is_remote=False, trace_flags=TraceFlags(1))
    with use_span(NonRecordingSpan(context)):
        client.generate("Hi")
    assert gateway.metadata["traceparent"] == f"00-{TRACE_ID}-b7ad6b7169203331-01"


def test_one_client_serves_many_threads(client: Client) -> None:
    answers: list[Generation] = []
    threads = [threading.Thread(target=lambda: answers.append(client.generate("Hi"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.text for answer in answers] == ["Hello, world!"] * 8
