"""The two ways between the client's dataclasses and the wire: a request out, the responses folded in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from numbers import Integral
from typing import Any, TypeVar, cast

from google.protobuf.message import Message as ProtoMessage

from specdec.client.generation import (
    GenerateOptions,
    Generation,
    Message,
    MethodRounds,
    Prompt,
    ProposerStats,
    Speculation,
    Started,
    Timing,
    Token,
    Usage,
)
from specdec.contract.bounds import MAX_UINT32
from specdec.contract.errors import InternalError, InvalidArgumentError
from specdec.contract.finish_reasons import FINISH_REASONS
from specdec.contract.output_format import OutputFormat
from specdec.contract.request_limits import MAX_NEW_TOKENS
from specdec.contract.sampling import validate_num_top_logprobs, with_range
from specdec.v1 import gateway_pb2

NS_PER_MS = 1_000_000

_ELSEWHERE = {"sampling", "output_format", "raw", "request_id"}
"""Options that are not values of the request: messages of their own, the kind of prompt, and metadata."""
_RENAMED = {"stop": "stop_strings"}
"""Options whose field in the request has another name."""

DataT = TypeVar("DataT")


def build_request(prompt: Prompt, options: GenerateOptions) -> gateway_pb2.GenerateRequest:
    """Build the message that asks for a generation.

    Raises:
        InvalidArgumentError: naming the field that is out of range or of the wrong type.
    """
    options.sampling.validate()
    validate_num_top_logprobs(options.num_top_logprobs)
    if isinstance(options.stop, str):
        raise InvalidArgumentError("stop is one string; pass a tuple of strings.", field="stop")
    if options.max_new_tokens is not None:
        _require_integer("max_new_tokens", options.max_new_tokens, 1, MAX_NEW_TOKENS)
    if options.draft_depth is not None:
        _require_integer("draft_depth", options.draft_depth, 0, MAX_UINT32)
    _require_integer("draft_nodes", options.draft_nodes, 0, MAX_UINT32)
    request = gateway_pb2.GenerateRequest(sampling=options.sampling.to_proto())
    for option, name in request_fields():
        value = getattr(options, option)
        with _refusing(option, value):
            request.MergeFrom(gateway_pb2.GenerateRequest(**{name: value}))
    if options.output_format is not None:
        _set_output_format(request, options.output_format)
    with _refusing("prompt", prompt):
        _set_prompt(request, prompt, options.raw)
    return request


def request_fields() -> list[tuple[str, str]]:
    """Return the names of options, and of their fields in the request."""
    names = [option.name for option in fields(GenerateOptions) if option.name not in _ELSEWHERE]
    return [(name, _RENAMED.get(name, name)) for name in names]


def _set_output_format(request: gateway_pb2.GenerateRequest, output_format: OutputFormat) -> None:
    if not isinstance(output_format, OutputFormat):
        raise InvalidArgumentError(
            f"output_format is {output_format!r:.80}; pass OutputFormat(...).", field="output_format"
        )
    output_format.validate()
    with _refusing("output_format", output_format):
        request.output_format.CopyFrom(output_format.to_proto())


def _set_prompt(request: gateway_pb2.GenerateRequest, prompt: Prompt, raw: bool) -> None:
    if isinstance(prompt, str):
        if raw:
            request.text = prompt
        else:
            request.chat.messages.add(role="user", content=prompt)
        return
    if isinstance(prompt, (bytes, bytearray)):
        raise InvalidArgumentError("The prompt is bytes; decode it to a string first.", field="prompt")
    if isinstance(prompt, Mapping):
        raise InvalidArgumentError(
            "The prompt is a dict; a conversation is a list of dicts, even if it has one turn only.",
            field="prompt",
        )
    if len(prompt) == 0:
        raise InvalidArgumentError(
            "The prompt is empty; give at least one message or token id.", field="prompt"
        )
    if isinstance(prompt[0], Message | Mapping):
        if raw:
            raise InvalidArgumentError(
                "raw needs a string prompt; a conversation goes through the template.", field="raw"
            )
        for turn in prompt:
            message = _message(turn)
            request.chat.messages.add(role=message.role, content=message.content)
    else:
        request.token_ids.token_ids.extend(cast(Sequence[int], prompt))


def _require_integer(name: str, value: object, low: int, high: int) -> None:
    if not (isinstance(value, Integral) and low <= int(value) <= high):
        raise InvalidArgumentError(
            f"{name} is {value!r}; it must be an integer from {low} to {high}.", field=name
        )


def _message(turn: object) -> Message:
    """Return a turn of a conversation, however it was written."""
    if isinstance(turn, Mapping):
        if turn.keys() != {"role", "content"}:
            keys = ", ".join(map(str, turn)) or "nothing"
            raise ValueError(f"a turn has a role and a content, this one has {keys}")
        turn = Message(**turn)
    if not isinstance(turn, Message):
        raise TypeError(f"{turn!r} is neither a Message nor a dict")
    # Protobuf would take None for a field that is not set.
    if not (isinstance(turn.role, str) and isinstance(turn.content, str)):
        raise TypeError(f"role and content are strings, not {turn.role!r} and {turn.content!r}")
    return turn


@contextmanager
def _refusing(name: str, value: object) -> Iterator[None]:
    """Turn protobuf's refusal of a value into the typed error that names the field."""
    try:
        yield
    except UnicodeError as error:
        raise InvalidArgumentError(
            f"{name} is not valid Unicode: {error}. Lone surrogates, such as those of undecodable bytes, "
            f"cannot be sent as UTF-8.",
            field=name,
        ) from error
    except (ValueError, TypeError) as error:
        shown = repr(value)[:80]
        raise InvalidArgumentError(f"{name} cannot be {shown}: {with_range(error)}", field=name) from error


class ResponseFold:
    """Folds the responses of a Generate call into a `Generation`."""

    def __init__(self) -> None:
        self.started: Started | None = None
        self._tokens: list[Token] = []
        self._finished: gateway_pb2.GenerateFinished | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens so far."""
        return len(self._tokens)

    def add(self, response: gateway_pb2.GenerateResponse) -> list[Token]:
        """Take in one response; returns the tokens it brought."""
        match response.WhichOneof("message"):
            case "started":
                self.started = from_message(Started, response.started)
            case "chunk":
                tokens = [_token(message) for message in response.chunk.tokens]
                self._tokens += tokens
                return tokens
            case "finished":
                self._finished = response.finished
        return []

    def result(self) -> Generation:
        """Return the whole answer, once the call has ended.

        Raises:
            InternalError: the call ended without the messages that every answer has.
        """
        if self.started is None or self._finished is None:
            raise InternalError("The gateway ended the answer without finishing it; look at its log.")
        finished = self._finished
        return Generation(
            text="".join(token.text for token in self._tokens),
            tokens=tuple(self._tokens),
            finish_reason=FINISH_REASONS.get(finished.finish_reason, ""),
            usage=from_message(Usage, finished.usage),
            timing=from_message(Timing, finished.timing),
            speculation=_speculation(finished.speculation),
            trace_id=self.started.trace_id,
            model_id=self.started.model_id,
            num_failovers=finished.num_failovers,
            request_id=self.started.request_id,
            seed=self.started.seed,
        )


def _token(message: gateway_pb2.Token) -> Token:
    has_logprobs = message.HasField("logprobs")
    return Token(
        token_id=message.token_id,
        text=message.text,
        is_draft=message.origin == gateway_pb2.TOKEN_ORIGIN_ACCEPTED_DRAFT,
        logprob=message.logprobs.logprob if has_logprobs else None,
        top_logprobs=tuple((top.token_id, top.logprob) for top in message.logprobs.top),
    )


def _speculation(stats: gateway_pb2.SpeculationStats) -> Speculation:
    proposers = tuple(from_message(ProposerStats, proposer) for proposer in stats.proposers)
    methods = tuple(from_message(MethodRounds, method) for method in stats.methods)
    return from_message(Speculation, stats, proposers=proposers, methods=methods)


def from_message(kind: type[DataT], message: ProtoMessage, **given: Any) -> DataT:
    """Return a dataclass whose fields are those of a message of the same names.

    Repeated fields become tuples, an unset field that tells so None, and `x_ms` is the message's `x_ns`.

    Args:
        kind: the dataclass.
        message: what came.
        given: fields that are not taken from the message.
    """
    names = [field.name for field in fields(cast(Any, kind)) if field.name not in given]
    return kind(**{name: value_of(message, name) for name in names}, **given)


def value_of(message: ProtoMessage, name: str) -> Any:
    """Return a field of a message as a dataclass has it; see `from_message`."""
    if name.endswith("_ms"):
        return getattr(message, f"{name.removesuffix('_ms')}_ns") / NS_PER_MS
    field = message.DESCRIPTOR.fields_by_name[name]
    if field.has_presence and not message.HasField(name):
        return None
    value = getattr(message, name)
    return tuple(value) if field.is_repeated else value
