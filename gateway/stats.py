"""What a request did: rounds, acceptance by position, times; and the counters of all requests."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from opentelemetry.metrics import Meter

from gateway.decode import Proposal, Round
from specdec.errors import SpecdecError, status_code
from specdec.v1 import gateway_pb2


class SpeculationTally:
    """Sums up the rounds of one request."""

    def __init__(self, method: str) -> None:
        self.method = method
        self.num_rounds = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self.num_fallback_rounds = 0
        self.fallback_reason = ""
        self._accepted: Counter[int] = Counter()
        self._drafted: Counter[int] = Counter()
        self._proposers: dict[str, _ProposerTally] = {}
        self._draft_ns = 0
        self._verify_ns = 0
        self._transport_ns = 0
        self._elapsed_ns = 0
        self._started_ns = 0

    def add(self, this: Round) -> None:
        """Count a round; the prefill only starts the clock."""
        if this.is_prefill:
            self._started_ns = time.monotonic_ns()
            return
        draft, verified = this.draft, this.verified
        self.num_rounds += 1
        self.num_draft_tokens += len(draft.token_ids)
        self.num_accepted_tokens += verified.num_accepted_tokens
        self._accepted[verified.num_accepted_tokens] += 1
        self._drafted[draft.tree.depth] += 1
        for proposal in draft.proposals:
            self._proposers.setdefault(proposal.drafter, _ProposerTally()).add(proposal, this)
        if draft.fallback_reason:
            self.num_fallback_rounds += 1
            self.fallback_reason = draft.fallback_reason
        self._draft_ns += draft.server_ns
        self._verify_ns += verified.server_ns
        elapsed_ns = draft.elapsed_ns + verified.elapsed_ns
        self._elapsed_ns += elapsed_ns
        self._transport_ns += max(0, elapsed_ns - draft.server_ns - verified.server_ns)

    def to_proto(self) -> gateway_pb2.SpeculationStats:
        """The sums, as of now."""
        loop_ns = time.monotonic_ns() - self._started_ns
        longest = max(self._drafted, default=0)
        return gateway_pb2.SpeculationStats(
            method=self.method,
            num_rounds=self.num_rounds,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            acceptance_histogram=[self._accepted[length] for length in range(longest + 1)],
            num_draft_tokens_per_position=_survivors(self._drafted, longest),
            num_accepted_tokens_per_position=_survivors(self._accepted, longest),
            draft_ns=self._draft_ns,
            verify_ns=self._verify_ns,
            transport_ns=self._transport_ns,
            gateway_ns=max(0, loop_ns - self._elapsed_ns) if self.num_rounds else 0,
            num_fallback_rounds=self.num_fallback_rounds,
            fallback_reason=self.fallback_reason,
            proposers=[
                gateway_pb2.ProposerStats(drafter=drafter, **asdict(tally))
                for drafter, tally in self._proposers.items()
            ],
        )


@dataclass(slots=True)
class _ProposerTally:
    """Sums up what one of several drafters contributed; see specdec.v1.ProposerStats."""

    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_sole_accepted_tokens: int = 0
    num_fallback_rounds: int = 0
    fallback_reason: str = ""

    def add(self, proposal: Proposal, this: Round) -> None:
        """Count a round."""
        accepted = proposal.nodes.intersection(this.verified.path)
        others = (other.nodes for other in this.draft.proposals if other is not proposal)
        self.num_draft_tokens += len(proposal.nodes)
        self.num_accepted_tokens += len(accepted)
        self.num_sole_accepted_tokens += len(accepted.difference(*others))
        if proposal.fallback_reason:
            self.num_fallback_rounds += 1
            self.fallback_reason = proposal.fallback_reason


def _survivors(lengths: Counter[int], longest: int) -> list[int]:
    """Entry i: how many of the lengths are greater than i."""
    return [sum(count for length, count in lengths.items() if length > i) for i in range(longest)]


class GatewayMetrics:
    """Counters of all requests. Counters, not ratios: rates and means are for whoever reads them."""

    def __init__(self, meter: Meter) -> None:
        self._drafts = meter.create_counter("specdec.drafts", unit="{draft}")
        self._draft_tokens = meter.create_counter("specdec.draft_tokens", unit="{token}")
        self._accepted_tokens = meter.create_counter("specdec.accepted_tokens", unit="{token}")
        self._accepted_per_position = meter.create_counter(
            "specdec.accepted_tokens_per_position", unit="{token}"
        )
        self._proposed_tokens = meter.create_counter("specdec.proposer.draft_tokens", unit="{token}")
        self._won_tokens = meter.create_counter("specdec.proposer.accepted_tokens", unit="{token}")
        self._rounds = meter.create_counter("specdec.rounds", unit="{round}")
        self._fallback_rounds = meter.create_counter("specdec.fallback_rounds", unit="{round}")
        self._failovers = meter.create_counter(
            "specdec.failovers", unit="{failover}", description="Verifiers lost in mid-generation"
        )
        self._requests = meter.create_counter("specdec.requests", unit="{request}")
        self._duration = meter.create_histogram("gen_ai.server.request.duration", unit="s")
        self._ttft = meter.create_histogram("gen_ai.server.time_to_first_token", unit="s")
        self._tpot = meter.create_histogram("gen_ai.server.time_per_output_token", unit="s")

    def add_round(self, method: str, this: Round) -> None:
        """Count a round after the prefill."""
        if this.is_prefill:
            return
        labels = {"method": method}
        self._rounds.add(1, labels)
        if this.draft.fallback_reason:
            self._fallback_rounds.add(1, labels)
        if not this.draft.token_ids:
            return
        self._drafts.add(1, labels)
        self._draft_tokens.add(len(this.draft.token_ids), labels)
        self._accepted_tokens.add(this.verified.num_accepted_tokens, labels)
        for position in range(this.verified.num_accepted_tokens):
            self._accepted_per_position.add(1, {**labels, "position": position})
        for proposal in this.draft.proposals:
            mine = {**labels, "drafter": proposal.drafter}
            self._proposed_tokens.add(len(proposal.nodes), mine)
            self._won_tokens.add(len(proposal.nodes.intersection(this.verified.path)), mine)

    def add_failover(self, method: str) -> None:
        """Count a verifier that was lost in mid-generation."""
        self._failovers.add(1, {"method": method})

    @contextmanager
    def counting_refusals(self) -> Iterator[None]:
        """Count a request that is refused in the block, before it has a method: its label is empty."""
        try:
            yield
        except SpecdecError as error:
            self._requests.add(1, {"method": "", "outcome": status_code(error).name.lower()})
            raise

    def add_request(
        self, model_id: str, method: str, outcome: str, timing: gateway_pb2.GenerateTiming
    ) -> None:
        """Count a request that ended, `outcome` its finish reason or its error's status code."""
        labels = {
            "gen_ai.operation.name": "chat",
            "gen_ai.provider.name": "specdec",
            "gen_ai.request.model": model_id,
        }
        self._requests.add(1, {"method": method, "outcome": outcome})
        self._duration.record(timing.total_ns / 1e9, labels)
        if timing.ttft_ns:
            self._ttft.record(timing.ttft_ns / 1e9, labels)
        if timing.tpot_ns:
            self._tpot.record(timing.tpot_ns / 1e9, labels)
