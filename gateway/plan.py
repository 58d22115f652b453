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
from specdec.methods import PLAIN, drafters_of
from specdec.sampling import (
    SamplingParams,
    validate_min_draft_confidence,
    validate_num_top_logprobs,
)
from specdec.v1 import drafter_pb2, gateway_pb2, verifier_pb2

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

    def offers(self, method: str) -> bool:
        """Whether a request may name that method, several drafters perhaps."""
        return set(drafters_of(method)) <= set(self.methods[1:])


@dataclass(frozen=True, slots=True)
class Proposer:
    """A drafter's part in a request."""

    drafter: str
    num_draft_tokens: int
    """Most tokens it drafts in a row."""


@dataclass(frozen=True, slots=True)
class DraftPlan:
    """Who drafts, and how much."""

    method: str = PLAIN
    proposers: tuple[Proposer, ...] = ()
    num_draft_nodes: int = 0
    """Most tokens of a draft tree; 0: drafts are chains."""
    may_branch: bool = False
    """Whether a drafter is asked for several continuations."""

    @property
    def num_draft_tokens(self) -> int:
        """K, the longest any drafter drafts in a row; 0 is plain decoding."""
        return max((proposer.num_draft_tokens for proposer in self.proposers), default=0)


@dataclass(frozen=True, slots=True)
class Plan:
    """A request whose values were checked, as far as the gateway can."""

    prompt_token_ids: list[int]
    max_new_tokens: int
    drafting: DraftPlan

    @property
    def method(self) -> str:
        """Method in effect."""
        return self.drafting.method


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
    drafting = _plan_drafts(request, backends, verifier.max_num_draft_tokens)
    token_ids = await asyncio.to_thread(_encode, request, backends.codec)
    if not token_ids:
        raise InvalidArgumentError("The prompt is empty.", field="prompt", reason="EMPTY_PROMPT")
    context = verifier.model.max_length
    if context:
        _require_shorter(token_ids, context)
        max_new_tokens = min(max_new_tokens, context - len(token_ids))
    return Plan(token_ids, max_new_tokens, drafting)


def _require_shorter(token_ids: Sequence[int], context: int) -> None:
    """Refuse a prompt the verifier would refuse, before a message is made of it that is too large to send."""
    if len(token_ids) >= context:
        raise InvalidArgumentError(
            f"The prompt has {len(token_ids)} tokens, the model's context {context}; shorten the prompt so "
            "that at least one token fits after it.",
            field="prompt",
            reason="PROMPT_TOO_LONG",
        )


def _plan_drafts(request: gateway_pb2.GenerateRequest, backends: Backends, max_num_nodes: int) -> DraftPlan:
    """Method, drafters, K and node budget in effect; `max_num_nodes` is the verifier's limit."""
    method = _settle_method(request, backends)
    names = drafters_of(method)
    if len(set(names)) < len(names) or PLAIN in names:
        raise InvalidArgumentError(
            f"{method!r} names a drafter twice, or {PLAIN!r} among drafters.", field="method"
        )
    if request.num_draft_nodes > max_num_nodes:
        raise InvalidArgumentError(
            f"num_draft_nodes is {request.num_draft_nodes}; the verifier takes at most {max_num_nodes} draft "
            "tokens a round.",
            field="num_draft_nodes",
        )
    proposers = _proposers(request, backends, method, max_num_nodes)
    if not any(proposer.num_draft_tokens for proposer in proposers):
        return DraftPlan(method)
    num_nodes = request.num_draft_nodes
    if not num_nodes and len(proposers) > 1:
        num_nodes = min(sum(proposer.num_draft_tokens for proposer in proposers), max_num_nodes)
    return DraftPlan(method, proposers, num_nodes, may_branch=request.num_draft_nodes > 0)


def _settle_method(request: gateway_pb2.GenerateRequest, backends: Backends) -> str:
    """Method in effect."""
    method = request.method or backends.config.default_method
    if not backends.drafters.is_known or backends.offers(method):
        return method
    if not request.method:
        return PLAIN
    unknown = next(name for name in drafters_of(method) if name not in backends.methods[1:])
    raise InvalidArgumentError(
        f"Unknown method {unknown!r}; this gateway offers {', '.join(backends.methods)}.",
        field="method",
        reason="UNKNOWN_METHOD",
    )


def _proposers(
    request: gateway_pb2.GenerateRequest, backends: Backends, method: str, max_num_nodes: int
) -> tuple[Proposer, ...]:
    """The drafters of a method, each with its K."""
    names = drafters_of(method)
    known = {drafter.name: drafter for info in backends.drafters.known_infos for drafter in info.drafters}
    drafters = [known.get(name, _UNKNOWN_DRAFTER) for name in names]
    limits = [min(max_num_nodes, drafter.max_num_draft_tokens or max_num_nodes) for drafter in drafters]
    wanted = [drafter.default_num_draft_tokens for drafter in drafters]
    if request.HasField("num_draft_tokens"):
        if limits and request.num_draft_tokens > max(limits):
            raise InvalidArgumentError(
                f"num_draft_tokens is {request.num_draft_tokens}; {method} drafts at most "
                f"{max(limits)} tokens a round.",
                field="num_draft_tokens",
            )
        wanted = [request.num_draft_tokens] * len(names)
    budget = request.num_draft_nodes or max_num_nodes
    counts = [min(count, limit, budget) for count, limit in zip(wanted, limits, strict=True)]
    return tuple(Proposer(name, count) for name, count in zip(names, counts, strict=True))


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
