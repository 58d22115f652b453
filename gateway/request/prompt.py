"""The prompt of a request as token ids, refused before it costs much memory or time."""

from __future__ import annotations

import asyncio

from gateway.request.backends import Backends
from specdec.contract.errors import InvalidArgumentError
from specdec.v1 import gateway_pb2

_LONG_TEXT_BYTES = 2**16
"""Texts shorter than that are tokenised side by side."""


async def tokenise(request: gateway_pb2.GenerateRequest, backends: Backends, context: int) -> list[int]:
    """Tokenise the prompt. What is surely too long is refused before memory is spent on it."""
    if request.WhichOneof("prompt") == "token_ids":
        num_tokens = len(request.token_ids.token_ids)
        if context:
            require_shorter(num_tokens, context)
        return await asyncio.to_thread(list, request.token_ids.token_ids)
    num_bytes, limit = _num_text_bytes(request), backends.config.max_prompt_bytes
    if num_bytes > limit:
        raise InvalidArgumentError(
            f"The prompt has {num_bytes} bytes of text, this gateway takes {limit}; shorten it.",
            field="prompt",
            reason="PROMPT_TOO_LONG",
        )
    if num_bytes > _LONG_TEXT_BYTES:
        return await _encode_in_turn(request, backends)
    return await asyncio.to_thread(_encode, request, backends)


async def _encode_in_turn(request: gateway_pb2.GenerateRequest, backends: Backends) -> list[int]:
    """Encode a long text. Its thread keeps the turn to its end, although nobody may wait for it any more."""
    await backends.long_texts.acquire()
    encoding = asyncio.ensure_future(asyncio.to_thread(_encode, request, backends))
    encoding.add_done_callback(lambda _: backends.long_texts.release())
    return await asyncio.shield(encoding)


def _num_text_bytes(request: gateway_pb2.GenerateRequest) -> int:
    # A protobuf's text takes its UTF-8 on the wire, and a few bytes for each field.
    return request.chat.ByteSize() if request.WhichOneof("prompt") == "chat" else len(request.text.encode())


def _encode(request: gateway_pb2.GenerateRequest, backends: Backends) -> list[int]:
    kind = request.WhichOneof("prompt")
    if kind == "chat":
        return backends.codec.encode_chat(
            [(message.role, message.content) for message in request.chat.messages],
            allow_special_tokens=backends.config.allow_special_tokens,
        )
    if kind == "text":
        return backends.codec.encode_text(request.text)
    raise InvalidArgumentError(
        "The request has no prompt; set chat, text or token_ids.", field="prompt", reason="EMPTY_PROMPT"
    )


def require_shorter(num_tokens: int, context: int) -> None:
    """Refuse a prompt the verifier would refuse, before a message is made of it that is too large to send."""
    if num_tokens >= context:
        raise InvalidArgumentError(
            f"The prompt has {num_tokens} tokens, the model's context {context}; shorten the prompt so "
            "that at least one token fits after it.",
            field="prompt",
            reason="PROMPT_TOO_LONG",
        )
