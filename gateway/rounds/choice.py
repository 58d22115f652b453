"""What each round drafts, chosen by measured cost and acceptance: by which method, and how much.

A draft is worth the tokens that it adds to the round. It costs time, and time has a price in tokens: what
would be decoded meanwhile. Time that only the session itself waits, for its draft, has the price of its own
pace; time that all wait, as a longer pass of the verifier they share, has the price of all paces together.
The choice is the method and size with the largest gain, or no draft where every one would cost more than it
brings. For a session that is alone this is the choice with the most tokens per second.

Nothing here can change an answer, only how fast it comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from gateway.rounds.costs import Pace, VerifierLoad
from gateway.rounds.estimates import Ease
from gateway.rounds.option import SESSION_MEMORY, Candidate, Method, Option, Prices
from gateway.rounds.vocabulary import PLAIN_SIZE, DraftSize, Round
from specdec.contract.methods import PLAIN, drafters_of

_EXPLORE_EVERY = 4
"""In one of so many rounds of a verifier a choice other than the best may be tried, times the root of the
sessions that share a pass: what nobody tries nobody knows. All of these are used while there is a method or a
node budget that was hardly tried yet."""
_HOPE_EVERY = 3
"""One of how many of these is used while something may be better than the best."""
_PROBE_EVERY = 6
"""One of how many of these is used in any case, for a size next to the best."""
_WORTH_TREES = 0.6
"""Trees of a method are tried where its drafts gain this share of what the best gain."""
_PACE_ROUNDS = 8
"""How many of a session's rounds the pace of all sessions weighs."""
_WORTH_JOINING = 0.03
"""Tokens a round by which drafters that are not open yet must be better than those that are."""
_LEAST_TO_JOIN = 16
"""How many tokens the answer must at least have left for drafters to be opened for them."""
_TRIES = 3
"""How often a method is tried whose drafters were opened for that."""
_ROUNDS_TO_JOIN = 64
"""After how many rounds a session gives up on drafters that have not opened."""
_BUSY_STRIDE = 4
"""How many rounds a choice stands where passes are shared: choosing takes the gateway time."""


class AdaptiveChoice:
    """Chooses what each round of a session drafts. It is to be closed when the session ends.

    Args:
        load_of: returns what is known of a verifier.
        verifier: the replica that the session begins on.
        candidates: the methods to choose from, at least one; the first is the first to be tried.
        known: what is known of each.
    """

    def __init__(
        self,
        load_of: Callable[[object], VerifierLoad],
        verifier: object,
        candidates: Sequence[Candidate],
        known: Sequence[Method],
    ) -> None:
        self._load_of = load_of
        self._load = load = load_of(verifier)
        ease = Ease(SESSION_MEMORY)
        self._options = [
            Option.of(candidate, method, load, ease)
            for candidate, method in zip(candidates, known, strict=True)
        ]
        self._by_method = {option.method: option for option in self._options}
        for option in self._options:
            drafters = drafters_of(option.candidate.method)
            if len(drafters) > 1:
                singles = (self._by_method.get(drafter) for drafter in drafters)
                option.parts = [each for each in singles if each]
        self._pace = Pace()
        self._num_rounds = 0
        self._limit = 0
        self._next: DraftSize | None = None
        """The size of the next round, chosen ahead; None: nothing was observed since the last one."""
        self._untried: Option | None = None
        """An option whose drafters are to be opened, to be tried."""
        self._num_tries = 0
        """How often it was tried since they are open."""
        self._is_open: Callable[[str], bool] = lambda method: True
        """Whether all drafters of a method are open; those of a single candidate are opened at the start."""
        load.sessions.add(self)
        prices = self._prices()
        for option in self._options:
            option.weigh(prices)
        self._best: Option | None = max(self._options, key=lambda option: option.gain)
        """The best of those whose drafters are open; None: no drafter is."""
        is_wanted = self._best.gain > 0 or not self._is_anything_known
        self.first_method = self._best.method if is_wanted or len(candidates) == 1 else PLAIN
        """The method whose drafters are to be opened at the start; empty: all."""

    @property
    def _is_anything_known(self) -> bool:
        return any(option.is_known for option in self._options)

    @property
    def _common(self) -> Option | None:
        """The option of the method that sessions sharing passes draft by; None: it is none of these."""
        named = (option for option in self._options if option.candidate.method == self._load.common)
        return next(named, None)

    def close(self) -> None:
        """Count the session no more."""
        self._load.sessions.discard(self)

    def goes_on_at(self, verifier: object) -> None:
        """Learn and choose for another verifier: what its passes cost is another matter."""
        load = self._load_of(verifier)
        if load is self._load:
            return
        self.close()
        self._load = load
        load.sessions.add(self)
        self._pace, self._next = Pace(), None
        for option in self._options:
            option.load = load
        self._weigh(self._options, self._prices())

    def follow(self, is_open: Callable[[str], bool]) -> None:
        """Choose from now on among methods of which `is_open` says that they can draft without a wait."""
        self._is_open = is_open

    def choose(self, limit: int) -> DraftSize:
        """Return the best draft for the next round, or now and then another, with K at most `limit`."""
        self._limit = limit
        if limit <= 0:
            return PLAIN_SIZE
        size, self._next = self._next or self._wanted(), None
        return replace(size, draft_depth=min(size.draft_depth, limit))

    def observe(self, size: DraftSize, completed: Round) -> None:
        """Learn what the round cost and brought; where a drafter is lost or late, learn nothing of drafts."""
        self._load.observe(completed)
        self._pace.add(completed)
        num_waiting = self._load.num_sharers
        self._load.experiments.add(completed.elapsed_ns, num_waiting, is_experiment=size.is_experiment)
        if size.draft_depth and completed.draft.is_complete:
            self._by_method[size.method].observe(size, completed)
        self._next = self._wanted()

    def _prices(self) -> Prices:
        pace, all_paces = self._pace, self._load.pace
        weight = pace.count / (pace.count + _PACE_ROUNDS)
        own = weight * pace.rate + (1 - weight) * all_paces.rate
        others = (self._load.num_sharers - 1) * all_paces.rate
        return Prices(own, others, self._load.level, self._load.token_ns)

    def _wanted(self) -> DraftSize:
        self._num_rounds += 1
        self._load.num_rounds += 1
        prices = self._prices()
        sharers = max(1, round(self._load.num_sharers))
        if sharers < 2 or self._num_rounds % _BUSY_STRIDE == 1:
            in_turn = self._options[self._num_rounds % len(self._options)]
            self._weigh(dict.fromkeys((self._best or in_turn, in_turn)), prices)
        experiment = self._experiment(prices, sharers)
        size = experiment or self._preferred(prices)
        confidence = 0.0
        if size.draft_depth:
            confidence = self._by_method[size.method].least_confidence(size, prices)
        return replace(
            size,
            min_path_confidence=confidence,
            joining=self._joining(),
            is_experiment=experiment is not None,
        )

    def _weigh(self, options: Iterable[Option], prices: Prices) -> None:
        """Look anew at these options, and settle which is the best of those open."""
        for option in options:
            option.weigh(prices)
            if option.is_known:
                self._load.settle(option.candidate.method, option.gain)
        usable = [option for option in self._options if self._is_open(option.method)]
        self._best = max(usable, key=lambda option: option.gain, default=None)
        if prices.others and self._common in usable:
            self._best = self._common

    def _preferred(self, prices: Prices) -> DraftSize:
        """Return the best draft, or none where it does not pay.

        Who shares passes waits for the others' drafts in any case: sessions keep together, since each pass
        costs most of what it costs whoever is in it. So they draft by one method, or not at all.
        """
        option = self._best
        if option is None:
            return PLAIN_SIZE
        gain = option.gain
        if prices.others and self._load.common == PLAIN:
            return PLAIN_SIZE
        if prices.others and (common := self._common) and self._may_join(common):
            if option is not common:
                return PLAIN_SIZE
            gain += option.unavoidable
        return option.best if gain > 0 else PLAIN_SIZE

    def _experiment(self, prices: Prices, sharers: int) -> DraftSize | None:
        """Return a draft from which something is learned, now and then; None: the best is to be taken."""
        if self._best and not self._is_anything_known:
            return self._best.candidate.start
        if self._untried and self._is_open(self._untried.method):
            option, self._num_tries = self._untried, self._num_tries + 1
            if self._num_tries >= _TRIES:
                self._untried, self._num_tries = None, 0
            option.weigh(prices)
            hopeful, _ = option.promising(-math.inf)
            return hopeful if hopeful.draft_depth else option.candidate.start
        # All who share a pass wait for the session that tries something.
        turn, rest = divmod(self._load.num_rounds, round(_EXPLORE_EVERY * math.sqrt(sharers)))
        if rest or not self._load.experiments.may_go_on:
            return None
        if size := self._unknown(prices):
            return size
        if turn % _HOPE_EVERY == 0 and (size := self._promising()):
            return size
        return self._probe() if turn % _PROBE_EVERY == 0 else None

    def _unknown(self, prices: Prices) -> DraftSize | None:
        """Return a draft of a method that was hardly tried, or of a budget of the best method."""
        untried = (option for option in self._options if not option.is_known and self._may_join(option))
        if option := next(untried, None):
            if self._is_open(option.method):
                return option.candidate.start
            self._is_to_be_tried(option)
        gain = _WORTH_TREES * self._best.gain if self._best else 0.0
        for option in self._options:
            is_good = option.is_known and option.gain >= gain and self._is_open(option.method)
            if is_good and (size := option.unknown(prices)):
                return size
        return None

    def _is_to_be_tried(self, option: Option) -> None:
        """Have an option's drafters opened, unless another is to be tried first."""
        if self._untried is None:
            self._untried = option
            self._load.experiments.add_opening(self._load.num_sharers)

    def _promising(self) -> DraftSize | None:
        """Return a draft that may be better than the best, as it was tried less often."""
        gain = max(0.0, self._best.gain if self._best else 0.0)
        found = {option: option.promising(gain) for option in self._options if self._may_join(option)}
        option = max(found, key=lambda each: found[each][1], default=None)
        if option is None or not found[option][0].draft_depth:
            return None
        if self._is_open(option.method):
            return found[option][0]
        self._is_to_be_tried(option)
        return None

    def _probe(self) -> DraftSize | None:
        """Return a size next to that of the best option."""
        if self._best is None:
            return None
        self._best.known.num_probes += 1
        return self._best.probe(self._best.known.num_probes)

    def _joining(self) -> str:
        """Return the method whose drafters are to be opened, as it is better or to be tried; empty: none."""
        if len(self._options) == 1:
            return ""
        wanted = self._worth_joining()
        if wanted is None or self._is_open(wanted.method):
            return ""
        if not self._may_join(wanted):
            self._untried = None
            return ""
        wanted.num_rounds_joining += 1
        return wanted.method

    def _worth_joining(self) -> Option | None:
        """Return an option whose drafters should be opened."""
        if self._load.num_sharers > 1:
            wanted = self._common
        else:
            wanted = max(self._options, key=lambda option: option.gain)
            least = max(0.0, self._best.gain if self._best else 0.0) + _WORTH_JOINING
            wanted = wanted if wanted.gain > least else None
        return wanted if wanted and not self._is_open(wanted.method) else self._untried

    def _may_join(self, option: Option) -> bool:
        is_worth_it = option.num_rounds_joining < _ROUNDS_TO_JOIN and self._limit >= _LEAST_TO_JOIN
        return is_worth_it or self._is_open(option.method)
