"""The client SDK against a scripted gateway on a real server, on both gRPC stacks."""

from __future__ import annotations

import asyncio
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from specdec.client import (
    AsyncClient,
    Client,
    DrafterServiceInfo,
    GenerateOptions,
    Generation,
    Message,
    OutputFormat,
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
    UnimplementedError,
)
from specdec.local.processes import free_ports
from specdec.local.state_file import SystemState, write_state
from specdec.transport.channel import TlsConfig
from specdec.transport.tls import PemFiles, server_credentials
from specdec.v1 import common_pb2
from tests.certificates import Authority, Folder
from tests.leftovers import nothing_left, nothing_left_behind
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
    assert result["usage"] == {"input_tokens": 5, "output_tokens": 5, "reused_input_tokens": 0}
    assert result["timing"] == {"ttft_ms": 2.0, "tpot_ms": 0.5, "total_ms": 4.0, "waiting_ms": 0.0}
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
        output_format=OutputFormat(choices=["yes", "no"]),
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
    assert list(request.output_format.choices.texts) == ["yes", "no"]


@pytest.mark.parametrize(
    ("output_format", "field", "value"),
    [
        (OutputFormat(json_schema={"const": "\u00e9"}), "json_schema", '{"const": "\u00e9"}'),
        (OutputFormat(json_schema="{}"), "json_schema", "{}"),
        (OutputFormat(json_schema={}), "json_schema", "{}"),
        (OutputFormat(regex="a+"), "regex", "a+"),
        (OutputFormat(json_object=True), "json_object", common_pb2.JsonObject()),
    ],
    ids=str,
)
def test_a_format_is_one_of_several_kinds(output_format: OutputFormat, field: str, value: object) -> None:
    message = build_request("Hi", GenerateOptions(output_format=output_format)).output_format
    assert message.WhichOneof("format") == field
    assert getattr(message, field) == value


@pytest.mark.parametrize(
    ("output_format", "field"),
    [
        ({"type": "object"}, "output_format"),
        (OutputFormat(), "output_format"),
        (OutputFormat(regex="a", json_object=True), "output_format"),
        (OutputFormat(json_object="yes"), "output_format.json_object"),  # type: ignore[arg-type]
        (OutputFormat(json_schema=[]), "output_format.json_schema"),  # type: ignore[arg-type]
        (OutputFormat(json_schema={"const": {1, 2}}), "output_format.json_schema"),
        (OutputFormat(json_schema={"const": float("nan")}), "output_format.json_schema"),
        (OutputFormat(json_schema="yes"), "output_format.json_schema"),
        (OutputFormat(regex=5), "output_format.regex"),  # type: ignore[arg-type]
        (OutputFormat(regex="\udcff"), "output_format"),
        (OutputFormat(choices="yes"), "output_format.choices"),
        (OutputFormat(choices=[]), "output_format.choices"),
        (OutputFormat(choices=["a", 5]), "output_format.choices[1]"),  # type: ignore[list-item]
    ],
    ids=repr,
)
def test_a_format_that_is_none_is_refused(output_format: Any, field: str) -> None:
    with pytest.raises(InvalidArgumentError) as raised:
        build_request("Hi", GenerateOptions(output_format=output_format))
    assert raised.value.field == field


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
        ("a", {"stop": ("\ud800",)}, "stop"),
        ("a", {"stop": (1,)}, "stop"),
        ("a", {"stop": 5}, "stop"),
        ({"role": "user", "content": "a"}, {}, "prompt"),
        (5, {}, "prompt"),
        ("a", {"draft_depth": "4"}, "draft_depth"),
        ("a", {"draft_nodes": None}, "draft_nodes"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens"),
        ("a", {"max_new_tokens": 1.5}, "max_new_tokens"),
        ("a", {"num_top_logprobs": "2"}, "num_top_logprobs"),
        ("a", {"min_draft_confidence": "0.5"}, "min_draft_confidence"),
        ("a", {"cache_salt": 5}, "cache_salt"),
        ("a", {"sampling": SamplingParams(temperature="hot")}, "temperature"),  # type: ignore[arg-type]
        ("a", {"sampling": SamplingParams(seed="7")}, "seed"),  # type: ignore[arg-type]
        ("a", {"sampling": SamplingParams(top_p="1")}, "top_p"),  # type: ignore[arg-type]
        ("a", {"sampling": SamplingParams(top_k=1.5)}, "top_k"),  # type: ignore[arg-type]
        ("a", {"sampling": SamplingParams(min_p=None)}, "min_p"),  # type: ignore[arg-type]
        ("a", {"sampling": SamplingParams(repetition_penalty="1")}, "repetition_penalty"),  # type: ignore[arg-type]
        ("a", {"sampling": SamplingParams(logit_bias=[1])}, "logit_bias"),  # type: ignore[arg-type]
        ("a", {"sampling": SamplingParams(logit_bias={1: "x"})}, "logit_bias"),  # type: ignore[dict-item]
        ("a", {"sampling": SamplingParams(allowed_token_ids=3)}, "allowed_token_ids"),  # type: ignore[arg-type]
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


def test_a_request_id_that_is_too_long_is_refused_with_its_length(client: Client) -> None:
    with pytest.raises(InvalidArgumentError, match=r"129 characters long.* 1 to 128"):
        client.generate("a", GenerateOptions(request_id="x" * 129))


@pytest.mark.parametrize("number", [-1, 2**40])
def test_a_number_out_of_range_is_refused_with_the_range(number: int) -> None:
    for option, low in (("draft_depth", 0), ("max_new_tokens", 1), ("draft_nodes", 0)):
        with pytest.raises(
            InvalidArgumentError, match=rf"{option} is {number}; .* integer from {low} to \d+"
        ):
            build_request("a", GenerateOptions(**{option: number}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"seed": "7"}, "seed"),
        ({"temperature": "hot"}, "temperature"),
        ({"timeout_s": "5"}, "timeout_s"),
        ({"stop": 5}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"max_new_tokens": "5"}, "max_new_tokens"),
        ({"options": {"seed": 7}}, "options"),
        ({"options": GenerateOptions(sampling={"seed": 7})}, "sampling"),  # type: ignore[arg-type]
        ({"options": GenerateOptions(request_id=5)}, "x-request-id"),  # type: ignore[arg-type]
    ],
)
def test_a_keyword_of_a_wrong_type_is_refused_by_name(
    keywords: dict[str, Any], field: str, client: Client
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        client.generate("a", **keywords)
    assert caught.value.field == field


@pytest.mark.parametrize("kind", [Client, AsyncClient])
@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"target": 5}, "target"),
        ({"token": 5}, "token"),
        ({"tls": "pem"}, "tls"),
        ({"transport": "x"}, "transport"),
    ],
)
def test_a_connection_of_a_wrong_type_is_refused_by_name(
    kind: Any, keywords: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=field) as caught:
        kind(**keywords)
    assert caught.value.field == field


def test_an_answer_that_is_late_says_which_gateway_and_what_to_change(
    client: Client, gateway: ScriptedGateway
) -> None:
    gateway.script = hang
    with pytest.raises(
        DeadlineExceededError, match=r"within 0\.2 s; allow more time with --timeout"
    ) as caught:
        client.generate("Hi", timeout_s=0.2)
    assert gateway.address in caught.value.message


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
        client.generate("Hi", GenerateOptions(request_id="order-66"))
    assert address in str(caught.value)
    assert (caught.value.reason, caught.value.request_id) == ("GATEWAY_UNREACHABLE", "order-66")


async def test_async_unreachable_gateway_says_what_to_do() -> None:
    async with AsyncClient(f"127.0.0.1:{free_ports(1)[0]}") as client:
        with pytest.raises(UnavailableError, match=r"specdec up"):
            await client.info()


async def test_a_new_client_does_not_wait_for_an_older_ones_next_attempt() -> None:
    """An older client of this process waits longer and longer before it tries the address again."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    server = grpc.aio.server()
    async with AsyncClient(address) as older, AsyncClient(address) as newer:
        for _ in range(15):
            with pytest.raises(UnavailableError, match="does not answer"):
                await older.info()
            await asyncio.sleep(0.1)
        server.add_insecure_port(address)
        await server.start()
        with pytest.raises(UnimplementedError):
            await newer.info()
        await server.stop(0)


def test_an_async_client_goes_on_in_the_next_event_loop(gateway: ScriptedGateway) -> None:
    client = AsyncClient(gateway.address)
    texts = [asyncio.run(client.generate("Hi")).text for _ in range(3)]
    assert texts == ["Hello, world!"] * 3
    assert asyncio.run(client.info()).methods == ("none", "ngram")
    asyncio.run(client.close())


def test_an_async_client_is_not_used_in_two_event_loops_at_a_time(gateway: ScriptedGateway) -> None:
    async def both() -> None:
        async with AsyncClient(gateway.address) as client:
            await client.info()
            with pytest.raises(FailedPreconditionError, match="another event loop"):
                await asyncio.to_thread(asyncio.run, client.info())
            await client.info()

    asyncio.run(both())


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


def test_without_both_the_target_is_the_system_that_runs_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECDEC_STATE_DIR", str(tmp_path))
    monkeypatch.delenv("SPECDEC_GATEWAY", raising=False)
    started_at = psutil.Process().create_time()
    write_state(SystemState(os.getpid(), started_at, "from-state:1", "v:1", "d:1", {}, ""))
    assert find_gateway() == "from-state:1"
    monkeypatch.setenv("SPECDEC_GATEWAY", "from-variable:1")
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


FOUR_CALLS = [(stack, method) for stack in (Client, AsyncClient) for method in ("generate", "info")]
"""Every call a client makes, on both stacks."""


async def call(stack: Any, method: str, target: str, of_call: dict[str, Any], **settings: Any) -> None:
    """Make one call with settings of its own, on a client with `settings`."""
    prompt = ("Hi",) if method == "generate" else ()
    if stack is Client:
        with Client(target, **settings) as client:
            await asyncio.to_thread(getattr(client, method), *prompt, **of_call)
    else:
        async with AsyncClient(target, **settings) as client:
            await getattr(client, method)(*prompt, **of_call)


@pytest.mark.parametrize(("stack", "method"), FOUR_CALLS)
async def test_the_token_is_the_argument_then_the_variable(
    stack: Any, method: str, gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    for argument, variable, expected in (
        ("given", "set", "Bearer given"),
        ("", "set", "Bearer set"),
        ("given", "", "Bearer given"),
        ("", "", None),
    ):
        monkeypatch.setenv("SPECDEC_TOKEN", variable)
        await call(stack, method, gateway.address, {}, token=argument)
        assert gateway.metadata.get("authorization") == expected


@pytest.mark.parametrize(("stack", "method"), FOUR_CALLS)
async def test_the_deadline_is_the_calls_then_the_clients_then_five_minutes(
    stack: Any, method: str, gateway: ScriptedGateway
) -> None:
    for of_call, of_client, expected_s in (
        ({}, {}, 300),
        ({}, {"timeout_s": 50}, 50),
        ({"timeout_s": 20}, {"timeout_s": 50}, 20),
        ({"timeout_s": 80}, {"timeout_s": 50}, 80),
        ({"timeout_s": None}, {"timeout_s": 50}, None),
        ({"timeout_s": 20}, {"timeout_s": None}, 20),
        ({}, {"timeout_s": None}, None),
    ):
        await call(stack, method, gateway.address, of_call, **of_client)
        if expected_s is None:
            assert gateway.time_remaining_s > 1e6
        else:
            assert expected_s - 10 < gateway.time_remaining_s < expected_s + 2  # gRPC rounds up


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Return the certificate and key of this host, and the authority that signed it."""
    authority = Authority()
    return Folder(tmp_path_factory.mktemp("certified")).write(authority.issue(), authority)


@pytest.fixture(scope="module")
def secure(certified: Folder) -> Iterator[ScriptedGateway]:
    files = PemFiles(None, certified.path / "key.pem", certified.path / "cert.pem")
    with serving(server_credentials(files)) as scripted:
        yield scripted


def test_credentials_are_the_argument_then_the_variables(
    secure: ScriptedGateway, certified: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def info(tls: TlsConfig | None = None) -> None:
        with Client(secure.address, tls=tls) as client:
            client.info()

    right, wrong = certified.path / "ca.pem", tmp_path / "ca.pem"
    wrong.write_bytes(Authority("stranger").pem)
    with pytest.raises(UnavailableError):
        info()
    monkeypatch.setenv("SPECDEC_TLS_AUTHORITIES", str(right))
    info()
    with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED"):
        info(TlsConfig(wrong))
    monkeypatch.setenv("SPECDEC_TLS_SERVER_NAME", "elsewhere")
    with pytest.raises(UnavailableError, match="Hostname Verification Check failed"):
        info()
    monkeypatch.setenv("SPECDEC_TLS_SERVER_NAME", "localhost")
    info()
    monkeypatch.setenv("SPECDEC_TLS_AUTHORITIES", str(wrong))
    info(TlsConfig(right))


async def test_the_asyncio_client_takes_the_variables_of_tls_too(
    secure: ScriptedGateway, certified: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPECDEC_TLS_AUTHORITIES", str(certified.path / "ca.pem"))
    async with AsyncClient(secure.address, token="over TLS only") as client:
        await client.info()
    assert secure.metadata["authorization"] == "Bearer over TLS only"


def test_the_variables_of_tls_become_its_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TlsConfig.from_environment() is None
    for name in ("AUTHORITIES", "PRIVATE_KEY", "CERTIFICATE", "SERVER_NAME"):
        monkeypatch.setenv(f"SPECDEC_TLS_{name}", name)
    expected = TlsConfig(Path("AUTHORITIES"), Path("PRIVATE_KEY"), Path("CERTIFICATE"), "SERVER_NAME")
    assert TlsConfig.from_environment() == expected
    for name in ("AUTHORITIES", "PRIVATE_KEY", "CERTIFICATE"):
        monkeypatch.setenv(f"SPECDEC_TLS_{name}", "")
    assert TlsConfig.from_environment() == TlsConfig(server_name="SERVER_NAME")


def test_a_closed_client_has_no_connection(gateway: ScriptedGateway) -> None:
    with nothing_left():
        with Client(gateway.address) as client:
            client.generate("Hi")
        # Still referred to: what holds a client holds nothing of the system.
        assert gateway.address in repr(client)


async def test_a_closed_asyncio_client_has_no_connection(gateway: ScriptedGateway) -> None:
    async with nothing_left_behind():
        async with AsyncClient(gateway.address) as client:
            await client.generate("Hi")
        assert gateway.address in repr(client)
    await client.close()
    await AsyncClient(gateway.address).close()


def test_closing_cancels_what_is_under_way(gateway: ScriptedGateway) -> None:
    gateway.script = hang
    client = Client(gateway.address)
    stream = client.stream("Hi")
    next(stream)
    client.close()
    with pytest.raises(RequestCancelledError):
        list(stream)
    assert gateway.ended.wait(5)


async def test_closing_the_asyncio_client_cancels_what_is_under_way(gateway: ScriptedGateway) -> None:
    gateway.script = hang
    client = AsyncClient(gateway.address)
    stream = client.stream("Hi")
    await anext(stream)
    await client.close()
    with pytest.raises(RequestCancelledError):
        _ = [item async for item in stream]
    assert await asyncio.to_thread(gateway.ended.wait, 5)
