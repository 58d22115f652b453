"""What rounds cost and bring, as measured: passes by verifier, drafts by method, node budget and load."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from gateway.rounds.estimates import NEW_SHARE, Curve, Mean, Median, Survival
from gateway.rounds.vocabulary import DraftSize, Round
from specdec.contract.methods import PLAIN
from specdec.contract.step_costs import StepCosts

_SHARE_OF_ALL = 0.02
"""Weight of a round among those of all sessions once there are many."""
_ROUNDS_OF_FREE_EXPERIMENTS = 100
"""How many rounds of a verifier may try as much as there is to learn."""
_SHARE_OF_EXPERIMENTS = 0.03
"""Most of the time of all sessions that choices may take which are made to learn."""
_EXPERIMENTS_MEMORY = 0.998
"""What a round's time becomes with the next one."""
_MOST_PASSES = 1 / 0.003
"""How many rounds the knowledge of what passes cost goes back."""
_MOST_OFF = 1.5
"""By which factor a pass may be off what is usual and still count as it is."""
_LEAST_VARIANCE = 0.25
"""How much the tokens of passes must differ, in squares, to tell what one costs."""
_DRAFTS_TO_KNOW = 3
"""How many drafts it takes to know a node budget's cost."""
_METHOD_MEMORY = 0.995
"""What a round's weight becomes with the next one."""
_WORTH_CHANGING = 0.03
"""Tokens a round by which another method must gain more to become the common one."""
_ALONE = 1.5
"""Below how many sessions that share passes, as far as waits tell, one is alone."""
_GROWTH_BY_LOAD = 1.4
"""By what a draft's time is taken to grow when twice as many sessions draft, until it was measured."""


class Pace:
    """How fast answers come: tokens and time of a round.

    Args:
        new_share: weight of a new round once there are many.
    """

    def __init__(self, new_share: float = NEW_SHARE) -> None:
        self.tokens = Mean(1.0, new_share=new_share)
        self.round_ns = Mean(1.0, new_share=new_share)

    def add(self, completed: Round) -> None:
        """Take a round in."""
        self.tokens.add(completed.verified.num_accepted_tokens + 1)
        self.round_ns.add(completed.elapsed_ns)

    @property
    def count(self) -> int:
        """How many rounds it is taken from."""
        return self.tokens.count

    @property
    def rate(self) -> float:
        """Tokens per nanosecond."""
        return self.tokens.value / max(1.0, self.round_ns.value)


class Experiments:
    """How much time choices took that were made to learn: at most a share, once something is known."""

    def __init__(self) -> None:
        self._num_rounds = 0
        self._round_ns = Mean(new_share=_SHARE_OF_ALL)
        self._all_ns = self._spent_ns = 0.0

    @property
    def may_go_on(self) -> bool:
        """Whether another may be made."""
        is_new = self._num_rounds < _ROUNDS_OF_FREE_EXPERIMENTS
        return is_new or self._spent_ns < _SHARE_OF_EXPERIMENTS * self._all_ns

    def add(self, round_ns: int, num_waiting: float, *, is_experiment: bool) -> None:
        """Count a round, nanoseconds. All who share its pass wait for one that takes longer than usual."""
        self._num_rounds += 1
        self._all_ns = _EXPERIMENTS_MEMORY * self._all_ns + round_ns
        self._spent_ns *= _EXPERIMENTS_MEMORY
        if is_experiment:
            self._spent_ns = max(0.0, self._spent_ns + num_waiting * (round_ns - self._round_ns.value))
        else:
            self._round_ns.add(round_ns)

    def add_opening(self, num_waiting: float) -> None:
        """Count that drafters open to be tried: they read the text, which takes about as long as a round."""
        self._spent_ns += num_waiting * self._round_ns.value


class VerifierLoad:
    """What passes of one verifier cost now, and how many sessions share them."""

    def __init__(self) -> None:
        self.passes: dict[int, StepCosts] = {}
        """Compute time by tokens of a pass, by level of load."""
        self.batch_size = Mean(1.0)
        self.waits = Median()
        """Time from an item's arrival to the end of its pass, over that of the pass."""
        self.pace = Pace(_SHARE_OF_ALL)
        """Of all sessions, each on its own."""
        self.num_rounds = 0
        """Rounds of all sessions."""
        self.experiments = Experiments()
        self.gains: dict[str, Mean] = {}
        """Tokens a round that methods gain, by all sessions' texts, where all draft alike."""
        self.common = PLAIN
        """The method of all sessions that share passes."""
        self.sessions: set[Hashable] = set()
        """Those under way here, as far as this gateway knows."""

    def observe(self, completed: Round) -> None:
        """Take a round's timings in."""
        verified = completed.verified
        if completed.is_prefill or not verified.compute_ns:
            return
        self.batch_size.add(verified.batch_size)
        self.waits.add(verified.server_ns / verified.compute_ns)
        self.pace.add(completed)
        # Prompts cost a pass other than drafts do: none of their tokens but the last has logits.
        if not verified.batch_background_tokens:
            costs = self.passes.setdefault(self.level, _pass_costs())
            costs.add(verified.batch_tokens, verified.compute_ns)

    def settle(self, method: str, gain: float) -> None:
        """Take in what a session would gain by a method, and settle which method is the common one."""
        self.gains.setdefault(method, Mean()).add(gain)
        best = max(self.gains, key=lambda each: self.gains[each].value)
        kept = self.gains[self.common].value if self.common in self.gains else 0.0
        if self.gains[best].value > max(0.0, kept) + _WORTH_CHANGING:
            self.common = best
        elif kept < 0:
            self.common = PLAIN

    @property
    def num_sharers(self) -> float:
        """Sessions that wait for each other's passes: those known here, or as many as the waits tell of."""
        told = self.batch_size.value * max(1.0, self.waits.value)
        return max(1.0 if told < _ALONE else told, len(self.sessions))

    @property
    def level(self) -> int:
        """The load as one of few, each twice the one before."""
        return round(math.log2(self.num_sharers))

    @property
    def token_ns(self) -> float:
        """By how much a draft token makes a pass longer, nanoseconds; 0 until passes of several sizes were
        seen.
        """
        known = (level for level, costs in self.passes.items() if costs.token_ns)
        nearest = min(known, key=lambda level: abs(level - self.level), default=None)
        return 0.0 if nearest is None else self.passes[nearest].token_ns


def _pass_costs() -> StepCosts:
    return StepCosts(_MOST_PASSES, most_off=_MOST_OFF, least_variance=_LEAST_VARIANCE)


@dataclass(slots=True)
class DraftCosts:
    """Time that drafts of one method and node budget take at one level of load, nanoseconds."""

    draft_ns: Curve = field(default_factory=lambda: Curve(through_origin=True))
    """Time until a draft is here, by K."""
    token_ns: Curve = field(default_factory=Curve)
    """Time until a draft is here, by the tokens that it has."""
    compute_ns: Curve = field(default_factory=lambda: Curve(through_origin=True))
    """A draft's share of its drafters' computing, by K."""
    count: int = 0
    """How many drafts were timed."""

    def observe(self, size: DraftSize, completed: Round) -> None:
        """Take in a round that asked for such a draft."""
        draft = completed.draft
        self.count += 1
        self.draft_ns.add(size.draft_depth, draft.elapsed_ns)
        self.token_ns.add(len(draft.token_ids), draft.elapsed_ns)
        self.compute_ns.add(size.draft_depth, draft.compute_ns)

    def further_ns(self, num_tokens: float) -> float:
        """Return what a further token of such a draft costs the drafter."""
        first = min(1.0, num_tokens)
        return (self.token_ns(num_tokens) - self.token_ns(first)) / max(1.0, num_tokens - first)


@dataclass(slots=True)
class MethodStats:
    """What drafts of one method with one node budget cost and bring, over all sessions."""

    num_nodes: Curve
    """Tokens drafted, by K."""
    costs: dict[int, DraftCosts] = field(default_factory=dict)
    """By level of load."""
    survival: Survival = field(default_factory=lambda: Survival(_METHOD_MEMORY))

    @classmethod
    def of(cls, budget: int) -> MethodStats:
        """Return the start with a node budget (0: chains). A tree uses its budget at any depth, a chain K
        tokens.
        """
        return cls(Curve(Mean, through_origin=not budget))

    @property
    def is_known(self) -> bool:
        """Whether the cost of the drafts is more than a first impression, at any load."""
        return any(costs.count >= _DRAFTS_TO_KNOW for costs in self.costs.values())

    def observe(self, size: DraftSize, completed: Round, level: int, excess: Sequence[float]) -> None:
        """Take in a round that asked for such a draft.

        Args:
            excess: by how much more than usual the text is accepted at each depth.
        """
        if not completed.draft.is_first:
            self.costs.setdefault(level, DraftCosts()).observe(size, completed)
        self.num_nodes.add(size.draft_depth, len(completed.draft.token_ids))
        self.survival.add(size.draft_depth, completed.verified.num_accepted_tokens, excess)

    def at(self, level: int) -> tuple[DraftCosts, float]:
        """Return the costs known at the nearest level of load, and a factor for the way from there.

        The method is known.
        """
        known = (each for each, costs in self.costs.items() if costs.count >= _DRAFTS_TO_KNOW)
        nearest = min(known, key=lambda each: abs(each - level))
        return self.costs[nearest], _GROWTH_BY_LOAD ** (level - nearest)
