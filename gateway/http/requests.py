"""The bodies of requests, as OpenAI's clients send them, and the messages that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError

from gateway.http.fields import (
    Biases,
    Body,
    Empty,
    ListOf,
    ResponseFormat,
    StructuredOutputs,
    Unsupported,
)
from gateway.http.formats import output_format_of
from specdec.client.generation import GenerateOptions, Prompt
from specdec.client.wire import build_request
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.sampling import MAX_TOP_LOGPROBS, SamplingParams, with_seed
from specdec.v1 import gateway_pb2

MAX_CHOICES = 16
"""Most answers to one request. Each counts as a request of its caller."""
_SEEDS = 2**64
_DEVELOPER = "developer"
"""OpenAI's later name of the role "system"."""

_UNION_MEMBERS = {"str", "int"}

RequestT = TypeVar("RequestT", bound="GenerationRequest")


class StreamOptions(Body):
    """What a stream has besides its text."""

    include_usage: bool | None = None


class GenerationRequest(Unsupported):
    """The fields that both kinds of requests have. A field that is null has its default."""

    model: str | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Biases | None = None
    seed: int | None = None
    stop: str | ListOf[str] | None = None
    response_format: ResponseFormat | None = None

    # OpenAI has none of these; other servers have most of them.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    allowed_token_ids: ListOf[int] | None = None
    stop_token_ids: ListOf[int] | None = None
    ignore_eos: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    cache_salt: str | None = None
    method: str | None = None
    draft_depth: int | None = None
    draft_nodes: int | None = None
    min_draft_confidence: float | None = None

    @property
    def num_choices(self) -> int:
        """How many answers there are to each prompt."""
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def num_top_logprobs(self) -> int | None:
        """How many log probabilities each token has besides its own; None: it has none."""
        raise NotImplementedError

    def prompts(self) -> Sequence[tuple[Prompt, bool]]:
        """Return the prompts, and of each whether it is raw text."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse what asks for something that does not exist.

        Raises:
            InvalidArgumentError: naming the field.
        """
        if self.stream_options is not None and not self.stream:
            raise InvalidArgumentError(
                "stream_options needs stream to be true; leave it out.", field="stream_options"
            )

    def prompt_messages(self) -> list[gateway_pb2.GenerateRequest]:
        """Return a message for each prompt, which asks for an answer to it.

        Raises:
            InvalidArgumentError: naming the field that is out of range or of the wrong type.
        """
        self.check()
        prompts = self.prompts()
        if not 1 <= self.num_choices <= MAX_CHOICES or len(prompts) * self.num_choices > MAX_CHOICES:
            raise InvalidArgumentError(
                f"n is {self.num_choices} for {len(prompts)} prompts; it must be from 1 to {MAX_CHOICES}, "
                "for all prompts together.",
                field="n",
            )
        options = self._options()
        return [build_request(prompt, replace(options, raw=is_raw)) for prompt, is_raw in prompts]

    def choice_messages(self, message: gateway_pb2.GenerateRequest) -> list[gateway_pb2.GenerateRequest]:
        """Return the messages that ask for each answer to a prompt, with seeds that follow on each other.

        Args:
            message: one of `prompt_messages`.
        """
        if self.num_choices == 1:
            return [message]
        sampling = SamplingParams(temperature=message.sampling.temperature, seed=self.seed)
        first = with_seed(sampling).noise_seed
        messages = []
        for index in range(self.num_choices):
            choice = gateway_pb2.GenerateRequest()
            choice.CopyFrom(message)
            if not sampling.is_greedy:
                choice.sampling.seed = (first + index) % _SEEDS
            messages.append(choice)
        return messages

    def _options(self) -> GenerateOptions:
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        given = _given(
            method=self.method,
            draft_depth=self.draft_depth,
            draft_nodes=self.draft_nodes,
            min_draft_confidence=self.min_draft_confidence,
            max_new_tokens=max_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else self.stop and tuple(self.stop),
            stop_token_ids=self.stop_token_ids and tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            num_top_logprobs=self.num_top_logprobs,
            output_format=output_format_of(self.response_format, self.structured_outputs),
            cache_salt=self.cache_salt,
        )
        return GenerateOptions(sampling=self._sampling(), **given)

    def _sampling(self) -> SamplingParams:
        given = _given(
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=self.logit_bias,
            allowed_token_ids=self.allowed_token_ids and tuple(self.allowed_token_ids),
            seed=self.seed,
        )
        return SamplingParams(temperature=1.0 if self.temperature is None else self.temperature, **given)


class TextPart(Body):
    """A part of a turn. Only text is supported."""

    type: Literal["text"]
    text: str


class ChatTurn(Body):
    """A turn of a conversation."""

    role: str
    content: str | ListOf[TextPart]
    tool_calls: Empty | None = None

    @property
    def text(self) -> str:
        """The text of all of its parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest):
    """The body of /v1/chat/completions."""

    messages: Annotated[ListOf[ChatTurn], Field(min_length=1)]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_special_tokens: Literal[False] | None = None

    @property
    def num_top_logprobs(self) -> int | None:
        """How many log probabilities each token has besides its own; None: it has none."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """Refuse what asks for something that does not exist."""
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidArgumentError(
                "top_logprobs needs logprobs to be true; leave it out.", field="top_logprobs"
            )

    def prompts(self) -> Sequence[tuple[Prompt, bool]]:
        """Return the conversation."""
        turns = [
            {"role": "system" if turn.role == _DEVELOPER else turn.role, "content": turn.text}
            for turn in self.messages
        ]
        return [(turns, False)]


class CompletionRequest(GenerationRequest):
    """The body of /v1/completions."""

    prompt: str | ListOf[str] | ListOf[int] | ListOf[ListOf[int]]
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_TOP_LOGPROBS)] = None
    best_of: int | None = None
    add_special_tokens: Literal[True] | None = None

    @property
    def num_top_logprobs(self) -> int | None:
        """How many log probabilities each token has besides its own; None: it has none."""
        return self.logprobs

    def check(self) -> None:
        """Refuse what asks for something that does not exist."""
        super().check()
        if self.best_of is not None and self.best_of != self.num_choices:
            raise _unsupported("best_of")

    def prompts(self) -> Sequence[tuple[Prompt, bool]]:
        """Return the prompts: raw text, or token ids."""
        if isinstance(self.prompt, str):
            return [(self.prompt, True)]
        if not self.prompt or isinstance(self.prompt[0], int):
            return [(self.prompt, False)]  # type: ignore[list-item]
        return [(prompt, isinstance(prompt, str)) for prompt in self.prompt]


def parse(kind: type[RequestT], body: bytes) -> RequestT:
    """Read the body of a request.

    Raises:
        InvalidArgumentError: it is not JSON, or a field is of the wrong type.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        # Of what a field could be, that counts which it is most like.
        deepest = max(errors, key=lambda entry: len(entry["loc"]))
        steps = [str(step) for step in deepest["loc"]]
        place = [step for step in steps if "[" not in step and step not in _UNION_MEMBERS]
        if place and place[0] in Unsupported.model_fields:
            raise _unsupported(place[0]) from None
        raise InvalidArgumentError(
            f"{'.'.join(place) or 'The body'}: {deepest['msg']}.",
            field=place[0] if place else "",
            reason="MALFORMED_BODY",
        ) from None


def _unsupported(field: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"{field} is not supported here; leave it out.", field=field, reason="UNSUPPORTED_FIELD"
    )


def _given(**fields: Any) -> dict[str, Any]:
    """Return the fields that have a value."""
    return {name: value for name, value in fields.items() if value is not None}
