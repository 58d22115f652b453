"""What rounds cost and bring, as measured: passes by verifier, drafts by method and node budget."""

from __future__ import annotations

from dataclasses import dataclass, field

from gateway.rounds.estimates import Curve, Mean, Median, Survival
from gateway.rounds.vocabulary import DraftSize, Round

_DRAFTS_TO_KNOW = 3
"""How many drafts it takes to know a node budget's cost."""
_CAUTION = 0.3
"""What drafts must bring beyond plain decoding, as a share, where very many sessions share a pass. A session
that is alone needs to bring nothing beyond."""
_FIRST_GUESS = 0.6
"""Acceptance at any depth before anything is known."""
_GUESS_ROUNDS = 4.0
"""How many rounds of a method the first guess weighs."""
_METHOD_MEMORY = 0.995
"""What a round's weight becomes with the next one."""


class VerifierLoad:
    """What passes of one verifier cost now."""

    def __init__(self) -> None:
        self.pass_ns = Curve()
        """Compute time by tokens of a pass."""
        self.batch_size = Mean(1.0)
        self.queue_share = Median()
        """Time an item waits for its pass, over that of the pass. An item that comes while a pass runs waits
        for its end, the longer the more everyone drafts."""
        self.transport_ns = Median()
        """The rest of the time until an answer is here."""

    def observe(self, completed: Round) -> None:
        """Take a round's timings in."""
        verified = completed.verified
        if completed.is_prefill or not verified.compute_ns:
            return
        self.pass_ns.add(verified.batch_tokens, verified.compute_ns)
        self.batch_size.add(verified.batch_size)
        self.queue_share.add(max(0, verified.server_ns - verified.compute_ns) / verified.compute_ns)
        self.transport_ns.add(max(0, verified.elapsed_ns - verified.server_ns))

    @property
    def caution(self) -> float:
        """Factor by which drafts must beat plain decoding: not all sessions that share passes draft as well,
        and those that do not draft pay for those that do."""
        return 1 + _CAUTION * (1 - 1 / max(1.0, self.batch_size.value))

    def round_ns(self, num_nodes: float) -> float:
        """Time of a verify with that many draft tokens, every session of the pass having as many."""
        pass_ns = self.pass_ns(self.batch_size.value * (num_nodes + 1))
        return pass_ns * (1 + self.queue_share.value) + self.transport_ns.value


@dataclass(slots=True)
class MethodStats:
    """What drafts of one method with one node budget cost and bring, over all sessions."""

    num_nodes: Curve
    """Tokens drafted, by K."""
    draft_ns: Curve = field(default_factory=lambda: Curve(through_origin=True))
    """Time until a draft is here, by K."""
    token_ns: Curve = field(default_factory=Curve)
    """Time until a draft is here, by the tokens that it has."""
    survival: Survival = field(default_factory=lambda: Survival(_METHOD_MEMORY))
    num_timed: int = 0
    """How many drafts were timed."""

    @classmethod
    def of(cls, budget: int) -> MethodStats:
        """Return the start with a node budget (0: chains). A tree uses its budget at any depth, a chain K
        tokens.
        """
        return cls(Curve(Mean, through_origin=not budget))

    @property
    def is_known(self) -> bool:
        """Whether the cost of the drafts is more than a first impression."""
        return self.num_timed >= _DRAFTS_TO_KNOW

    def observe(self, size: DraftSize, completed: Round) -> None:
        """Take in a round that asked for such a draft."""
        if not completed.draft.is_first:
            self.num_timed += 1
            self.draft_ns.add(size.draft_depth, completed.draft.elapsed_ns)
            self.token_ns.add(len(completed.draft.token_ids), completed.draft.elapsed_ns)
        self.num_nodes.add(size.draft_depth, len(completed.draft.token_ids))
        self.survival.add(size.draft_depth, completed.verified.num_accepted_tokens)

    def further_ns(self, num_tokens: float) -> float:
        """Return what a further token of such a draft costs the drafter, nanoseconds."""
        first = min(1.0, num_tokens)
        return (self.token_ns(num_tokens) - self.token_ns(first)) / max(1.0, num_tokens - first)

    def rates(self, depth: int) -> list[float]:
        """Return the acceptance at the first depths."""
        return self.survival.rates(depth, [_FIRST_GUESS] * depth, _GUESS_ROUNDS)
