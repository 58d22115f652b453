"""A gateway's stand-in, so that the tests of a program that uses a client need no server.

    transport = MockTransport(["Paris.", UnavailableError("The gateway went away.")])
    with Client(transport=transport) as client:
        assert capital_of("France", client) == "Paris."
        with pytest.raises(UnavailableError):
            capital_of("Spain", client)
    assert transport.requests[0].text == "What is the capital of France?"

A function answers by what was asked: `MockTransport(lambda request: request.text.upper())`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from specdec.client.generation import GenerateOptions, Message
from specdec.client.transport import Metadata
from specdec.client.wire import request_fields, value_of
from specdec.contract.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    RequestCancelledError,
    SpecdecError,
)
from specdec.contract.methods import PLAIN, validate_method
from specdec.contract.output_format import OutputFormat
from specdec.contract.protocol import MIN_PROTOCOL_VERSION, PROTOCOL_VERSION, REQUEST_ID_METADATA
from specdec.contract.request_limits import (
    MAX_MESSAGES,
    MAX_STOP_TOKEN_IDS,
    validate_cache_key,
    validate_length,
    validate_max_new_tokens,
    validate_roles,
    validate_stop_strings,
)
from specdec.contract.sampling import SamplingParams, validate_probability, with_seed
from specdec.v1 import common_pb2, gateway_pb2, verifier_pb2

MODEL_ID = "mock"
"""Model that the answers are said to be of."""

_WORD = re.compile(r"\s*\S+|\s+$")
"""A word with the space before it; the words of a text join to the text."""
_STOPPED = verifier_pb2.FINISH_REASON_STOP_TOKEN
_CUT = verifier_pb2.FINISH_REASON_LENGTH

Answer = str | SpecdecError | Sequence[str | SpecdecError]
"""A text, which comes word by word; an error; or the texts of the tokens one by one, with an error where the
answer breaks off."""


@dataclass(frozen=True, slots=True)
class MockRequest:
    """What a client asked."""

    messages: tuple[Message, ...]
    """The conversation; a string prompt is one turn of the user. Empty: the prompt is something else."""
    raw_text: str
    """The prompt where it is raw text."""
    token_ids: tuple[int, ...]
    """The prompt where it is token ids."""
    options: GenerateOptions
    """Everything else that was asked for."""
    timeout_s: float | None
    """Deadline of the call, seconds; None: it has none."""
    metadata: Mapping[str, str]
    """What came beside the request, without credentials, which are a matter of the transport."""

    @property
    def text(self) -> str:
        """The prompt's last turn, or all of a raw one; empty: the prompt is token ids."""
        return self.messages[-1].content if self.messages else self.raw_text


Handler = Callable[[MockRequest], Answer]
"""Answers a request. A SpecdecError that it raises is the answer; anything else goes to who asked."""


class MockTransport:
    """Answers in place of a gateway and remembers what it was asked; for `Client` and `AsyncClient`.

    An answer ends where `max_new_tokens` says, or else with a stop token; stop strings do not end it. The
    prompt is counted in words.

    Args:
        answers: a function of the request; or the answers to the requests in turn; or one text for all.
        info: what `Client.info` gets; None: a gateway with the model "mock" and no drafter.
    """

    def __init__(
        self,
        answers: Handler | Iterable[Answer] | str,
        *,
        info: gateway_pb2.GatewayServiceGetInfoResponse | None = None,
    ) -> None:
        if not (callable(answers) or isinstance(answers, Iterable)):
            raise InvalidArgumentError(
                f"answers is {answers!r}; pass a text, a list of answers, or a function of the request.",
                field="answers",
            )
        self._handler = answers if callable(answers) else _handler_of(answers)
        self._info = info or _default_info()
        self.requests: list[MockRequest] = []
        """The requests, oldest first."""
        self.is_closed = False
        """Whether its client was closed."""

    def __repr__(self) -> str:
        return f"<MockTransport, {len(self.requests)} requests>"

    def generate(
        self, request: gateway_pb2.GenerateRequest, metadata: Metadata, timeout_s: float | None
    ) -> MockCall:
        """Answer a request; see `Transport`."""
        asked = _read_request(request, metadata, timeout_s)
        self.requests.append(asked)
        default_id = f"request-{len(self.requests)}"
        try:
            _refuse_as_a_gateway(asked)
            answer = _checked_answer(self._handler(asked))
        except SpecdecError as error:
            answer = error
        return MockCall(_responses(answer, asked, asked.metadata.get(REQUEST_ID_METADATA, default_id)))

    def generate_async(
        self, request: gateway_pb2.GenerateRequest, metadata: Metadata, timeout_s: float | None
    ) -> MockCall:
        """Answer a request; see `AsyncTransport`."""
        return self.generate(request, metadata, timeout_s)

    def info(self, metadata: Metadata, timeout_s: float | None) -> gateway_pb2.GatewayServiceGetInfoResponse:
        """Return what the gateway is said to be."""
        return self._info

    async def info_async(
        self, metadata: Metadata, timeout_s: float | None
    ) -> gateway_pb2.GatewayServiceGetInfoResponse:
        """Return what the gateway is said to be."""
        return self._info

    def close(self) -> None:
        """Note the end."""
        self.is_closed = True

    async def close_async(self) -> None:
        """Note the end."""
        self.is_closed = True


class MockCall:
    """An answer under way, for either client."""

    def __init__(self, responses: Iterator[gateway_pb2.GenerateResponse]) -> None:
        self._responses = responses
        self._is_cancelled = False

    def __iter__(self) -> Iterator[gateway_pb2.GenerateResponse]:
        for response in self._responses:
            if self._is_cancelled:
                raise RequestCancelledError("The generation was cancelled.")
            yield response

    async def __aiter__(self) -> AsyncIterator[gateway_pb2.GenerateResponse]:
        for response in self:
            await asyncio.sleep(0)  # other tasks get their turn, as they do while a gateway works
            yield response

    def cancel(self) -> None:
        """End the answer."""
        self._is_cancelled = True


def _handler_of(answers: Iterable[Answer] | str) -> Handler:
    if isinstance(answers, str):
        return lambda _: answers
    remaining = iter(answers)

    def next_answer(_: MockRequest) -> Answer:
        for answer in remaining:
            return answer
        raise FailedPreconditionError(
            "The MockTransport has no answer left; give it as many as there are requests, or a function.",
            reason="NO_ANSWER_LEFT",
        )

    return next_answer


def _refuse_as_a_gateway(asked: MockRequest) -> None:
    """Refuse what every gateway refuses, whatever its model.

    Raises:
        InvalidArgumentError: a value is wrong; the error names its field.
    """
    if asked.options.max_new_tokens is not None:
        validate_max_new_tokens(asked.options.max_new_tokens)
    validate_stop_strings(asked.options.stop)
    validate_length("stop_token_ids", len(asked.options.stop_token_ids), MAX_STOP_TOKEN_IDS)
    validate_length("chat.messages", len(asked.messages), MAX_MESSAGES)
    if asked.options.method:
        validate_method(asked.options.method)
    validate_probability("min_draft_confidence", asked.options.min_draft_confidence)
    validate_cache_key("cache_salt", asked.options.cache_salt)
    if asked.options.output_format:
        asked.options.output_format.validate_beside(
            asked.options.sampling, ignore_eos=asked.options.ignore_eos
        )
    validate_roles(message.role for message in asked.messages)
    if not (asked.messages or asked.raw_text or asked.token_ids):
        raise InvalidArgumentError("The prompt is empty.", field="prompt", reason="EMPTY_PROMPT")


def _checked_answer(answer: Answer) -> Answer:
    """Return an answer if it is of the types that answers have.

    Raises:
        FailedPreconditionError: it is not.
    """
    tokens = [answer] if isinstance(answer, str | SpecdecError) else answer
    if isinstance(tokens, Sequence) and all(isinstance(token, str | SpecdecError) for token in tokens):
        return answer
    raise FailedPreconditionError(
        f"The answer of a MockTransport is {answer!r}; it must be a text, a SpecdecError, or a list of them. "
        "Does its function return one in every case?",
        reason="WRONG_ANSWER",
    )


def _read_request(
    request: gateway_pb2.GenerateRequest, metadata: Metadata, timeout_s: float | None
) -> MockRequest:
    values = {option: value_of(request, name) for option, name in request_fields()}
    output_format = OutputFormat.of_request(request)
    sampling = SamplingParams.from_proto(request.sampling)
    shown = {field.name: _as_written(getattr(sampling, field.name)) for field in fields(sampling)}
    options = GenerateOptions(
        **{option: _as_written(value) for option, value in values.items()},
        sampling=SamplingParams(**shown),
        output_format=output_format,
        request_id=dict(metadata).get(REQUEST_ID_METADATA, ""),
        raw=request.HasField("text"),
    )
    return MockRequest(
        messages=tuple(Message(turn.role, turn.content) for turn in request.chat.messages),
        raw_text=request.text,
        token_ids=tuple(request.token_ids.token_ids),
        options=options,
        timeout_s=timeout_s,
        metadata=dict(metadata),
    )


def _as_written(value: Any) -> Any:
    """Return the number somebody wrote: on the wire, which has 32 bits, 0.8 is 0.800000011920929."""
    if isinstance(value, dict):
        return {key: _as_written(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _responses(
    answer: Answer, request: MockRequest, request_id: str
) -> Iterator[gateway_pb2.GenerateResponse]:
    """Yield what a gateway sends of an answer, a token at a time."""
    if isinstance(answer, SpecdecError):
        raise answer
    sampling, method = request.options.sampling, request.options.method or PLAIN
    input_tokens = _num_tokens(request)
    started = gateway_pb2.GenerateStarted(input_tokens=input_tokens, method=method, model_id=MODEL_ID)
    started.request_id = request_id
    if not sampling.is_greedy:
        started.seed = with_seed(sampling).noise_seed
    yield gateway_pb2.GenerateResponse(started=started)
    tokens = _WORD.findall(answer) if isinstance(answer, str) else answer
    emitted = tokens[: request.options.max_new_tokens]
    for token_id, text in enumerate(emitted):
        yield _chunk(token_id, text)
    finished = gateway_pb2.GenerateFinished(
        finish_reason=_STOPPED if len(emitted) == len(tokens) else _CUT,
        usage=gateway_pb2.Usage(input_tokens=input_tokens, output_tokens=len(emitted)),
        speculation=gateway_pb2.SpeculationStats(method=method),
    )
    yield gateway_pb2.GenerateResponse(finished=finished)


def _chunk(token_id: int, text: str | SpecdecError) -> gateway_pb2.GenerateResponse:
    if isinstance(text, SpecdecError):
        raise text
    token = gateway_pb2.Token(token_id=token_id, text=text, origin=gateway_pb2.TOKEN_ORIGIN_BONUS)
    return gateway_pb2.GenerateResponse(chunk=gateway_pb2.GenerateChunk(tokens=[token]))


def _num_tokens(request: MockRequest) -> int:
    texts = [request.raw_text, *(message.content for message in request.messages)]
    return len(request.token_ids) or sum(len(text.split()) for text in texts)


def _default_info() -> gateway_pb2.GatewayServiceGetInfoResponse:
    return gateway_pb2.GatewayServiceGetInfoResponse(
        protocol_version=PROTOCOL_VERSION,
        min_protocol_version=MIN_PROTOCOL_VERSION,
        model=common_pb2.ModelInfo(model_id=MODEL_ID),
        methods=[PLAIN],
        default_method=PLAIN,
    )
