"""Clients over a transport of the user's own: what they ask for, what they give back, and how they end."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, use_span

from specdec.client import (
    AsyncClient,
    AsyncGenerationStream,
    AsyncGrpcTransport,
    Call,
    Client,
    GenerateOptions,
    Generation,
    GrpcTransport,
    Message,
    Metadata,
    Prompt,
    SamplingParams,
)
from specdec.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RequestCancelledError,
    UnavailableError,
)
from specdec.testing import MockRequest, MockTransport
from specdec.v1 import gateway_pb2
from tests.unit.scripted_gateway import information, serving

Ask = Callable[..., Generation]


def _ask_blocking(transport: MockTransport, prompt: Prompt, *options: Any, **keywords: Any) -> Generation:
    with Client(transport=transport) as client:
        return client.generate(prompt, *options, **keywords)


def _ask_blocking_stream(
    transport: MockTransport, prompt: Prompt, *options: Any, **keywords: Any
) -> Generation:
    with Client(transport=transport) as client, client.stream(prompt, *options, **keywords) as stream:
        list(stream)
        return stream.result


def _ask_async(transport: MockTransport, prompt: Prompt, *options: Any, **keywords: Any) -> Generation:
    async def ask() -> Generation:
        async with AsyncClient(transport=transport) as client:
            return await client.generate(prompt, *options, **keywords)

    return asyncio.run(ask())


def _ask_async_stream(transport: MockTransport, prompt: Prompt, *options: Any, **keywords: Any) -> Generation:
    async def ask() -> Generation:
        async with (
            AsyncClient(transport=transport) as client,
            client.stream(prompt, *options, **keywords) as stream,
        ):
            _ = [token async for token in stream]
            return stream.result

    return asyncio.run(ask())


@pytest.fixture(params=[_ask_blocking, _ask_blocking_stream, _ask_async, _ask_async_stream])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Return each way to get an answer, in turn."""
    way: Ask = request.param
    return way


@pytest.fixture
def transport() -> MockTransport:
    return MockTransport("Hello, world!")


OPTIONS = GenerateOptions(
    method="mtp",
    draft_depth=3,
    max_new_tokens=10,
    stop=("END",),
    ignore_eos=True,
    cache_salt="salt",
    request_id="order-66",
    sampling=SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=1, logit_bias={5: 0.3}),
)


class TestKeywords:
    def test_options_arrive_as_they_were_given(self, ask: Ask, transport: MockTransport) -> None:
        ask(transport, "Hi", OPTIONS)
        assert transport.requests[0].options == OPTIONS

    @pytest.mark.parametrize(
        ("keyword", "value"), [("method", "ngram"), ("max_new_tokens", 2), ("stop", ("a", "b"))]
    )
    def test_a_keyword_replaces_the_option(
        self, ask: Ask, transport: MockTransport, keyword: str, value: Any
    ) -> None:
        ask(transport, "Hi", OPTIONS, **{keyword: value})
        assert transport.requests[0].options == replace(OPTIONS, **{keyword: value})

    @pytest.mark.parametrize(("keyword", "value"), [("temperature", 0.5), ("top_p", 0.25), ("seed", 7)])
    def test_a_keyword_replaces_the_sampling_parameter(
        self, ask: Ask, transport: MockTransport, keyword: str, value: Any
    ) -> None:
        ask(transport, "Hi", OPTIONS, **{keyword: value})
        sampling = replace(OPTIONS.sampling, **{keyword: value})
        assert transport.requests[0].options == replace(OPTIONS, sampling=sampling)

    def test_values_that_are_false_replace_as_well(self, ask: Ask, transport: MockTransport) -> None:
        ask(transport, "Hi", OPTIONS, method="", temperature=0.0, seed=0, stop=())
        sampling = replace(OPTIONS.sampling, temperature=0.0, seed=0)
        assert transport.requests[0].options == replace(OPTIONS, method="", stop=(), sampling=sampling)

    def test_none_leaves_the_option(self, ask: Ask, transport: MockTransport) -> None:
        nothing = dict.fromkeys(("method", "max_new_tokens", "temperature", "top_p", "seed", "stop"))
        ask(transport, "Hi", OPTIONS, **nothing)
        assert transport.requests[0].options == OPTIONS

    def test_keywords_need_no_options(self, ask: Ask, transport: MockTransport) -> None:
        ask(transport, "Hi", temperature=0.7, seed=3, method="none")
        expected = GenerateOptions(method="none", sampling=SamplingParams(temperature=0.7, seed=3))
        assert transport.requests[0].options == expected

    def test_one_stop_string_need_not_be_in_a_list(self, ask: Ask, transport: MockTransport) -> None:
        ask(transport, "Hi", stop="END")
        ask(transport, "Hi", stop=["END", "FIN"])
        assert [request.options.stop for request in transport.requests] == [("END",), ("END", "FIN")]

    def test_what_is_out_of_range_is_refused_by_name(self, ask: Ask, transport: MockTransport) -> None:
        with pytest.raises(InvalidArgumentError) as caught:
            ask(transport, "Hi", top_p=0.0)
        assert caught.value.field == "top_p"
        assert transport.requests == []

    def test_an_unknown_keyword_is_a_type_error(self, ask: Ask, transport: MockTransport) -> None:
        with pytest.raises(TypeError, match="temprature"):
            ask(transport, "Hi", temprature=0.5)

    def test_the_deadline_is_the_calls_or_the_clients(self, ask: Ask, transport: MockTransport) -> None:
        ask(transport, "Hi", timeout_s=2.5)
        ask(transport, "Hi", timeout_s=None)
        ask(transport, "Hi")
        assert [request.timeout_s for request in transport.requests] == [2.5, None, 300.0]


class TestPrompts:
    TURNS = (Message("system", "Be brief."), Message("user", "Hi"))

    @pytest.mark.parametrize(
        "prompt",
        [
            list(TURNS),
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
            (TURNS[0], {"content": "Hi", "role": "user"}),
        ],
        ids=["messages", "dicts", "both"],
    )
    def test_a_conversation(self, ask: Ask, transport: MockTransport, prompt: Prompt) -> None:
        ask(transport, prompt)
        assert transport.requests[0].messages == self.TURNS
        assert transport.requests[0].text == "Hi"

    def test_a_string_is_a_turn_of_the_user(self, ask: Ask, transport: MockTransport) -> None:
        ask(transport, "Hi")
        assert transport.requests[0].messages == (Message("user", "Hi"),)

    def test_raw_text_and_token_ids_are_no_conversation(self, ask: Ask, transport: MockTransport) -> None:
        ask(transport, "def f(", GenerateOptions(raw=True))
        ask(transport, [1, 2, 3])
        raw, ids = transport.requests
        assert (raw.messages, raw.raw_text, raw.text, raw.options.raw) == ((), "def f(", "def f(", True)
        assert (ids.messages, ids.token_ids, ids.text, ids.options.raw) == ((), (1, 2, 3), "", False)

    @pytest.mark.parametrize(
        ("prompt", "said"),
        [
            ([{"role": "user"}], "this one has role"),
            ([{}], "this one has nothing"),
            ([{"role": "user", "content": "Hi", "name": "Ann"}], "this one has role, content, name"),
            ([{"role": "user", "content": None}], "are strings, not 'user' and None"),
            ([Message("user", None)], "are strings, not 'user' and None"),  # type: ignore[arg-type]
            ([{"role": "user", "content": "Hi"}, "Hi"], "neither a Message nor a dict"),
            ([{"role": "user", "content": "Hi"}, 3], "neither a Message nor a dict"),
        ],
    )
    def test_what_is_no_conversation_is_refused(
        self, ask: Ask, transport: MockTransport, prompt: Any, said: str
    ) -> None:
        with pytest.raises(InvalidArgumentError, match=said) as caught:
            ask(transport, prompt)
        assert caught.value.field == "prompt"
        assert transport.requests == []


class TestMockTransport:
    def test_one_text_answers_everything(self, ask: Ask, transport: MockTransport) -> None:
        answers = [ask(transport, "Hi"), ask(transport, [1, 2, 3, 4])]
        assert [answer.text for answer in answers] == ["Hello, world!"] * 2
        assert [token.text for token in answers[0].tokens] == ["Hello,", " world!"]
        assert [answer.usage.input_tokens for answer in answers] == [1, 4]
        assert (answers[0].usage.output_tokens, answers[0].finish_reason) == (2, "stop_token")
        assert (answers[0].model_id, answers[0].speculation.method) == ("mock", "none")

    def test_answers_come_in_turn_and_then_there_are_none(self, ask: Ask) -> None:
        transport = MockTransport(["one", NotFoundError("No such method.", reason="NO_METHOD"), ["t", "w"]])
        assert ask(transport, "Hi").text == "one"
        with pytest.raises(NotFoundError) as caught:
            ask(transport, "Hi")
        assert caught.value.reason == "NO_METHOD"
        last = ask(transport, "Hi")
        assert (last.text, [token.text for token in last.tokens]) == ("tw", ["t", "w"])
        with pytest.raises(FailedPreconditionError, match="no answer left") as left:
            ask(transport, "Hi")
        assert left.value.reason == "NO_ANSWER_LEFT"
        assert len(transport.requests) == 4

    def test_a_function_answers_by_what_was_asked(self, ask: Ask) -> None:
        def answer(request: MockRequest) -> str:
            if request.options.method == "mtp":
                raise DeadlineExceededError("That took too long.")
            return request.text.upper()

        transport = MockTransport(answer)
        assert ask(transport, "Hi").text == "HI"
        with pytest.raises(DeadlineExceededError):
            ask(transport, "Hi", method="mtp")

    def test_what_a_function_fails_with_is_not_hidden(self, ask: Ask) -> None:
        def answer(_: MockRequest) -> str:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            ask(MockTransport(answer), "Hi")

    def test_an_answer_ends_where_it_must(self, ask: Ask, transport: MockTransport) -> None:
        cut = ask(transport, "Hi", max_new_tokens=1)
        assert (cut.text, cut.finish_reason, cut.usage.output_tokens) == ("Hello,", "length", 1)
        whole = ask(transport, "Hi", max_new_tokens=2)
        assert (whole.text, whole.finish_reason) == ("Hello, world!", "stop_token")

    def test_a_sampled_answer_has_a_seed(self, ask: Ask, transport: MockTransport) -> None:
        assert ask(transport, "Hi", seed=3).seed is None, "it is greedy"
        assert ask(transport, "Hi", temperature=0.5, seed=3).seed == 3
        assert ask(transport, "Hi", temperature=0.5).seed is not None

    def test_requests_have_ids(self, ask: Ask, transport: MockTransport) -> None:
        given = ask(transport, "Hi", GenerateOptions(request_id="order-66"))
        made = ask(transport, "Hi")
        assert (given.request_id, made.request_id) == ("order-66", "request-2")
        assert transport.requests[0].metadata == {"x-request-id": "order-66"}
        assert transport.requests[1].metadata == {}

    @given(text=st.text())
    def test_any_text_arrives_whole(self, text: str) -> None:
        assert _ask_blocking(MockTransport(text), "Hi").text == text


class TestTheMockRefuses:
    @pytest.mark.parametrize(
        ("prompt", "options", "field"),
        [
            ("Hi", {"stop": ("",)}, "stop_strings"),
            ("Hi", {"stop": ("x",) * 17}, "stop_strings"),
            ("Hi", {"cache_salt": "x" * 257}, "cache_salt"),
            ("Hi", {"min_draft_confidence": 2.0}, "min_draft_confidence"),
            ("", {"raw": True}, "prompt"),
            ([{"role": "tool", "content": "x"}], {}, "chat.messages.role"),
        ],
    )
    def test_what_a_gateway_refuses(
        self, prompt: Any, options: dict[str, Any], field: str, transport: MockTransport
    ) -> None:
        with Client(transport=transport) as client, pytest.raises(InvalidArgumentError) as caught:
            client.generate(prompt, GenerateOptions(**options))
        assert caught.value.field == field
        assert len(transport.requests) == 1

    @pytest.mark.parametrize("answers", [None, 5])
    def test_answers_that_are_none(self, answers: Any) -> None:
        with pytest.raises(InvalidArgumentError, match="a text, a list of answers, or a function"):
            MockTransport(answers)

    @pytest.mark.parametrize("answer", [None, 5, [1]])
    def test_a_function_without_an_answer(self, answer: Any) -> None:
        with (
            Client(transport=MockTransport(lambda _: answer)) as client,
            pytest.raises(FailedPreconditionError, match="it must be a text, a SpecdecError"),
        ):
            client.generate("Hi")


class TestStreams:
    BROKEN = ("Hel", "lo", UnavailableError("The gateway went away."))

    def test_an_answer_that_breaks_off_raises_after_its_tokens(self) -> None:
        texts: list[str] = []
        with Client(transport=MockTransport([self.BROKEN])) as client, client.stream("Hi") as stream:
            with pytest.raises(UnavailableError) as caught:
                texts.extend(token.text for token in stream)
            with pytest.raises(FailedPreconditionError, match="not complete"):
                _ = stream.result
        assert texts == ["Hel", "lo"]
        assert caught.value.request_id == "request-1", "the answer's beginning said so"

    async def test_on_asyncio_as_well(self) -> None:
        texts: list[str] = []

        async def read(stream: AsyncGenerationStream) -> None:
            async for token in stream:
                texts.append(token.text)

        async with AsyncClient(transport=MockTransport([self.BROKEN])) as client:
            with pytest.raises(UnavailableError) as caught:
                await read(client.stream("Hi"))
        assert texts == ["Hel", "lo"]
        assert caught.value.request_id == "request-1"

    def test_a_cancelled_answer_ends(self, transport: MockTransport) -> None:
        with Client(transport=transport) as client, client.stream("Hi") as stream:
            assert next(stream).text == "Hello,"
            stream.cancel()
            with pytest.raises(RequestCancelledError):
                next(stream)

    async def test_a_cancelled_answer_ends_on_asyncio(self, transport: MockTransport) -> None:
        async with AsyncClient(transport=transport) as client, client.stream("Hi") as stream:
            assert (await anext(stream)).text == "Hello,"
            stream.cancel()
            with pytest.raises(RequestCancelledError):
                await anext(stream)

    def test_a_stream_shows_how_far_it_is(self, transport: MockTransport) -> None:
        with Client(transport=transport) as client, client.stream("Hi") as stream:
            assert repr(stream) == "<GenerationStream, 0 tokens, under way>"
            next(stream)
            assert repr(stream) == "<GenerationStream 'request-1', 1 tokens, under way>"
            list(stream)
            assert repr(stream) == "<GenerationStream 'request-1', 2 tokens, complete>"


class Stubborn:
    """Asks again when the gateway is not there: a transport as a user may write one."""

    def __init__(self, inner: MockTransport) -> None:
        self.inner = inner

    def generate(
        self, request: gateway_pb2.GenerateRequest, metadata: Metadata, timeout_s: float | None
    ) -> Call:
        first, second = (self.inner.generate(request, metadata, timeout_s) for _ in range(2))
        try:
            return replayed(list(first))
        except UnavailableError:
            return second

    def info(self, metadata: Metadata, timeout_s: float | None) -> gateway_pb2.GatewayServiceGetInfoResponse:
        return self.inner.info(metadata, timeout_s)

    def close(self) -> None:
        self.inner.close()


class replayed(list[gateway_pb2.GenerateResponse]):  # noqa: N801
    def cancel(self) -> None: ...


def test_a_transport_may_wrap_another() -> None:
    inner = MockTransport([UnavailableError("Not now."), "later"])
    with Client(transport=Stubborn(inner)) as client:
        assert client.generate("Hi").text == "later"
    assert inner.is_closed


async def test_the_transport_says_what_the_gateway_is() -> None:
    transport = MockTransport([], info=information())
    async with AsyncClient(transport=transport) as other:
        with Client(transport=transport) as client:
            assert client.info() == await other.info()
            assert client.info().methods == ("none", "ngram")
    with Client(transport=MockTransport([])) as client:
        assert (client.info().methods, client.info().model.model_id) == (("none",), "mock")  # type: ignore[union-attr]


def test_the_trace_goes_through_the_transport(transport: MockTransport) -> None:
    context = SpanContext(1, 2, is_remote=False, trace_flags=TraceFlags(1))
    with Client(transport=transport) as client, use_span(NonRecordingSpan(context)):
        client.generate("Hi")
    assert transport.requests[0].metadata["traceparent"] == f"00-{1:032x}-{2:016x}-01"


def forget(clients: list[Any]) -> None:
    clients.clear()
    gc.collect()


class TestEnds:
    @pytest.mark.parametrize("kind", [Client, AsyncClient])
    @pytest.mark.parametrize("way", [{"target": "host:1"}, {"token": "secret"}])
    def test_a_transport_beside_an_address_is_refused(
        self, kind: Any, way: dict[str, str], transport: MockTransport
    ) -> None:
        with pytest.raises(InvalidArgumentError, match="not both") as caught:
            kind(transport=transport, **way)
        assert caught.value.field == "transport"

    def test_a_closed_client_takes_no_calls(self, transport: MockTransport) -> None:
        client = Client(transport=transport)
        assert not client.is_closed
        client.close()
        transport.is_closed = False
        client.close()
        assert client.is_closed
        assert not transport.is_closed, "closing again does nothing"
        for call in (lambda: client.generate("Hi"), lambda: client.stream("Hi"), client.info):
            with pytest.raises(FailedPreconditionError, match="closed") as caught:
                call()
            assert caught.value.reason == "CLIENT_CLOSED"
        assert transport.requests == []

    async def test_a_closed_client_takes_no_calls_on_asyncio(self, transport: MockTransport) -> None:
        async with AsyncClient(transport=transport) as client:
            await client.generate("Hi")
        assert transport.is_closed
        transport.is_closed = False
        await client.close()
        assert not transport.is_closed, "closing again does nothing"
        for call in (lambda: client.generate("Hi"), client.info):
            with pytest.raises(FailedPreconditionError, match="closed"):
                await call()

    def test_a_closed_connection_can_be_closed_again(self) -> None:
        with serving() as gateway:
            client = Client(gateway.address)
            client.generate("Hi")
            client.close()
            client.close()
            with pytest.raises(FailedPreconditionError, match="closed"):
                client.generate("Hi")

    def test_what_a_client_shows_of_itself(self, transport: MockTransport) -> None:
        with Client("127.0.0.1:1", token="secret") as client:
            assert repr(client) == "<Client of GrpcTransport('127.0.0.1:1')>"
        assert repr(client) == "<Client of GrpcTransport('127.0.0.1:1'), closed>"
        assert repr(AsyncClient("127.0.0.1:1")) == "<AsyncClient of AsyncGrpcTransport('127.0.0.1:1')>"
        assert repr(Client(transport=transport)) == "<Client of <MockTransport, 0 requests>>"

    def test_a_client_that_is_never_closed_warns(self) -> None:
        clients = [Client("127.0.0.1:1")]
        with pytest.warns(ResourceWarning, match=r"127.0.0.1:1 was never closed"):
            forget(clients)

    async def test_a_client_that_is_never_closed_warns_on_asyncio(self) -> None:
        with serving() as gateway:
            clients = [AsyncClient(gateway.address)]
            await clients[0].generate("Hi")
            with pytest.warns(ResourceWarning, match="was never closed"):
                forget(clients)

    async def test_what_holds_no_connection_does_not_warn(self, recwarn: pytest.WarningsRecorder) -> None:
        AsyncClient("127.0.0.1:1")
        with Client("127.0.0.1:1"):
            pass
        with pytest.raises(InvalidArgumentError):
            Client("127.0.0.1:1", timeout_s=0)
        GrpcTransport("127.0.0.1:1").close()
        await AsyncGrpcTransport("127.0.0.1:1").close_async()
        gc.collect()
        assert list(recwarn) == []
