"""One generate request, from its message to its last one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from gateway.config import GatewayConfig
from gateway.decode import DraftSource, Round, decode
from gateway.drafting import DrafterSession, DraftLink, NoDrafts
from gateway.registry import DrafterSet, Replica, VerifierSet, find_drafter
from gateway.remote import FINISH_REASONS, RemoteDrafterSession, RemoteVerifierSession
from gateway.stats import GatewayMetrics, SpeculationTally
from gateway.text import TextCodec, TextStream, TextToken, validate_stop_strings
from gateway.tracing import RequestTrace
from specdec.errors import InvalidArgumentError
from specdec.handshake import make_handshake
from specdec.sampling import SamplingParams, validate_num_top_logprobs
from specdec.v1 import common_pb2, drafter_pb2, gateway_pb2, verifier_pb2

PLAIN = "none"
"""Method of plain decoding: no drafter, K = 0."""

_UNKNOWN_DRAFTER = drafter_pb2.DrafterInfo(default_num_draft_tokens=4)
"""Stands for a drafter whose service was never reached: it may come up while the request runs."""

VerifierReplica = Replica[verifier_pb2.VerifierServiceGetInfoResponse]


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
    if method != PLAIN and method not in known and backends.drafters.all_known:
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


class Generation:
    """Runs one plan on one verifier and, while one is healthy, one drafter."""

    def __init__(
        self,
        request: gateway_pb2.GenerateRequest,
        plan: Plan,
        backends: Backends,
        trace: RequestTrace,
        *,
        timeout_s: float | None,
        arrived_ns: int,
    ) -> None:
        self._request = request
        self._plan = plan
        self._backends = backends
        self._trace = trace
        self._timeout_s = timeout_s
        self._arrived_ns = arrived_ns
        self._first_ns = 0
        self._last_ns = 0
        self._num_output_tokens = 0
        self._text = TextStream(backends.codec, request.stop_strings)
        self._tally = SpeculationTally(plan.method)
        self._emitted: list[gateway_pb2.Token] = []

    async def run(self, verifier: VerifierReplica) -> AsyncGenerator[gateway_pb2.GenerateResponse]:
        """Chunks, then the closing message.

        Raises:
            SpecdecError: the verifier refused or was lost.
        """
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(
                RemoteVerifierSession(verifier.channel, verifier.uri, self._open_message(), self._timeout_s)
            )
            rounds = await stack.enter_async_context(
                aclosing(
                    decode(
                        session,
                        await self._draft_source(stack, verifier),
                        prompt_token_ids=self._plan.prompt_token_ids,
                        max_new_tokens=self._plan.max_new_tokens,
                        num_draft_tokens=self._plan.num_draft_tokens,
                        trace=self._trace,
                    )
                )
            )
            finish_reason = ""
            async for this in rounds:
                chunk = self._take(this)
                finish_reason = "stop_string" if self._text.stopped else this.verified.finish_reason
                if chunk.tokens:
                    yield gateway_pb2.GenerateResponse(chunk=chunk)
                if finish_reason:
                    break
        finished = self._finished(finish_reason)
        yield gateway_pb2.GenerateResponse(finished=finished)

    def timing(self) -> gateway_pb2.GenerateTiming:
        """Times so far."""
        num_later = self._num_output_tokens - 1
        return gateway_pb2.GenerateTiming(
            ttft_ns=self._first_ns - self._arrived_ns if self._first_ns else 0,
            tpot_ns=(self._last_ns - self._first_ns) // num_later if num_later > 0 else 0,
            total_ns=(self._last_ns or time.monotonic_ns()) - self._arrived_ns,
        )

    def _take(self, this: Round) -> gateway_pb2.GenerateChunk:
        """Count a round and turn its tokens into text."""
        self._last_ns = time.monotonic_ns()
        self._first_ns = self._first_ns or self._last_ns
        self._tally.add(this)
        self._backends.metrics.add_round(self._plan.method, this)
        released: list[TextToken] = []
        for index, token_id in enumerate(this.token_ids):
            self._emitted.append(_token(this, index))
            released += self._text.push(token_id)
            if self._text.stopped:
                break
        if this.verified.finish_reason and not self._text.stopped:
            released += self._text.flush()
        self._num_output_tokens = self._text.num_tokens
        return gateway_pb2.GenerateChunk(tokens=[self._with_text(token) for token in released])

    def _with_text(self, released: TextToken) -> gateway_pb2.Token:
        token = self._emitted[released.index]
        token.text = released.text
        return token

    def _finished(self, finish_reason: str) -> gateway_pb2.GenerateFinished:
        number = next(number for number, name in FINISH_REASONS.items() if name == finish_reason)
        return gateway_pb2.GenerateFinished(
            finish_reason=number,
            usage=gateway_pb2.Usage(
                input_tokens=len(self._plan.prompt_token_ids), output_tokens=self._num_output_tokens
            ),
            timing=self.timing(),
            speculation=self._tally.to_proto(),
        )

    def _open_message(self) -> verifier_pb2.VerifyOpen:
        request = self._request
        message = verifier_pb2.VerifyOpen(
            handshake=make_handshake(vocabulary_fingerprint=self._backends.codec.vocabulary_fingerprint),
            prompt_token_ids=self._plan.prompt_token_ids,
            sampling=request.sampling,
            stop_token_ids=request.stop_token_ids,
            ignore_eos=request.ignore_eos,
            max_new_tokens=self._plan.max_new_tokens,
        )
        if request.HasField("num_top_logprobs"):
            message.num_top_logprobs = request.num_top_logprobs
        return message

    async def _draft_source(self, stack: AsyncExitStack, verifier: VerifierReplica) -> DraftSource:
        if not self._plan.num_draft_tokens:
            return NoDrafts()
        assert verifier.info is not None
        link = DraftLink(
            self._connect_drafter,
            self._plan.prompt_token_ids,
            vocab_size=verifier.info.model.vocab_size,
            timeout_s=self._backends.config.draft_timeout_s,
        )
        return await stack.enter_async_context(link)

    async def _connect_drafter(self, committed_token_ids: Sequence[int]) -> DrafterSession:
        """Open a session on the least busy replica that offers the method."""
        method, plan = self._plan.method, self._plan
        replica = self._backends.drafters.pick(lambda info: find_drafter(info, method) is not None)
        session = RemoteDrafterSession(replica.channel, replica.uri, self._timeout_s)
        leased = LeasedDrafterSession(session, replica)
        try:
            await session.open(
                drafter_pb2.DraftOpen(
                    handshake=make_handshake(
                        vocabulary_fingerprint=self._backends.codec.vocabulary_fingerprint
                    ),
                    drafter=method,
                    committed_token_ids=committed_token_ids,
                    prompt_length=len(plan.prompt_token_ids),
                    sampling=self._request.sampling,
                    max_length=len(plan.prompt_token_ids) + plan.max_new_tokens,
                )
            )
        except BaseException:
            await leased.close()
            raise
        return leased


class LeasedDrafterSession:
    """A drafter session that counts against its replica until it is closed."""

    def __init__(
        self, session: RemoteDrafterSession, replica: Replica[drafter_pb2.DrafterServiceGetInfoResponse]
    ) -> None:
        self._lease = replica.lease()
        self._lease.__enter__()
        self.propose = session.propose
        self._session = session

    async def close(self) -> None:
        """End the session."""
        self._lease.__exit__(None, None, None)
        await self._session.close()


def _token(this: Round, index: int) -> gateway_pb2.Token:
    """Token `index` of a round, its text not yet known."""
    accepted = index < this.verified.num_accepted_tokens
    token = gateway_pb2.Token(
        token_id=this.token_ids[index],
        origin=gateway_pb2.TOKEN_ORIGIN_ACCEPTED_DRAFT if accepted else gateway_pb2.TOKEN_ORIGIN_BONUS,
    )
    if this.verified.logprobs:
        own, top = this.verified.logprobs[index]
        candidates = [common_pb2.Candidate(token_id=i, logprob=lp) for i, lp in top]
        token.logprobs.CopyFrom(common_pb2.TokenLogprobs(logprob=own, top=candidates))
    return token
