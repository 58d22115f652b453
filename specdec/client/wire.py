"""The two ways between the client's dataclasses and the wire: a request out, the responses folded in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from specdec.client.generation import (
    GenerateOptions,
    Generation,
    Message,
    Prompt,
    ProposerStats,
    Speculation,
    Started,
    Timing,
    Token,
    Usage,
)
from specdec.contract.errors import InternalError, InvalidArgumentError
from specdec.contract.protocol import REQUEST_ID_METADATA
from specdec.contract.request_id import checked_request_id
from specdec.contract.sampling import validate_num_top_logprobs
from specdec.v1 import gateway_pb2, verifier_pb2

NS_PER_MS = 1_000_000

FINISH_REASONS = {
    verifier_pb2.FINISH_REASON_STOP_TOKEN: "stop_token",
    verifier_pb2.FINISH_REASON_LENGTH: "length",
    verifier_pb2.FINISH_REASON_STOP_STRING: "stop_string",
}


def build_request(prompt: Prompt, options: GenerateOptions) -> gateway_pb2.GenerateRequest:
    """The message that asks for a generation.

    Raises:
        InvalidArgumentError: naming the field that is out of range or of the wrong type.
    """
    options.sampling.validate()
    validate_num_top_logprobs(options.num_top_logprobs)
    if isinstance(options.stop, str):
        raise InvalidArgumentError("stop is one string; pass a tuple of strings.", field="stop")
    request = gateway_pb2.GenerateRequest(sampling=options.sampling.to_proto())
    fields: dict[str, Any] = {
        "method": options.method,
        "draft_depth": options.draft_depth,
        "draft_nodes": options.draft_nodes,
        "min_draft_confidence": options.min_draft_confidence,
        "max_new_tokens": options.max_new_tokens,
        "stop_strings": options.stop,
        "stop_token_ids": options.stop_token_ids,
        "ignore_eos": options.ignore_eos,
        "num_top_logprobs": options.num_top_logprobs,
        "cache_salt": options.cache_salt,
    }
    for name, value in fields.items():
        with _refusing(name, value):
            request.MergeFrom(gateway_pb2.GenerateRequest(**{name: value}))
    with _refusing("prompt", prompt):
        _set_prompt(request, prompt, options.raw)
    return request


def request_metadata(options: GenerateOptions) -> tuple[tuple[str, str], ...]:
    """What goes with a generation's call besides the message.

    Raises:
        InvalidArgumentError: the request id is malformed.
    """
    if not options.request_id:
        return ()
    return ((REQUEST_ID_METADATA, checked_request_id(options.request_id)),)


def _set_prompt(request: gateway_pb2.GenerateRequest, prompt: Prompt, raw: bool) -> None:
    if isinstance(prompt, str):
        if raw:
            request.text = prompt
        else:
            request.chat.messages.add(role="user", content=prompt)
        return
    if isinstance(prompt, (bytes, bytearray)):
        raise InvalidArgumentError("The prompt is bytes; decode it to a string first.", field="prompt")
    if len(prompt) == 0:
        raise InvalidArgumentError(
            "The prompt is empty; give at least one message or token id.", field="prompt"
        )
    if isinstance(prompt[0], Message):
        if raw:
            raise InvalidArgumentError(
                "raw needs a string prompt; a conversation goes through the template.", field="raw"
            )
        for message in prompt:
            if not isinstance(message, Message):
                raise TypeError(f"{message!r} is no Message")
            request.chat.messages.add(role=message.role, content=message.content)
    else:
        request.token_ids.token_ids.extend(cast(Sequence[int], prompt))


@contextmanager
def _refusing(name: str, value: object) -> Iterator[None]:
    """Turn protobuf's refusal of a value into the typed error that names the field."""
    try:
        yield
    except UnicodeError as error:
        raise InvalidArgumentError(
            f"{name} is not valid Unicode: {error}. Lone surrogates, from undecodable bytes for one, "
            f"cannot be sent as UTF-8.",
            field=name,
        ) from error
    except (ValueError, TypeError) as error:
        shown = repr(value)[:80]
        raise InvalidArgumentError(f"{name} cannot be {shown}: {error}", field=name) from error


class ResponseFold:
    """Folds the responses of a Generate call into a `Generation`."""

    def __init__(self) -> None:
        self.started: Started | None = None
        self._tokens: list[Token] = []
        self._finished: gateway_pb2.GenerateFinished | None = None

    def add(self, response: gateway_pb2.GenerateResponse) -> list[Token]:
        """Take in one response; returns the tokens it brought."""
        match response.WhichOneof("message"):
            case "started":
                self.started = _started(response.started)
            case "chunk":
                tokens = [_token(message) for message in response.chunk.tokens]
                self._tokens += tokens
                return tokens
            case "finished":
                self._finished = response.finished
        return []

    def result(self) -> Generation:
        """The whole answer, once the call has ended.

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
            usage=Usage(finished.usage.input_tokens, finished.usage.output_tokens),
            timing=Timing(
                ttft_ms=finished.timing.ttft_ns / NS_PER_MS,
                tpot_ms=finished.timing.tpot_ns / NS_PER_MS,
                total_ms=finished.timing.total_ns / NS_PER_MS,
            ),
            speculation=_speculation(finished.speculation),
            trace_id=self.started.trace_id,
            model_id=self.started.model_id,
            num_failovers=finished.num_failovers,
            request_id=self.started.request_id,
            seed=self.started.seed,
        )


def _started(message: gateway_pb2.GenerateStarted) -> Started:
    return Started(
        input_tokens=message.input_tokens,
        method=message.method,
        draft_depth=message.draft_depth,
        trace_id=message.trace_id,
        model_id=message.model_id,
        draft_nodes=message.draft_nodes,
        request_id=message.request_id,
        seed=message.seed if message.HasField("seed") else None,
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
    return Speculation(
        method=stats.method,
        num_rounds=stats.num_rounds,
        num_draft_tokens=stats.num_draft_tokens,
        num_accepted_tokens=stats.num_accepted_tokens,
        acceptance_histogram=tuple(stats.acceptance_histogram),
        num_draft_tokens_per_position=tuple(stats.num_draft_tokens_per_position),
        num_accepted_tokens_per_position=tuple(stats.num_accepted_tokens_per_position),
        draft_ms=stats.draft_ns / NS_PER_MS,
        verify_ms=stats.verify_ns / NS_PER_MS,
        transport_ms=stats.transport_ns / NS_PER_MS,
        gateway_ms=stats.gateway_ns / NS_PER_MS,
        num_fallback_rounds=stats.num_fallback_rounds,
        fallback_reason=stats.fallback_reason,
        proposers=tuple(
            ProposerStats(
                drafter=proposer.drafter,
                num_draft_tokens=proposer.num_draft_tokens,
                num_accepted_tokens=proposer.num_accepted_tokens,
                num_sole_accepted_tokens=proposer.num_sole_accepted_tokens,
                num_fallback_rounds=proposer.num_fallback_rounds,
                fallback_reason=proposer.fallback_reason,
            )
            for proposer in stats.proposers
        ),
    )
