"""One generate request, from its message to its last one."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict
from functools import partial

from gateway.replicas.failover import LastingVerifierSession, VerifierReplica
from gateway.replicas.replicas import Replica, find_drafter
from gateway.replicas.sessions import FINISH_REASONS, RemoteDrafterSession, RemoteVerifierSession
from gateway.request.backends import Backends
from gateway.request.drafts import Proposer
from gateway.request.plan import Plan
from gateway.request.text import TextStream, TextToken
from gateway.rounds.decode import decode
from gateway.rounds.drafting import DraftLink, NoDrafts
from gateway.rounds.link_states import DrafterSession
from gateway.rounds.merging import MergedDrafts, NamedSource
from gateway.rounds.stats import SpeculationStats, SpeculationTally
from gateway.rounds.tracing import RequestTrace
from gateway.rounds.vocabulary import DraftSource, Round
from specdec.contract.request_id import REQUEST_ID
from specdec.contract.target_state import TargetStateSpec
from specdec.service.auth import caller_key
from specdec.transport.handshake import make_handshake
from specdec.v1 import common_pb2, drafter_pb2, gateway_pb2, verifier_pb2


class Generation:
    """Runs one plan on one verifier and, while they are healthy, its drafters."""

    def __init__(
        self,
        plan: Plan,
        backends: Backends,
        trace: RequestTrace,
        *,
        timeout_s: float | None,
        arrived_ns: int,
    ) -> None:
        self._plan = plan
        self._backends = backends
        self._trace = trace
        self._timeout_s = timeout_s
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._num_failovers = 0
        self._arrived_ns = arrived_ns
        self._first_ns = 0
        self._last_ns = 0
        self.num_output_tokens = 0
        """Tokens of the text so far."""
        self._text = TextStream(backends.codec, plan.stop_strings)
        self._tally = SpeculationTally(plan.method)
        self.label = backends.label(plan.method)
        """The method in metrics."""
        self._emitted: list[gateway_pb2.Token] = []
        self._state_spec = self._find_state_spec()
        self._verifier_uri = ""

    async def run(self, verifier: VerifierReplica) -> AsyncGenerator[gateway_pb2.GenerateResponse]:
        """Chunks, then the closing message.

        Raises:
            SpecdecError: the verifier refused or was lost.
        """
        self._verifier_uri = verifier.uri
        async with AsyncExitStack() as stack:
            # Closed in reverse order: the verifier's slot is freed first, a drafter may be slow to go.
            drafter = await self._draft_source(stack, verifier)
            session = await stack.enter_async_context(self._verifier_session(verifier))
            rounds = decode(
                session,
                drafter,
                prompt_token_ids=self._plan.prompt_token_ids,
                max_new_tokens=self._plan.max_new_tokens,
                control=self._plan.drafting.control(self._backends.controller, verifier),
                trace=self._trace,
            )
            await stack.enter_async_context(aclosing(rounds))
            finish_reason = ""
            async for this in rounds:
                chunk = self._take(this)
                finish_reason = "stop_string" if self._text.stopped else this.verified.finish_reason
                if chunk.tokens:
                    yield gateway_pb2.GenerateResponse(chunk=chunk)
                if finish_reason:
                    break
            yield gateway_pb2.GenerateResponse(finished=self._finished(finish_reason))

    def timing(self) -> gateway_pb2.GenerateTiming:
        """Times so far."""
        num_later = self.num_output_tokens - 1
        return gateway_pb2.GenerateTiming(
            ttft_ns=self._first_ns - self._arrived_ns if self._first_ns else 0,
            tpot_ns=(self._last_ns - self._first_ns) // num_later if num_later > 0 else 0,
            total_ns=(self._last_ns or time.monotonic_ns()) - self._arrived_ns,
        )

    def speculation(self) -> SpeculationStats:
        """What its rounds did so far."""
        return self._tally.stats()

    def _take(self, this: Round) -> gateway_pb2.GenerateChunk:
        """Count a round and turn its tokens into text."""
        self._last_ns = time.monotonic_ns()
        self._first_ns = self._first_ns or self._last_ns
        self._tally.add(this)
        self._backends.metrics.add_round(self.label, this)
        released: list[TextToken] = []
        for index, token_id in enumerate(this.token_ids):
            self._emitted.append(_token(this, index))
            released += self._text.push(token_id)
            if self._text.stopped:
                break
        if this.verified.finish_reason and not self._text.stopped:
            released += self._text.flush()
        self.num_output_tokens = self._text.num_tokens
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
                input_tokens=len(self._plan.prompt_token_ids), output_tokens=self.num_output_tokens
            ),
            timing=self.timing(),
            speculation=gateway_pb2.SpeculationStats(**asdict(self.speculation())),
            num_failovers=self._num_failovers,
        )

    def _verifier_session(self, first: VerifierReplica) -> LastingVerifierSession:
        assert first.info is not None
        model = first.info.model
        return LastingVerifierSession(
            first,
            self._connect_verifier,
            partial(self._backends.verifiers.pick, partial(_is_same_model, model)),
            prompt_token_ids=self._plan.prompt_token_ids,
            wait_s=self._backends.config.failover_wait_s,
            on_lost=self._count_failover,
        )

    def _count_failover(self, reason: str) -> None:
        self._num_failovers += 1
        self._backends.metrics.add_failover(self.label)

    def _connect_verifier(
        self, verifier: VerifierReplica, committed_token_ids: Sequence[int]
    ) -> RemoteVerifierSession:
        timeout_s = None if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())
        message = self._open_message(verifier, committed_token_ids)
        self._verifier_uri = verifier.uri
        return RemoteVerifierSession(verifier.channel, verifier.uri, message, timeout_s)

    def _open_message(
        self, verifier: VerifierReplica, committed_token_ids: Sequence[int]
    ) -> verifier_pb2.VerifyOpen:
        plan, info = self._plan, verifier.info
        prompt_length = len(plan.prompt_token_ids)
        assert info is not None
        return verifier_pb2.VerifyOpen(
            handshake=make_handshake(info.model.model_id, self._backends.codec.vocabulary_fingerprint),
            committed_token_ids=committed_token_ids,
            prompt_length=prompt_length,
            sampling=plan.sampling.to_proto(),
            stop_token_ids=plan.stop_token_ids,
            ignore_eos=plan.ignore_eos,
            max_new_tokens=plan.max_new_tokens + prompt_length - len(committed_token_ids),
            num_top_logprobs=plan.num_top_logprobs,
            target_state_spec=self._state_spec.to_proto() if self._state_spec else None,
            draft_nodes=plan.drafting.num_reserved_nodes,
            request_id=REQUEST_ID.get(),
            caller_key=caller_key(),
            cache_salt=plan.cache_salt,
        )

    async def _draft_source(self, stack: AsyncExitStack, verifier: VerifierReplica) -> DraftSource:
        drafting = self._plan.drafting
        sources = [
            NamedSource(
                proposer.drafter,
                await stack.enter_async_context(self._link(proposer, verifier)),
                proposer.draft_depth,
            )
            for proposer in drafting.proposers
            if proposer.draft_depth
        ]
        if len(sources) > 1:
            return await stack.enter_async_context(MergedDrafts(sources, drafting.draft_nodes))
        return sources[0].source if sources else NoDrafts()

    def _link(self, proposer: Proposer, verifier: VerifierReplica) -> DraftLink:
        assert verifier.info is not None
        return DraftLink(
            partial(self._connect_drafter, proposer.drafter),
            self._plan.prompt_token_ids,
            vocab_size=verifier.info.model.vocab_size,
            timeout_s=self._backends.config.draft_timeout_s,
        )

    def _find_state_spec(self) -> TargetStateSpec | None:
        """What the drafters read of the target; None: nothing, or no such drafters are known yet.

        Of drafters that cannot be served together the first is.
        """
        session: TargetStateSpec | None = None
        for proposer in self._plan.drafting.proposers:
            infos = self._backends.drafters.known_infos
            found = (find_drafter(info, proposer.drafter) for info in infos)
            spec = _state_spec(next((drafter for drafter in found if drafter), None))
            if spec:
                session = (session.union(spec) or session) if session else spec
        return session

    def _fits(self, name: str, info: drafter_pb2.DrafterServiceGetInfoResponse) -> bool:
        """Whether a drafter service has the drafter, reading what this session's verifier exports."""
        drafter = find_drafter(info, name)
        if drafter is None:
            return False
        spec, session = _state_spec(drafter), self._state_spec
        return spec is None or (session is not None and session.union(spec) == session)

    async def _connect_drafter(self, name: str, committed_token_ids: Sequence[int]) -> DrafterSession:
        """Open a session on a replica that offers the drafter, best one beside the verifier."""
        plan = self._plan
        replica = self._backends.drafters.pick(partial(self._fits, name), near=self._verifier_uri)
        assert replica.info is not None
        drafter = find_drafter(replica.info, name)
        assert drafter is not None
        session = RemoteDrafterSession(replica.channel, replica.uri, self._timeout_s, drafter)
        leased = LeasedDrafterSession(session, replica)
        try:
            await session.open(
                drafter_pb2.DraftOpen(
                    handshake=make_handshake(
                        vocabulary_fingerprint=self._backends.codec.vocabulary_fingerprint
                    ),
                    drafter=name,
                    committed_token_ids=committed_token_ids,
                    prompt_length=len(plan.prompt_token_ids),
                    sampling=plan.sampling.to_proto(),
                    max_length=len(plan.prompt_token_ids) + plan.max_new_tokens,
                    min_draft_confidence=plan.min_draft_confidence,
                    request_id=REQUEST_ID.get(),
                    caller_key=caller_key(),
                    cache_salt=plan.cache_salt,
                )
            )
        except BaseException:
            await leased.close()
            raise
        return leased


def _is_same_model(model: common_pb2.ModelInfo, info: verifier_pb2.VerifierServiceGetInfoResponse) -> bool:
    """Whether a verifier would go on as another one with that model: revisions are compared where known."""
    revisions = {model.revision, info.model.revision} - {""}
    return info.model.model_id == model.model_id and len(revisions) <= 1


class LeasedDrafterSession:
    """A drafter session that counts against its replica until it is closed."""

    def __init__(
        self, session: RemoteDrafterSession, replica: Replica[drafter_pb2.DrafterServiceGetInfoResponse]
    ) -> None:
        self._lease = replica.lease()
        self._lease.__enter__()
        self.propose = session.propose
        self.reads_target_state = session.reads_target_state
        self._session = session

    async def close(self) -> None:
        """End the session."""
        self._lease.__exit__(None, None, None)
        await self._session.close()


def _state_spec(drafter: drafter_pb2.DrafterInfo | None) -> TargetStateSpec | None:
    """What a drafter reads of the target."""
    if drafter is None or not drafter.HasField("target_state_spec"):
        return None
    return TargetStateSpec.from_proto(drafter.target_state_spec)


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
