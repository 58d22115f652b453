"""What a request asks for, checked and settled: prompt tokens, method, K, and how long it may get."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.config import GatewayConfig
from gateway.registry import DrafterSet, VerifierSet
from gateway.stats import GatewayMetrics
from gateway.text import TextCodec, validate_stop_strings
from specdec.errors import InvalidArgumentError
from specdec.sampling import (
    SamplingParams,
    validate_min_draft_confidence,
    validate_num_top_logprobs,
)
from specdec.v1 import drafter_pb2, gateway_pb2, verifier_pb2

PLAIN = "none"
"""Method of plain decoding: no drafter, K = 0."""

_UNKNOWN_DRAFTER = drafter_pb2.DrafterInfo(default_num_draft_tokens=4)
"""Stands for a drafter whose service was never reached: it may come up while the request runs."""


@dataclass(frozen=True, slots=True)
class Backends:
    """What a gateway works with."""

    config: GatewayConfig
    codec: TextCodec
    verifiers: VerifierSet
    drafters: DrafterSet
    metrics: GatewayMetrics

    @property
    def methods(self) -> list[str]:
        """What a request's `method` may be."""
        names = {drafter.name for info in self.drafters.known_infos for drafter in info.drafters}
        return [PLAIN, *sorted(names)]


@dataclass(frozen=True, slots=True)
class Plan:
    """A request whose values were checked, as far as the gateway can."""

    prompt_token_ids: list[int]
    max_new_tokens: int
    method: str
    num_draft_tokens: int


async def make_plan(
    request: gateway_pb2.GenerateRequest,
    backends: Backends,
    verifier: verifier_pb2.VerifierServiceGetInfoResponse,
) -> Plan:
    """Tokenise the prompt and settle method, K and how many tokens there is room for.

    Args:
        verifier: the limits of the verifier that will run it.

    Raises:
        InvalidArgumentError: naming the field at fault.
    """
    SamplingParams.from_proto(request.sampling).validate()
    validate_num_top_logprobs(request.num_top_logprobs if request.HasField("num_top_logprobs") else None)
    validate_stop_strings(request.stop_strings)
    validate_min_draft_confidence(request.min_draft_confidence)
    max_new_tokens = backends.config.default_max_new_tokens
    if request.HasField("max_new_tokens"):
        max_new_tokens = request.max_new_tokens
    if not 0 < max_new_tokens < 2**31:
        raise InvalidArgumentError(
            f"max_new_tokens is {max_new_tokens}; it must be at least 1.", field="max_new_tokens"
        )
    method, num_draft_tokens = _settle_method(request, backends, verifier.max_num_draft_tokens)
    token_ids = await asyncio.to_thread(_encode, request, backends.codec)
    if not token_ids:
        raise InvalidArgumentError("The prompt is empty.", field="prompt", reason="EMPTY_PROMPT")
    context = verifier.model.max_length
    if context:
        _require_shorter(token_ids, context)
        max_new_tokens = min(max_new_tokens, context - len(token_ids))
    return Plan(token_ids, max_new_tokens, method, num_draft_tokens)


def _require_shorter(token_ids: Sequence[int], context: int) -> None:
    """Refuse a prompt the verifier would refuse, before a message is made of it that is too large to send."""
    if len(token_ids) >= context:
        raise InvalidArgumentError(
            f"The prompt has {len(token_ids)} tokens, the model's context {context}; shorten the prompt so "
            "that at least one token fits after it.",
            field="prompt",
            reason="PROMPT_TOO_LONG",
        )


def _settle_method(
    request: gateway_pb2.GenerateRequest, backends: Backends, max_draft: int
) -> tuple[str, int]:
    """Method and K in effect."""
    known = {drafter.name: drafter for info in backends.drafters.known_infos for drafter in info.drafters}
    method = request.method or backends.config.default_method
    if method != PLAIN and method not in known and backends.drafters.is_known:
        if not request.method:
            return PLAIN, 0
        raise InvalidArgumentError(
            f"Unknown method {method!r}; this gateway offers {', '.join(backends.methods)}.",
            field="method",
            reason="UNKNOWN_METHOD",
        )
    if method == PLAIN:
        return PLAIN, 0
    drafter = known.get(method, _UNKNOWN_DRAFTER)
    limit = min(max_draft, drafter.max_num_draft_tokens or max_draft)
    wanted = min(drafter.default_num_draft_tokens, limit)
    if request.HasField("num_draft_tokens"):
        wanted = request.num_draft_tokens
    if wanted > limit:
        raise InvalidArgumentError(
            f"num_draft_tokens is {wanted}; {method} drafts at most {limit} tokens a round.",
            field="num_draft_tokens",
        )
    return method, wanted


def _encode(request: gateway_pb2.GenerateRequest, codec: TextCodec) -> list[int]:
    kind = request.WhichOneof("prompt")
    if kind == "chat":
        return codec.encode_chat([(message.role, message.content) for message in request.chat.messages])
    if kind == "text":
        return codec.encode_text(request.text)
    if kind == "token_ids":
        return list(request.token_ids.token_ids)
    raise InvalidArgumentError(
        "The request has no prompt; set chat, text or token_ids.", field="prompt", reason="EMPTY_PROMPT"
    )
