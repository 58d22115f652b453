"""What a request asks for, checked and settled: prompt tokens, method, K, and how long it may get."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

from gateway.config import GatewayConfig
from gateway.metrics import OTHER, GatewayMetrics
from gateway.replicas.replicas import DrafterSet, VerifierSet
from gateway.request.text import TextCodec, validate_stop_strings
from gateway.rounds.controller import PLAIN_SIZE, Controller, FixedSize
from gateway.rounds.vocabulary import DraftSize, SizeControl
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.methods import AUTO, LOOKUP_FAMILIES, PLAIN, drafters_of, method_of
from specdec.contract.sampling import (
    SamplingParams,
    validate_min_draft_confidence,
    validate_num_top_logprobs,
)
from specdec.v1 import drafter_pb2, gateway_pb2, verifier_pb2

_NODE_BUDGETS = (7, 15, 31, 63)
"""Sizes of draft trees the controller tries; with the anchor a power of two, the rows kernels are best at."""
_LONG_TEXT_BYTES = 2**16
"""Shorter texts are tokenised side by side."""
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
    controller: Controller = field(default_factory=Controller)
    long_texts: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a long text is tokenised: one at a time, for the memory it takes."""

    @property
    def known_drafters(self) -> dict[str, drafter_pb2.DrafterInfo]:
        """Drafters by name, in the order their services have them."""
        return {drafter.name: drafter for info in self.drafters.known_infos for drafter in info.drafters}

    @property
    def methods(self) -> list[str]:
        """What a request's `method` may be."""
        return [PLAIN, *sorted(self.known_drafters)]

    @property
    def default_method(self) -> str:
        """Method of requests that name none."""
        method = self.config.default_method
        if method != AUTO:
            return method if self.offers(method) or not self.drafters.is_known else PLAIN
        # What knows most of the target guesses best; what only looks up errs elsewhere and costs nothing.
        drafters = [drafter for drafter in self.known_drafters.values() if self._speaks_its_tokens(drafter)]
        computing = [drafter for drafter in drafters if drafter.family not in LOOKUP_FAMILIES]
        looking_up = [one for family in LOOKUP_FAMILIES for one in drafters if one.family == family]
        chosen = [*sorted(computing, key=_ignorance)[:1], *looking_up[:1]]
        return method_of([drafter.name for drafter in chosen])

    def _speaks_its_tokens(self, drafter: drafter_pb2.DrafterInfo) -> bool:
        """Whether a drafter has the target's vocabulary, or none of its own."""
        own = drafter.model.vocabulary_fingerprint
        return not own or own == self.codec.vocabulary_fingerprint

    def offers(self, method: str) -> bool:
        """Whether a request may name that method, several drafters perhaps."""
        return set(drafters_of(method)) <= set(self.methods[1:])

    def label(self, method: str) -> str:
        """A method as label of metrics: of the drafters of a merged method the order does not matter, and one
        that may be a client's invention, since no drafter service was reached yet, is OTHER."""
        if method != self.default_method and not self.offers(method):
            return OTHER
        return method_of(sorted(drafters_of(method)))


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
    """Most tokens of a draft that is a tree, of one drafter or merged; 0: there are none."""
    size: DraftSize = PLAIN_SIZE
    """What every round asks for, or the first one where sizes are chosen round by round."""
    budgets: tuple[int, ...] = ()
    """Node budgets to choose from round by round, 0 being chains; empty: `size` stays."""

    @property
    def num_reserved_nodes(self) -> int:
        """Tokens of KV kept free for trees to a session's very end; chosen sizes make do with what is."""
        return 0 if self.budgets else self.num_draft_nodes

    def control(self, controller: Controller, verifier: object) -> SizeControl:
        """What decides the size of each round's draft, on that verifier."""
        if not self.budgets:
            return FixedSize(self.size)
        longest = max(proposer.num_draft_tokens for proposer in self.proposers)
        return controller.session(verifier, self.method, self.size, longest=longest, budgets=self.budgets)


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
    # Millions of ids fit into a request: no work for the event loop. The verifier knows which exist.
    (await asyncio.to_thread(SamplingParams.from_proto, request.sampling)).validate()
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
    context = verifier.model.max_length
    token_ids = await _tokenise(request, backends, context)
    if not token_ids:
        raise InvalidArgumentError("The prompt is empty.", field="prompt", reason="EMPTY_PROMPT")
    if context:
        _require_shorter(len(token_ids), context)
        max_new_tokens = min(max_new_tokens, context - len(token_ids))
    return Plan(token_ids, max_new_tokens, drafting)


def _ignorance(drafter: drafter_pb2.DrafterInfo) -> int:
    """Rank of a drafter by what it drafts from: the target's state, a model of its own, the text alone."""
    if drafter.HasField("target_state_spec"):
        return 0
    return 1 if drafter.model.model_id else 2


def _require_shorter(num_tokens: int, context: int) -> None:
    """Refuse a prompt the verifier would refuse, before a message is made of it that is too large to send."""
    if num_tokens >= context:
        raise InvalidArgumentError(
            f"The prompt has {num_tokens} tokens, the model's context {context}; shorten the prompt so "
            "that at least one token fits after it.",
            field="prompt",
            reason="PROMPT_TOO_LONG",
        )


def _plan_drafts(request: gateway_pb2.GenerateRequest, backends: Backends, max_num_nodes: int) -> DraftPlan:
    """Method, drafters, K and node budget in effect; `max_num_nodes` is the verifier's limit."""
    method = _settle_method(request, backends)
    names = drafters_of(method)
    if request.num_draft_nodes > max_num_nodes:
        raise InvalidArgumentError(
            f"num_draft_nodes is {request.num_draft_nodes}; the verifier takes at most {max_num_nodes} draft "
            "tokens a round.",
            field="num_draft_nodes",
        )
    known = backends.known_drafters
    drafters = {name: known.get(name, _UNKNOWN_DRAFTER) for name in names}
    if request.HasField("num_draft_tokens"):
        return _fixed_drafts(request, method, drafters, max_num_nodes)
    return _chosen_drafts(request, method, drafters, max_num_nodes)


def _fixed_drafts(
    request: gateway_pb2.GenerateRequest,
    method: str,
    drafters: Mapping[str, drafter_pb2.DrafterInfo],
    max_num_nodes: int,
) -> DraftPlan:
    """Every round asks for what the request says."""
    limits = _limits(drafters, max_num_nodes)
    if limits and request.num_draft_tokens > max(limits):
        raise InvalidArgumentError(
            f"num_draft_tokens is {request.num_draft_tokens}; {method} drafts at most "
            f"{max(limits)} tokens a round.",
            field="num_draft_tokens",
        )
    if limits and request.num_draft_nodes and not request.num_draft_tokens:
        raise InvalidArgumentError(
            "num_draft_tokens 0 is plain decoding, which has no trees; leave num_draft_nodes out, or "
            "num_draft_tokens, to have it chosen.",
            field="num_draft_nodes",
        )
    budget = request.num_draft_nodes or max_num_nodes
    counts = [min(request.num_draft_tokens, limit, budget) for limit in limits]
    if not any(counts):
        return DraftPlan(method)
    num_nodes = request.num_draft_nodes
    if not num_nodes and len(counts) > 1:
        num_nodes = min(sum(counts), max_num_nodes)
    return DraftPlan(
        method, _proposers(drafters, counts), num_nodes, DraftSize(max(counts), request.num_draft_nodes)
    )


def _chosen_drafts(
    request: gateway_pb2.GenerateRequest,
    method: str,
    drafters: Mapping[str, drafter_pb2.DrafterInfo],
    max_num_nodes: int,
) -> DraftPlan:
    """The controller chooses, round by round, within the limits of drafters, verifier and request."""
    if not drafters:
        return DraftPlan(method)
    most = request.num_draft_nodes or max_num_nodes
    limits = [min(limit, most) for limit in _limits(drafters, max_num_nodes)]
    start = max(
        min(drafter.default_num_draft_tokens, limit)
        for drafter, limit in zip(drafters.values(), limits, strict=True)
    )
    can_branch = all(drafter.max_num_draft_nodes for drafter in drafters.values())
    trees = [nodes for nodes in _NODE_BUDGETS if nodes < most]
    if request.num_draft_nodes:
        trees.append(request.num_draft_nodes)
    return DraftPlan(
        method,
        _proposers(drafters, limits),
        most if can_branch or len(drafters) > 1 else 0,
        DraftSize(start, request.num_draft_nodes),
        budgets=(0, *trees) if can_branch else (0,),
    )


def _settle_method(request: gateway_pb2.GenerateRequest, backends: Backends) -> str:
    """Method in effect."""
    method = request.method or backends.default_method
    names = drafters_of(method)
    if len(set(names)) < len(names) or (len(names) > 1 and (PLAIN in names or "" in names)):
        raise InvalidArgumentError(
            f"{method!r} names a drafter twice, or {PLAIN!r} or nothing among drafters.", field="method"
        )
    if not request.method or not backends.drafters.is_known or backends.offers(method):
        return method
    unknown = next(name for name in names if name not in backends.methods[1:])
    raise InvalidArgumentError(
        f"Unknown method {unknown!r}; this gateway offers {', '.join(backends.methods)}.",
        field="method",
        reason="UNKNOWN_METHOD",
    )


def _limits(drafters: Mapping[str, drafter_pb2.DrafterInfo], max_num_nodes: int) -> list[int]:
    """Most tokens each drafter may draft in a row."""
    return [
        min(max_num_nodes, drafter.max_num_draft_tokens or max_num_nodes) for drafter in drafters.values()
    ]


def _proposers(names: Iterable[str], counts: Iterable[int]) -> tuple[Proposer, ...]:
    """Drafters and the most each drafts in a row."""
    return tuple(Proposer(name, count) for name, count in zip(names, counts, strict=True))


async def _tokenise(request: gateway_pb2.GenerateRequest, backends: Backends, context: int) -> list[int]:
    """Token ids of the prompt. What is surely too long is refused before memory is spent on it."""
    if request.WhichOneof("prompt") == "token_ids":
        num_tokens = len(request.token_ids.token_ids)
        if context:
            _require_shorter(num_tokens, context)
        return await asyncio.to_thread(list, request.token_ids.token_ids)
    num_bytes, most = _num_text_bytes(request), backends.config.max_prompt_bytes
    if num_bytes > most:
        raise InvalidArgumentError(
            f"The prompt has {num_bytes} bytes of text, this gateway takes {most}; shorten it.",
            field="prompt",
            reason="PROMPT_TOO_LONG",
        )
    async with backends.long_texts if num_bytes > _LONG_TEXT_BYTES else nullcontext():
        return await asyncio.to_thread(_encode, request, backends.codec)


def _num_text_bytes(request: gateway_pb2.GenerateRequest) -> int:
    # Of a protobuf's text the size on the wire is its UTF-8 and a few bytes for each field.
    return request.chat.ByteSize() if request.WhichOneof("prompt") == "chat" else len(request.text.encode())


def _encode(request: gateway_pb2.GenerateRequest, codec: TextCodec) -> list[int]:
    kind = request.WhichOneof("prompt")
    if kind == "chat":
        return codec.encode_chat([(message.role, message.content) for message in request.chat.messages])
    if kind == "text":
        return codec.encode_text(request.text)
    raise InvalidArgumentError(
        "The request has no prompt; set chat, text or token_ids.", field="prompt", reason="EMPTY_PROMPT"
    )
