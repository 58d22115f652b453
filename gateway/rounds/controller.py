"""How much to draft: K and the node budget of each round, by measured cost and acceptance.

A round with draft size s emits tau(s) tokens and takes draft(s) + pass(B x (nodes(s) + 1)) x (1 + queue) +
transport, where B is how many items share a pass of the verifier now. The choice is the size with the most
tokens per second, K = 0 included. Every session is taken to choose alike: a session that drafts more makes
others wait, and on a busy verifier all of them drafting is what costs.

Nothing here can change an answer, only how fast it comes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul
from weakref import WeakKeyDictionary

from gateway.rounds.costs import MethodStats, VerifierLoad
from gateway.rounds.estimates import Survival
from gateway.rounds.records import TrackRecord
from gateway.rounds.vocabulary import PLAIN_SIZE, DraftSize, Round, SizeControl

_PROBE_EVERY = 24
"""A size other than the best is tried once in so many rounds of a method, times the sessions that share a
pass: what nobody tries nobody knows."""
_EXPLORE_EVERY = 4
"""How many rounds instead, while there is a node budget that was hardly tried yet."""
_WORTH_GROWING = 0.8
"""A larger tree is tried once the next smaller tree reaches this share of the best rate."""
_METHOD_ROUNDS = 12.0
"""How many of a session's rounds the knowledge of a method weighs."""
_SESSION_MEMORY = 0.97
"""What a round's weight becomes with the next one."""
_MOST_CONFIDENCE = 0.5
"""Highest probability that a path must have: what a drafter says of itself is an estimate."""
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48)


@dataclass(frozen=True, slots=True)
class FixedSize:
    """Drafts what the request asked for, in every round."""

    size: DraftSize

    def choose(self, limit: int) -> DraftSize:
        """Return the size, cut to `limit`."""
        return replace(self.size, draft_depth=min(self.size.draft_depth, limit))

    def observe(self, size: DraftSize, completed: Round) -> None:
        """Learn nothing: the size is fixed."""


@dataclass(slots=True)
class Method:
    """What is known of a method over all sessions: each is short, and need not try what another tried."""

    stats: dict[int, MethodStats] = field(default_factory=dict)
    """What its drafts cost and bring, by node budget."""
    num_rounds: int = 0
    num_probes: int = 0


class Controller:
    """What a gateway knows of its verifiers, methods and drafters; makes the control of each session."""

    def __init__(self) -> None:
        self._loads: WeakKeyDictionary[object, VerifierLoad] = WeakKeyDictionary()
        self._methods: dict[str, Method] = {}
        self._records: dict[str, TrackRecord] = {}

    def record(self, drafter: str) -> TrackRecord:
        """Return how often a drafter was right, over all sessions; it is one that the gateway knows."""
        return self._records.setdefault(drafter, TrackRecord(drafter))

    def session(
        self, verifier: object, method: str, start: DraftSize, *, longest: int, budgets: Sequence[int]
    ) -> SizeControl:
        """Return the control of one generation.

        Args:
            verifier: the replica it runs on; any object that lives as long as the replica does.
            method: a method the gateway offers.
            start: the size until something is known of the method.
            longest: largest K.
            budgets: node budgets to choose from; 0: chains.
        """
        load = self._loads.setdefault(verifier, VerifierLoad())
        known = self._methods.setdefault(method, Method())
        for budget in budgets:
            known.stats.setdefault(budget, MethodStats.of(budget))
        return AdaptiveSize(load, known, start, longest, sorted(budgets))


class AdaptiveSize:
    """Chooses the size with the most tokens per second, round by round."""

    def __init__(
        self, load: VerifierLoad, method: Method, start: DraftSize, longest: int, budgets: Sequence[int]
    ) -> None:
        self._load, self._method, self._start, self._budgets = load, method, start, budgets
        self._stats = {budget: method.stats[budget] for budget in budgets}
        self._mine = {budget: Survival(_SESSION_MEMORY) for budget in budgets}
        self._lengths = [k for k in _LENGTHS if k < longest] + [longest]
        self._next: DraftSize | None = None
        """The size of the next round, chosen ahead; None: nothing was observed since the last one."""

    def choose(self, limit: int) -> DraftSize:
        """Return the best size, or now and then another."""
        if limit <= 0:
            return PLAIN_SIZE
        size, self._next = self._next or self._wanted(), None
        return FixedSize(self._with_confidence(size)).choose(limit)

    def _with_confidence(self, size: DraftSize) -> DraftSize:
        """Leave out the tokens that cost more time than they save if they are accepted.

        A token saves what a token takes in such rounds, and adds what a further token takes to draft and to
        verify. A token of a tree is one of many that are drafted in a step: it adds what verifying it takes.
        """
        if not size.draft_depth or not self._stats[size.draft_nodes].is_known:
            return size
        stats = self._stats[size.draft_nodes]
        num_nodes = max(1.0, stats.num_nodes(size.draft_depth))
        expected = self._expected_lengths(size.draft_nodes, size.draft_depth)[-1]
        added_ns = self._load.round_ns(num_nodes) - self._load.round_ns(num_nodes - 1)
        if not size.draft_nodes:
            added_ns += stats.further_ns(num_nodes)
        share = added_ns * expected / self._cost_ns(size)
        return replace(size, min_path_confidence=min(_MOST_CONFIDENCE, max(0.0, share)))

    def _wanted(self) -> DraftSize:
        self._method.num_rounds += 1
        num_rounds = self._method.num_rounds
        if not any(stats.is_known for stats in self._stats.values()):
            return self._start
        best, rate = self._best()
        # All who share a pass wait for the session that tries something.
        sharers = max(1, round(self._load.batch_size.value))
        if num_rounds % (_EXPLORE_EVERY * sharers) == 0 and (unknown := self._unknown(best, rate)):
            return unknown
        return self._probe(best) if num_rounds % (_PROBE_EVERY * sharers) == 0 else best

    def observe(self, size: DraftSize, completed: Round) -> None:
        """Learn what the round cost and brought; where a drafter is lost or late, learn nothing of drafts."""
        self._load.observe(completed)
        if size.draft_depth and completed.draft.is_complete:
            self._stats[size.draft_nodes].observe(size, completed)
            self._mine[size.draft_nodes].add(size.draft_depth, completed.verified.num_accepted_tokens)
        self._next = self._wanted()

    def _best(self) -> tuple[DraftSize, float]:
        """Return the size with the most tokens per nanosecond, and how many those are."""
        best, best_rate = PLAIN_SIZE, self._load.caution / self._cost_ns(PLAIN_SIZE)
        for budget in self._budgets:
            if self._stats[budget].is_known:
                length, rate = self._best_length(budget)
                if rate > best_rate:
                    best, best_rate = DraftSize(length, budget), rate
        return best, best_rate

    def _best_length(self, budget: int) -> tuple[int, float]:
        """Return the best K with that budget, within the depth of a tree of it, and its tokens per
        nanosecond.
        """
        lengths = [length for length in self._lengths if not budget or length <= budget]
        expected = self._expected_lengths(budget, lengths[-1])
        rates = [expected[length] / self._cost_ns(DraftSize(length, budget)) for length in lengths]
        best = max(range(len(rates)), key=rates.__getitem__)
        return lengths[best], rates[best]

    def _unknown(self, best: DraftSize, best_rate: float) -> DraftSize | None:
        """Return a draft with a budget that was hardly tried; None: all were tried, or trees grew enough."""
        for smaller, budget in zip([None, *self._budgets], self._budgets, strict=False):
            if self._stats[budget].is_known:
                continue
            if smaller and self._best_length(smaller)[1] < _WORTH_GROWING * best_rate:
                return None
            return DraftSize(self._usual_length(best, budget), budget)
        return None

    def _usual_length(self, best: DraftSize, budget: int) -> int:
        length = max(best.draft_depth, self._start.draft_depth)
        return min(length, budget) if budget else length

    def _expected_lengths(self, budget: int, longest: int) -> list[float]:
        """Return the acceptance length by K, from 0."""
        rates = self._mine[budget].rates(longest, self._stats[budget].rates(longest), _METHOD_ROUNDS)
        return list(accumulate(accumulate(rates, mul), initial=1.0))

    def _cost_ns(self, size: DraftSize) -> float:
        """Time of a round, nanoseconds."""
        if not size.draft_depth:
            return max(1.0, self._load.round_ns(0))
        stats = self._stats[size.draft_nodes]
        num_nodes = stats.num_nodes(size.draft_depth)
        return max(1.0, stats.draft_ns(size.draft_depth) + self._load.round_ns(num_nodes))

    def _probe(self, best: DraftSize) -> DraftSize:
        """Return another size, in turn: the next longer draft, the next shorter, none, the next larger
        budget, the next smaller.
        """
        index = bisect_left(self._lengths, best.draft_depth) if best.draft_depth else -1
        longer = self._lengths[min(index + 1, len(self._lengths) - 1)]
        shorter = self._lengths[max(index - 1, 0)]
        budget = best.draft_nodes
        place = self._budgets.index(budget)
        others = [*self._budgets[place + 1 : place + 2], *self._budgets[max(0, place - 1) : place]]
        sizes = [
            DraftSize(min(longer, budget or longer), budget),
            DraftSize(shorter, budget),
            PLAIN_SIZE,
            *(DraftSize(self._usual_length(best, other), other) for other in others),
        ]
        self._method.num_probes += 1
        return sizes[self._method.num_probes % len(sizes)]
