"""Answers as OpenAI's clients read them: whole, or in the chunks of a stream."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from gateway.request.text import TextCodec
from specdec.client.generation import Generation, Token
from specdec.contract.request_id import REQUEST_ID

_LEAST_LOGPROB = -9999.0
"""JSON has no infinite numbers; a token that is impossible has this log probability."""
_FINISH_REASONS = {"stop_token": "stop", "stop_string": "stop", "length": "length"}
_ELSEWHERE = {"text", "token_ids", "finish_reason", "usage", "logprobs"}
"""What OpenAI's interface itself says of a generation."""


class Answers(ABC):
    """Puts the answers to one request into JSON.

    Args:
        codec: knows the texts of tokens.
        per_prompt: how many choices each prompt has.
        has_logprobs: whether tokens have log probabilities.
        has_usage: whether a stream ends with the number of tokens.
    """

    prefix: str
    """What ids begin with."""
    whole_object: str
    """What a whole answer is called."""
    chunk_object: str
    """What a chunk of a stream is called."""

    def __init__(self, codec: TextCodec, *, per_prompt: int, has_logprobs: bool, has_usage: bool) -> None:
        self._codec, self._per_prompt = codec, per_prompt
        self._has_logprobs, self._has_usage = has_logprobs, has_usage
        self._id = f"{self.prefix}-{REQUEST_ID.get()}"
        self._created = int(time.time())

    def whole(self, generations: Sequence[Generation]) -> dict[str, Any]:
        """Return the whole answer, a choice for each generation."""
        choices = [
            self._finished(index, generation, self._content(generation.text))
            | {"logprobs": self._logprobs(generation.tokens, 0)}
            for index, generation in enumerate(generations)
        ]
        return self._document(self.whole_object, generations[0].model_id, choices) | {
            "usage": usage_of(generations, self._per_prompt)
        }

    def first(self, index: int, model_id: str) -> dict[str, Any] | None:
        """Return the chunk that begins a choice of a stream; None: there is none."""
        return None

    def chunk(self, index: int, model_id: str, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        """Return the chunk with some tokens of a choice; None: they say nothing.

        Args:
            offset: how many characters of the choice came before them.
        """
        text = "".join(token.text for token in tokens)
        if not text and not (tokens and self._has_logprobs):
            return None
        choice = {
            "index": index,
            **self._delta(text),
            "logprobs": self._logprobs(tokens, offset),
            "finish_reason": None,
        }
        return self._chunk(model_id, [choice])

    def last(self, index: int, generation: Generation) -> dict[str, Any]:
        """Return the chunk that ends a choice: why, and how it was drafted."""
        choice = self._finished(index, generation, self._delta("")) | {"logprobs": None}
        return self._chunk(generation.model_id, [choice])

    def usage(self, generations: Sequence[Generation]) -> dict[str, Any] | None:
        """Return the chunk that ends a stream with the number of tokens; None: it is not wanted."""
        if not self._has_usage:
            return None
        return self._document(self.chunk_object, generations[0].model_id, []) | {
            "usage": usage_of(generations, self._per_prompt)
        }

    @abstractmethod
    def _content(self, text: str) -> dict[str, Any]:
        """Return the part of a choice that has its whole text."""

    @abstractmethod
    def _delta(self, text: str) -> dict[str, Any]:
        """Return the part of a chunk's choice that has some text."""

    @abstractmethod
    def _token_logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        """Return the log probabilities of tokens."""

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        return self._token_logprobs(tokens, offset) if self._has_logprobs else None

    def _finished(self, index: int, generation: Generation, content: dict[str, Any]) -> dict[str, Any]:
        document = generation.to_json()
        return {
            "index": index,
            **content,
            "finish_reason": _FINISH_REASONS.get(generation.finish_reason),
            "specdec": {name: value for name, value in document.items() if name not in _ELSEWHERE},
        }

    def _chunk(self, model_id: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        document = self._document(self.chunk_object, model_id, choices)
        return document | {"usage": None} if self._has_usage else document

    def _document(self, kind: str, model_id: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": model_id,
            "choices": choices,
        }


class ChatAnswers(Answers):
    """Answers of /v1/chat/completions."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, index: int, model_id: str) -> dict[str, Any]:
        """Return the chunk that says who speaks."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._chunk(model_id, [choice])

    def _content(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _token_logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        content = [
            {
                **self._entry(token.token_id, token.logprob),
                "top_logprobs": [self._entry(*candidate) for candidate in token.top_logprobs],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text = self._codec.piece(token_id)
        # A token that is a part of a character has bytes that its text does not show.
        is_whole = "\ufffd" not in text
        return {"token": text, "logprob": _finite(logprob), "bytes": [*text.encode()] if is_whole else None}


class CompletionAnswers(Answers):
    """Answers of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _content(self, text: str) -> dict[str, Any]:
        return {"text": text}

    _delta = _content

    def _token_logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        pieces = [self._codec.piece(token.token_id) for token in tokens]
        # Of tokens with the same text, such as parts of characters, the most probable is left.
        top = [
            {self._codec.piece(token_id): _finite(value) for token_id, value in reversed(token.top_logprobs)}
            for token in tokens
        ]
        ends = accumulate((len(token.text) for token in tokens), initial=offset)
        return {
            "tokens": pieces,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": top,
            "text_offset": [*ends][: len(tokens)],
        }


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, _LEAST_LOGPROB)


def usage_of(generations: Sequence[Generation], per_prompt: int) -> dict[str, Any]:
    """Return the number of tokens of all choices; those of a prompt that several share are counted once.

    Drafts are told under OpenAI's names for predictions.
    """
    prompts = [generation.usage for generation in generations[::per_prompt]]
    num_prompt = sum(usage.input_tokens for usage in prompts)
    num_output = sum(generation.usage.output_tokens for generation in generations)
    drafted = sum(generation.speculation.num_draft_tokens for generation in generations)
    accepted = sum(generation.speculation.num_accepted_tokens for generation in generations)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": sum(usage.reused_input_tokens for usage in prompts)},
        "completion_tokens_details": {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        },
    }
