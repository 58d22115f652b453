"""A method that may draft, as one session sees it: what each of its sizes gains."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import itemgetter, mul

from gateway.rounds.costs import MethodStats, VerifierLoad
from gateway.rounds.estimates import Ease, Survival, shifted
from gateway.rounds.vocabulary import PLAIN_SIZE, DraftSize, Round

_WORTH_GROWING = 0.8
"""A larger tree is tried once the next smaller one is worth this share of the best draft."""
_METHOD_ROUNDS = 12.0
"""How many of a session's rounds the knowledge of a method weighs."""
SESSION_MEMORY = 0.97
"""What a round's weight becomes with the next one."""
_MOST_CONFIDENCE = 0.5
"""Highest probability that a path must have: what a drafter says of itself is an estimate."""
_HOPE = 1.5
"""Tokens a round that a size may gain beyond what was seen, over the root of how often it was tried."""
_FIRST_GUESS = 0.6
"""Acceptance at any depth before anything is known."""
_GUESS_ROUNDS = 6.0
"""How many rounds a guess weighs."""
_LITTLE_CAUTION = 1.0
"""How many tries it takes for a text to explain what was accepted; over many texts errors even out."""
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A method that may draft, and the sizes to choose from."""

    method: str
    """Its name, under which what is known of it is kept."""
    start: DraftSize
    """The size until something is known of the method; its `method` is that of all sizes chosen."""
    longest: int
    """Largest K."""
    budgets: tuple[int, ...] = (0,)
    """Node budgets, ascending; 0: chains."""
    shares_processor: bool = False
    """Whether its drafters compute where the verifier does, so that all wait for what they compute."""


@dataclass(slots=True)
class Method:
    """What is known of a method over all sessions: each is short, and need not try what another tried."""

    stats: dict[int, MethodStats] = field(default_factory=dict)
    """What its drafts cost and bring, by node budget."""
    num_probes: int = 0
    """Rounds that tried something else than its best."""


@dataclass(frozen=True, slots=True)
class Prices:
    """What a nanosecond costs, in tokens."""

    own: float
    """One that the session waits alone."""
    others: float
    """One that all others wait."""
    level: int
    """Level of load."""
    pass_ns: float
    """By how much a draft token makes a pass longer, nanoseconds."""


@dataclass(eq=False, slots=True)
class Option:
    """A candidate as one session sees it."""

    candidate: Candidate
    known: Method
    stats: dict[int, MethodStats]
    load: VerifierLoad
    lengths: list[int]
    mine: dict[int, Survival]
    ease: Ease
    """Of the session's text, for this method."""
    ease_of_all: Ease
    """The same for all methods together."""
    parts: list[Option] = field(default_factory=list)
    """The options of its single drafters, where it merges several."""
    best: DraftSize = PLAIN_SIZE
    """The size that gained most, or lost least, when it was last looked at."""
    gain: float = 0.0
    """Tokens a round that it gains over plain decoding."""
    by_budget: dict[int, tuple[DraftSize, float]] = field(default_factory=dict)
    """The best size of each node budget that is known, and its gain."""
    unavoidable: float = 0.0
    """What the wait for a draft costs however short the draft is, tokens."""
    num_rounds_joining: int = 0
    """Rounds that waited for its drafters to open."""

    @classmethod
    def of(cls, candidate: Candidate, method: Method, load: VerifierLoad, ease_of_all: Ease) -> Option:
        """Return a candidate of which nothing is known in this session."""
        return cls(
            candidate,
            method,
            {budget: method.stats[budget] for budget in candidate.budgets},
            load,
            [k for k in _LENGTHS if k < candidate.longest] + [candidate.longest],
            {budget: Survival(SESSION_MEMORY) for budget in candidate.budgets},
            Ease(SESSION_MEMORY),
            ease_of_all,
        )

    @property
    def method(self) -> str:
        """Its name in this session's sizes."""
        return self.candidate.start.method

    @property
    def is_known(self) -> bool:
        """Whether any of its sizes was tried."""
        return any(stats.is_known for stats in self.stats.values())

    def size(self, depth: int, budget: int) -> DraftSize:
        """Return one of its sizes; no tree is deeper than it has nodes."""
        return replace(
            self.candidate.start, draft_depth=min(depth, budget) if budget else depth, draft_nodes=budget
        )

    def observe(self, size: DraftSize, completed: Round) -> None:
        """Learn what a round's draft cost and brought."""
        stats, num_accepted = self.stats[size.draft_nodes], completed.verified.num_accepted_tokens
        excess = self._excess(size)
        # Against one budget's, so that what a larger one adds is not taken for the text's.
        usual = self.usual_rates(self.candidate.budgets[0], size.draft_depth)
        self.ease.add(usual, num_accepted)
        self.ease_of_all.add(usual, num_accepted)
        stats.observe(size, completed, self.load.level, excess)
        self.mine[size.draft_nodes].add(size.draft_depth, num_accepted)

    def _excess(self, size: DraftSize) -> list[float]:
        """Return by how much more than usual this text is accepted at each depth. Of the smallest budget that
        is not known: what is usual for it is what most texts have.
        """
        if size.draft_nodes == self.candidate.budgets[0]:
            return [0.0] * size.draft_depth
        usual = self.usual_rates(size.draft_nodes, size.draft_depth)
        here = shifted(usual, self.ease.odds(self.ease_of_all, _LITTLE_CAUTION))
        return [mine - others for mine, others in zip(here, usual, strict=True)]

    def weigh(self, prices: Prices) -> None:
        """Find the size with the largest gain, be it a loss."""
        self.best, self.gain, self.unavoidable = PLAIN_SIZE, 0.0, 0.0
        self.by_budget = {
            budget: self.best_of(budget, prices) for budget, stats in self.stats.items() if stats.is_known
        }
        if self.by_budget:
            self.best, self.gain = max(self.by_budget.values(), key=itemgetter(1))
            costs, growth = self.stats[self.best.draft_nodes].at(prices.level)
            self.unavoidable = prices.own * growth * costs.draft_ns(1)

    def promising(self, than: float) -> tuple[DraftSize, float]:
        """Return the size that may gain most, other than the best, and how much: the less it was tried, the
        more. It is the size of a plain round if none may gain more than that.
        """
        found = PLAIN_SIZE, than
        for budget, (size, gain) in self.by_budget.items():
            hoped = gain + _HOPE / math.sqrt(1 + self.stats[budget].survival.num_tried)
            if hoped > found[1] and (size != self.best or gain < than):
                found = size, hoped
        return found

    def best_of(self, budget: int, prices: Prices) -> tuple[DraftSize, float]:
        """Return the best size with that budget, which is known, and the tokens a round that it gains."""
        lengths = [length for length in self.lengths if not budget or length <= budget]
        expected = self.expected_lengths(budget, lengths[-1])
        costs = self.costs(budget, lengths, prices)
        gains = [expected[k] - 1 - cost for k, cost in zip(lengths, costs, strict=True)]
        best = max(range(len(gains)), key=gains.__getitem__)
        return self.size(lengths[best], budget), gains[best]

    def expected_lengths(self, budget: int, longest: int) -> list[float]:
        """Return the acceptance length by K, from 0."""
        usual = shifted(self.usual_rates(budget, longest), self.ease.odds(self.ease_of_all))
        rates = self.mine[budget].rates(longest, usual, _METHOD_ROUNDS)
        return list(accumulate(accumulate(rates, mul), initial=1.0))

    def usual_rates(self, budget: int, longest: int) -> list[float]:
        """Return the acceptance at the first depths, over all sessions.

        Until it is known, that of a larger tree is taken to be that of the next smaller, and that of merged
        drafts that of the best of their drafters: they are accepted at least as far.
        """
        place = self.candidate.budgets.index(budget)
        if place:
            guess = self.usual_rates(self.candidate.budgets[place - 1], longest)
        elif self.parts:
            of_parts = [each.usual_rates(0, longest) for each in self.parts]
            guess = [max(rates) for rates in zip(*of_parts, strict=True)]
        else:
            guess = [_FIRST_GUESS] * longest
        return self.stats[budget].survival.rates(longest, guess, _GUESS_ROUNDS)

    def costs(self, budget: int, lengths: Sequence[int], prices: Prices) -> list[float]:
        """Return what drafts of those lengths cost, in tokens that are not decoded meanwhile."""
        stats = self.stats[budget]
        known, growth = stats.at(prices.level)
        of_token = (prices.own + prices.others) * prices.pass_ns
        of_wait = prices.own * growth
        of_computing = prices.others if self.candidate.shares_processor else 0.0
        return [
            of_token * stats.num_nodes(k) + of_wait * known.draft_ns(k) + of_computing * known.compute_ns(k)
            for k in lengths
        ]

    def least_confidence(self, size: DraftSize, prices: Prices) -> float:
        """Return the probability below which a token costs more than it brings.

        It adds what a further token takes to verify, and in a chain what it takes to draft. A token of a tree
        is one of many that are drafted in a step.
        """
        stats = self.stats[size.draft_nodes]
        if not stats.is_known:
            return 0.0
        num_nodes = max(1.0, stats.num_nodes(size.draft_depth))
        cost = (prices.own + prices.others) * prices.pass_ns
        if not size.draft_nodes:
            cost += prices.own * stats.at(prices.level)[0].further_ns(num_nodes)
        return min(_MOST_CONFIDENCE, max(0.0, cost))

    def unknown(self, prices: Prices) -> DraftSize | None:
        """Return a size with a budget that was hardly tried; None: all were tried, or trees grew enough."""
        budgets = self.candidate.budgets
        for smaller, budget in zip([None, *budgets], budgets, strict=False):
            if self.stats[budget].is_known:
                continue
            if smaller and self.best_of(smaller, prices)[1] < _WORTH_GROWING * self.gain:
                return None
            return self.usual_size(budget)
        return None

    def usual_size(self, budget: int) -> DraftSize:
        """Return a size with that budget, as deep as drafts are elsewhere."""
        return self.size(max(self.best.draft_depth, self.candidate.start.draft_depth), budget)

    def probe(self, turn: int) -> DraftSize:
        """Return another size than the best, by turns: the next longer draft, the next shorter, none, the
        next larger budget, the next smaller.
        """
        depth, budget, budgets = self.best.draft_depth, self.best.draft_nodes, self.candidate.budgets
        index = bisect_left(self.lengths, depth) if depth else -1
        longer = self.lengths[min(index + 1, len(self.lengths) - 1)]
        shorter = self.lengths[max(index - 1, 0)]
        place = budgets.index(budget)
        others = [*budgets[place + 1 : place + 2], *budgets[max(0, place - 1) : place]]
        sizes = [
            self.size(longer, budget),
            self.size(shorter, budget),
            PLAIN_SIZE,
            *(self.usual_size(other) for other in others),
        ]
        return sizes[turn % len(sizes)]
