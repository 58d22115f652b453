"""Sums of what a request did: rounds, acceptance by position, times."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from gateway.rounds.records import DrafterRecords
from gateway.rounds.vocabulary import Proposal, Round
from specdec.contract.methods import AUTO, method_of


@dataclass(frozen=True, slots=True)
class ProposerStats:
    """What one of several drafters contributed; field by field specdec.v1.ProposerStats."""

    drafter: str
    num_draft_tokens: int
    num_accepted_tokens: int
    num_sole_accepted_tokens: int
    num_fallback_rounds: int
    fallback_reason: str


@dataclass(frozen=True, slots=True)
class MethodRounds:
    """How often a method drafted; field by field specdec.v1.MethodRounds."""

    method: str
    num_rounds: int


@dataclass(frozen=True, slots=True)
class SpeculationStats:
    """What the rounds of a request did; field by field specdec.v1.SpeculationStats."""

    method: str
    num_rounds: int
    num_draft_tokens: int
    num_accepted_tokens: int
    acceptance_histogram: list[int]
    num_draft_tokens_per_position: list[int]
    num_accepted_tokens_per_position: list[int]
    draft_ns: int
    verify_ns: int
    transport_ns: int
    gateway_ns: int
    num_fallback_rounds: int
    fallback_reason: str
    proposers: list[ProposerStats]
    methods: list[MethodRounds]


class _Fallbacks:
    """Counts why drafts were missing. Reasons differ in their figures, so their codes tell them apart."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._latest: dict[str, str] = {}

    def add(self, code: str, reason: str) -> None:
        """Count a round without a draft."""
        self._counts[code] += 1
        self._latest[code] = reason

    @property
    def count(self) -> int:
        """How many rounds had no draft."""
        return self._counts.total()

    @property
    def commonest(self) -> str:
        """The latest reason of the commonest code, the first of several; empty: no draft was missing."""
        return self._latest[self._counts.most_common(1)[0][0]] if self._counts else ""


class SpeculationTally:
    """Sums up the rounds of one request.

    Args:
        records: of the method's drafters by name; the statistics say of which drafter the drafts are never
            right, whether rounds went without them or not.
    """

    def __init__(self, method: str, records: Mapping[str, DrafterRecords] | None = None) -> None:
        self.method = method
        self._records = records or {}
        self.num_rounds = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._fallbacks = _Fallbacks()
        self._accepted: Counter[int] = Counter()
        self._drafted: Counter[int] = Counter()
        self._proposers: dict[str, _ProposerTally] = {}
        self._methods: Counter[str] = Counter()
        self._draft_ns = 0
        self._verify_ns = 0
        self._transport_ns = 0
        self._elapsed_ns = 0
        self._started_ns = 0

    def add(self, completed: Round) -> None:
        """Count a round; the prefill only starts the clock."""
        if completed.is_prefill:
            self._started_ns = completed.ended_ns
            return
        draft, verified = completed.draft, completed.verified
        self.num_rounds += 1
        self.num_draft_tokens += len(draft.token_ids)
        self.num_accepted_tokens += verified.num_accepted_tokens
        self._accepted[verified.num_accepted_tokens] += 1
        self._drafted[draft.tree.depth] += 1
        self._methods[method_of([proposal.drafter for proposal in draft.proposals])] += 1
        for proposal in draft.proposals:
            self._proposers.setdefault(proposal.drafter, _ProposerTally()).add(proposal, completed)
        if draft.fallback_reason:
            self._fallbacks.add(draft.fallback_code, draft.fallback_reason)
        self._draft_ns += draft.server_ns
        self._verify_ns += verified.server_ns
        self._elapsed_ns += completed.elapsed_ns
        self._transport_ns += completed.transport_ns

    def stats(self) -> SpeculationStats:
        """Return the sums, as of now."""
        loop_ns = time.monotonic_ns() - self._started_ns
        longest = max(self._drafted, default=0)
        return SpeculationStats(
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
            num_fallback_rounds=self._fallbacks.count,
            fallback_reason=_joined(self._fallbacks.commonest, self._verdict()),
            proposers=[
                tally.stats(drafter, self._records[drafter].verdict if drafter in self._records else "")
                for drafter, tally in self._proposers.items()
            ],
            methods=[MethodRounds(*each) for each in self._methods.most_common()]
            if self.method == AUTO
            else [],
        )

    def _verdict(self) -> str:
        """Return what the records say, unless it is said of each proposer."""
        verdicts = {drafter: verdict for drafter, of in self._records.items() if (verdict := of.verdict)}
        if self._proposers or not verdicts:
            return ""
        if len(self._records) == 1:
            return next(iter(verdicts.values()))
        return "; ".join(f"{drafter}: {verdict}" for drafter, verdict in verdicts.items())


@dataclass(slots=True)
class _ProposerTally:
    """Sums up what one of several drafters contributed."""

    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_sole_accepted_tokens: int = 0
    fallbacks: _Fallbacks = field(default_factory=_Fallbacks)

    def add(self, proposal: Proposal, completed: Round) -> None:
        """Count a round."""
        accepted = proposal.nodes.intersection(completed.verified.path)
        others = (other.nodes for other in completed.draft.proposals if other is not proposal)
        self.num_draft_tokens += len(proposal.nodes)
        self.num_accepted_tokens += len(accepted)
        self.num_sole_accepted_tokens += len(accepted.difference(*others))
        if proposal.fallback_reason:
            self.fallbacks.add(proposal.fallback_code, proposal.fallback_reason)

    def stats(self, drafter: str, verdict: str) -> ProposerStats:
        """Return the sums, as of now, and what the drafter's record says."""
        return ProposerStats(
            drafter=drafter,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            num_sole_accepted_tokens=self.num_sole_accepted_tokens,
            num_fallback_rounds=self.fallbacks.count,
            fallback_reason=_joined(self.fallbacks.commonest, verdict),
        )


def _joined(*reasons: str) -> str:
    """Return the reasons there are, each once."""
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason))


def _survivors(lengths: Counter[int], longest: int) -> list[int]:
    """Return at entry i how many of the lengths are greater than i."""
    return [sum(count for length, count in lengths.items() if length > i) for i in range(longest)]
