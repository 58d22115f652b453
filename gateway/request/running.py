"""One generate request while it runs: its rounds become text, times and sums."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import asdict

from gateway.place import Place
from gateway.replicas.failover import VerifierReplica
from gateway.request.answer_times import RunningAnswer
from gateway.request.backends import Backends
from gateway.request.peers import Peers
from gateway.request.plan import Plan
from gateway.request.text_stream import TextStream, TextToken
from gateway.rounds.ahead import one_ahead
from gateway.rounds.controller import FixedSize
from gateway.rounds.decode import decode
from gateway.rounds.drafting import NoDrafts
from gateway.rounds.merging import MergedDrafts
from gateway.rounds.stats import SpeculationStats, SpeculationTally
from gateway.rounds.tracing import RequestTrace
from gateway.rounds.vocabulary import PLAIN_SIZE, RequestDrafts, Round, SizeControl
from specdec.contract.errors import SpecdecError
from specdec.contract.finish_reasons import FINISH_REASONS
from specdec.contract.retry import Progress
from specdec.v1 import common_pb2, gateway_pb2


class RunningRequest:
    """Runs one plan on its peers and turns the rounds into responses."""

    def __init__(
        self,
        plan: Plan,
        backends: Backends,
        peers: Peers,
        trace: RequestTrace,
        place: Place,
        *,
        arrived_ns: int,
    ) -> None:
        self._plan = plan
        self._backends = backends
        self._peers = peers
        self._trace = trace
        self._place = place
        self._num_failovers = 0
        self._num_reused_tokens = 0
        self._arrived_ns = arrived_ns
        self._first_ns = 0
        self._last_ns = 0
        self.num_output_tokens = 0
        """Tokens of the text so far."""
        continued = plan.prompt_token_ids if plan.continues_text else ()
        self._text = TextStream(backends.codec, plan.stop_strings, continued)
        self._tally = SpeculationTally(plan.method, peers.records)
        self.label = backends.label(plan.method)
        """The method as metrics name it."""
        self._emitted: list[gateway_pb2.Token] = []
        self._drafts: RequestDrafts = NoDrafts()
        self._answer = RunningAnswer(backends.answer_times)
        self._control: SizeControl = FixedSize(PLAIN_SIZE)

    async def responses(self) -> AsyncGenerator[gateway_pb2.GenerateResponse]:
        """Run the request: chunks, then the closing message.

        Raises:
            SpecdecError: the verifier refused or was lost.
        """
        async with AsyncExitStack() as stack:
            self._answer = stack.enter_context(self._backends.answer_times.running())
            # Left in reverse order, the verifier's slot is freed first: a drafter may be slow to go.
            self._control = control = self._plan.drafting.control(
                self._backends.controller, self._peers.verifier, is_greedy=self._plan.sampling.is_greedy
            )
            stack.callback(control.close)
            self._drafts = await self._peers.enter_draft_source(stack, control.first_method)
            if isinstance(self._drafts, MergedDrafts):
                control.follow(self._drafts.is_open)
            stack.callback(self._place.gave_room)
            session = await stack.enter_async_context(self._peers.verifier_session(self))
            rounds = decode(
                session,
                self._drafts,
                prompt_token_ids=self._plan.prompt_token_ids,
                max_new_tokens=self._plan.max_new_tokens,
                control=control,
                trace=self._trace,
            )
            await stack.enter_async_context(aclosing(rounds))
            if not self._plan.stop_strings:
                # Only the text tells whether a stop string ends the generation and there is no next round.
                rounds = await stack.enter_async_context(aclosing(one_ahead(rounds)))
            finish_reason = ""
            async for current in rounds:
                chunk = self._take(current)
                finish_reason = "stop_string" if self._text.stopped else current.verified.finish_reason
                if chunk.tokens or self._backends.config.stream_padding:
                    yield gateway_pb2.GenerateResponse(chunk=chunk)
                if finish_reason:
                    break
            yield gateway_pb2.GenerateResponse(finished=self._finished(finish_reason))

    def timing(self) -> gateway_pb2.GenerateTiming:
        """Return the times so far."""
        num_later = self.num_output_tokens - 1
        return gateway_pb2.GenerateTiming(
            ttft_ns=self._first_ns - self._arrived_ns if self._first_ns else 0,
            tpot_ns=(self._last_ns - self._first_ns) // num_later if num_later > 0 else 0,
            total_ns=(self._last_ns or time.monotonic_ns()) - self._arrived_ns,
            waiting_ns=int(self._place.waited_s * 1e9),
        )

    def progress(self) -> Progress:
        """Return how far the request has come, for those who wait for its end."""
        return Progress(
            begun_at=self._arrived_ns / 1e9 + self._place.waited_s,
            num_done=self.num_output_tokens,
            num_left=max(0, self._plan.max_new_tokens - self.num_output_tokens),
        )

    def speculation(self) -> SpeculationStats:
        """Return what the request's rounds did so far."""
        return self._tally.stats()

    def _take(self, completed: Round) -> gateway_pb2.GenerateChunk:
        """Count a round and turn its tokens into text."""
        self._last_ns = time.monotonic_ns()
        self._first_ns = self._first_ns or self._last_ns
        released: list[TextToken] = []
        for token_id in completed.token_ids:
            released += self._text.push(token_id)
            if self._text.stopped:
                break
        self._place.took_room()
        if completed.is_prefill:
            self._num_reused_tokens = completed.verified.num_reused_tokens
        # What comes after a stop string was never emitted, and counts nowhere.
        emitted = completed.ended_after(self._text.num_tokens - self.num_output_tokens)
        self._tally.add(emitted)
        self._backends.metrics.add_round(self.label, emitted)
        if completed.is_prefill:
            self._answer.read(len(self._plan.prompt_token_ids), completed.verified.elapsed_ns / 1e9)
        else:
            self._answer.came(len(emitted.token_ids))
        self._emitted += [_token(emitted, index) for index in range(len(emitted.token_ids))]
        if completed.verified.finish_reason and not self._text.stopped:
            released += self._text.flush()
        self.num_output_tokens = self._text.num_tokens
        return gateway_pb2.GenerateChunk(tokens=[self._with_text(token) for token in released])

    def _with_text(self, released: TextToken) -> gateway_pb2.Token:
        token = self._emitted[released.index]
        token.text = released.text
        return token

    def _finished(self, finish_reason: str) -> gateway_pb2.GenerateFinished:
        # One that was to be no longer might have been.
        self._answer.is_whole = finish_reason != "length"
        number = next(number for number, name in FINISH_REASONS.items() if name == finish_reason)
        return gateway_pb2.GenerateFinished(
            finish_reason=number,
            usage=gateway_pb2.Usage(
                input_tokens=len(self._plan.prompt_token_ids),
                output_tokens=self.num_output_tokens,
                reused_input_tokens=self._num_reused_tokens,
            ),
            timing=self.timing(),
            speculation=gateway_pb2.SpeculationStats(**asdict(self.speculation())),
            num_failovers=self._num_failovers,
        )

    def runs_on(self, replica: VerifierReplica) -> None:
        """Take note that a verifier has the session from now on."""
        self._control.goes_on_at(replica)

    def lost_verifier(self, reason: str) -> None:
        """Take note that the verifier was lost."""
        self._place.lost_room()
        self._num_failovers += 1
        self._backends.metrics.add_failover(self.label)

    def was_preempted(self) -> None:
        """Take note that the verifier needs its room for older sessions."""
        self._trace.preempted(self.num_output_tokens)
        self._backends.metrics.add_preemption(self.label)

    async def turn_again(self, refusal: SpecdecError, committed_token_ids: Sequence[int]) -> None:
        """Wait in the middle of the answer until verifiers may have room again; the deadline goes on, and
        drafters have their room for others."""
        await self._drafts.let_go()
        with self._answer.waiting():
            await self._place.turn_again(refusal)
        await self._drafts.open_again(committed_token_ids)


def _token(completed: Round, index: int) -> gateway_pb2.Token:
    """Return token `index` of a round; its text is not yet known."""
    accepted = index < completed.verified.num_accepted_tokens
    token = gateway_pb2.Token(
        token_id=completed.token_ids[index],
        origin=gateway_pb2.TOKEN_ORIGIN_ACCEPTED_DRAFT if accepted else gateway_pb2.TOKEN_ORIGIN_BONUS,
    )
    if completed.verified.logprobs:
        own, top = completed.verified.logprobs[index]
        candidates = [common_pb2.Candidate(token_id=i, logprob=lp) for i, lp in top]
        token.logprobs.CopyFrom(common_pb2.TokenLogprobs(logprob=own, top=candidates))
    return token
