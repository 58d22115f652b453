"""How much to draft: K and the node budget of each round, by measured cost and acceptance.

A round with draft size s emits tau(s) tokens and takes draft(s) + pass(B x (nodes(s) + 1)) x (1 + queue) +
transport, where B is how many items share a pass of the verifier now. What is chosen has the most tokens per
second, K = 0 included. Every session is taken to choose alike: one that drafts more makes others wait, and on
a busy verifier all of them drafting is what costs.

Nothing here can change an answer, only how fast it comes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from statistics import median_low
from weakref import WeakKeyDictionary

from gateway.rounds.vocabulary import PLAIN_SIZE, DraftSize, Round, SizeControl

_NEW_SHARE = 0.1
"""Weight of a new observation once there are many."""
_PROBE_EVERY = 24
"""Another size than the best is tried once in so many rounds of a method, times those who share a pass: what
nobody tries nobody knows."""
_EXPLORE_EVERY = 4
"""The same while there is a node budget that was hardly tried yet."""
_DRAFTS_TO_KNOW = 3
"""Drafts after which a node budget's cost is known."""
_WORTH_GROWING = 0.8
"""A larger tree is tried once the next smaller one comes so near to the best rate."""
_CAUTION = 0.3
"""What drafts must bring beyond plain decoding where very many sessions share a pass; alone nothing."""
_WINDOW = 15
"""Latest observations a usual value is of."""
_FORGOTTEN_AFTER = 200
"""Observations at other sizes after which what was seen at one says nothing any more."""
_FIRST_GUESS = 0.6
"""Acceptance at any depth before anything is known."""
_GUESS_ROUNDS = 4.0
"""How many rounds the first guess weighs, of a method."""
_METHOD_ROUNDS = 12.0
"""How many rounds what is known of a method weighs in a session."""
_SESSION_MEMORY = 0.97
_METHOD_MEMORY = 0.995
"""What a round's weight becomes with the next one."""
_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32, 48)


@dataclass(frozen=True, slots=True)
class FixedSize:
    """What the request asked for, in every round."""

    size: DraftSize

    def choose(self, most: int) -> DraftSize:
        """The size, cut to `most`."""
        return DraftSize(min(self.size.draft_depth, most), self.size.draft_nodes)

    def observe(self, size: DraftSize, this: Round) -> None:
        """Nothing is learned."""


@dataclass(slots=True)
class Mean:
    """A mean that follows: exact at first, exponential once there are many observations."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        """Take one observation in."""
        self.count += 1
        self.value += max(_NEW_SHARE, 1 / self.count) * (value - self.value)


class Median:
    """Of the latest values: what was slow for a reason of its own, once, does not count."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=_WINDOW)

    def add(self, value: float) -> None:
        """Take one observation in."""
        self._values.append(value)

    @property
    def value(self) -> float:
        """The median; 0 while nothing is known."""
        return median_low(self._values) if self._values else 0.0

    @property
    def count(self) -> int:
        """Values it is of."""
        return len(self._values)


@dataclass(slots=True)
class _Group:
    """What was seen at sizes near each other."""

    values: Mean | Median
    sizes: Mean = field(default_factory=Mean)
    last_seen: int = 0
    """Number of the latest observation."""


class Curve:
    """A quantity by size, learned at the sizes that occur: linear between them, on with the outer slopes
    beyond. So where all draft, it is known what passes would cost if none did.

    Sizes are grouped, about three groups to a doubling; one long out of use is forgotten, lest a bad moment
    keeps it so. What the curve tells does not fall with size: where observations do, it is the mean of both.

    Args:
        value: what to make of a group's observations.
        through_origin: whether it is 0 at 0.
    """

    def __init__(self, value: Callable[[], Mean | Median] = Median, *, through_origin: bool = False) -> None:
        self._value = value
        self._through_origin = through_origin
        self._groups: dict[int, _Group] = {}
        self._count = 0
        self._points: list[tuple[float, float]] = []

    def add(self, size: float, value: float) -> None:
        """Observe a value at a size."""
        group = self._groups.setdefault(round(3 * math.log2(size + 1)), _Group(self._value()))
        group.sizes.add(size)
        group.values.add(value)
        self._count += 1
        group.last_seen = self._count
        oldest = self._count - _FORGOTTEN_AFTER
        self._groups = {key: one for key, one in self._groups.items() if one.last_seen >= oldest}
        self._points = _rising(
            sorted(
                (one.sizes.value, one.values.value, min(one.values.count, _WINDOW))
                for one in self._groups.values()
            )
        )
        if self._through_origin and self._points[0][0] > 0:
            self._points.insert(0, (0.0, 0.0))

    def __call__(self, size: float) -> float:
        """The value at a size; 0 while nothing is known."""
        points = self._points
        if len(points) < 2:
            return points[0][1] if points else 0.0
        index = min(max(bisect_left(points, (size,)), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[index - 1], points[index]
        return max(0.0, y0 + (y1 - y0) * (size - x0) / (x1 - x0))


def _rising(points: Iterable[tuple[float, float, int]]) -> list[tuple[float, float]]:
    """The nearest curve, in squares, through (size, value, weight) by size that does not fall."""
    pools: list[tuple[float, int, list[float]]] = []
    for size, value, weight in points:
        height, mass, sizes = value, weight, [size]
        while pools and pools[-1][0] > height:
            above, its_mass, its_sizes = pools.pop()
            height = (above * its_mass + height * mass) / (its_mass + mass)
            mass, sizes = its_mass + mass, its_sizes + sizes
        pools.append((height, mass, sizes))
    return [(size, height) for height, _, sizes in pools for size in sizes]


class Survival:
    """How often drafts are accepted to each depth, given that the depth before was."""

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._tried: list[float] = []
        self._accepted: list[float] = []

    def add(self, num_asked: int, num_accepted: int) -> None:
        """A round that asked for `num_asked` tokens in a row. One not drafted is one not accepted."""
        while len(self._tried) < num_asked:
            self._tried.append(0.0)
            self._accepted.append(0.0)
        for depth in range(min(num_asked, num_accepted + 1)):
            self._tried[depth] = self._memory * self._tried[depth] + 1
            self._accepted[depth] = self._memory * self._accepted[depth] + (depth < num_accepted)

    def rates(self, depth: int, prior: Sequence[float], weight: float) -> list[float]:
        """Acceptance at the first `depth` depths, with a prior that weighs as much as `weight` rounds."""
        padding = [0.0] * max(0, depth - len(self._tried))
        return [
            (accepted + weight * guess) / (tried + weight)
            for accepted, tried, guess in zip(
                [*self._accepted, *padding], [*self._tried, *padding], prior, strict=False
            )
        ]


class VerifierLoad:
    """What passes of one verifier cost now."""

    def __init__(self) -> None:
        self.pass_ns = Curve()
        """Compute time by tokens of a pass."""
        self.batch_size = Mean(1.0)
        self.queue_share = Median()
        """Time an item waits for its pass, over the pass: who comes while one runs waits for its end, longer
        the more everyone drafts."""
        self.transport_ns = Median()
        """The rest of what an answer waits for."""

    def observe(self, this: Round) -> None:
        """Take a round's timings in."""
        verified = this.verified
        if this.is_prefill or not verified.compute_ns:
            return
        self.pass_ns.add(verified.batch_tokens, verified.compute_ns)
        self.batch_size.add(verified.batch_size)
        self.queue_share.add(max(0, verified.server_ns - verified.compute_ns) / verified.compute_ns)
        self.transport_ns.add(max(0, verified.elapsed_ns - verified.server_ns))

    @property
    def caution(self) -> float:
        """By how much drafts must beat plain decoding: not all sessions that share passes draft as well, and
        those that do not draft pay for those that do."""
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
    survival: Survival = field(default_factory=lambda: Survival(_METHOD_MEMORY))
    num_timed: int = 0
    """Drafts whose time was taken."""

    @classmethod
    def of(cls, budget: int) -> MethodStats:
        """Of a node budget, 0 being chains. A tree uses its budget at any depth, a chain has K tokens."""
        return cls(Curve(Mean, through_origin=not budget))

    @property
    def is_known(self) -> bool:
        """Whether what they cost is more than a first impression."""
        return self.num_timed >= _DRAFTS_TO_KNOW

    def observe(self, size: DraftSize, this: Round) -> None:
        """Take a round in that asked for such a draft."""
        if not this.draft.is_first:
            self.num_timed += 1
            self.draft_ns.add(size.draft_depth, this.draft.elapsed_ns)
        self.num_nodes.add(size.draft_depth, len(this.draft.token_ids))
        self.survival.add(size.draft_depth, this.verified.num_accepted_tokens)

    def rates(self, depth: int) -> list[float]:
        """Acceptance at the first depths."""
        return self.survival.rates(depth, [_FIRST_GUESS] * depth, _GUESS_ROUNDS)


@dataclass(slots=True)
class Method:
    """A method, over all sessions: each is short, and what one has tried the others need not."""

    stats: dict[int, MethodStats] = field(default_factory=dict)
    """By node budget."""
    num_rounds: int = 0
    num_probes: int = 0


class Controller:
    """What a gateway knows of its verifiers and methods; makes the control of each session."""

    def __init__(self) -> None:
        self._loads: WeakKeyDictionary[object, VerifierLoad] = WeakKeyDictionary()
        self._methods: dict[str, Method] = {}

    def session(
        self, verifier: object, method: str, start: DraftSize, *, longest: int, budgets: Sequence[int]
    ) -> SizeControl:
        """The control of one generation.

        Args:
            verifier: whom it runs on; any object that lives as long as the replica does.
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

    def choose(self, most: int) -> DraftSize:
        """The best size, or now and then another one."""
        if most <= 0:
            return PLAIN_SIZE
        self._method.num_rounds += 1
        return FixedSize(self._wanted(self._method.num_rounds)).choose(most)

    def _wanted(self, num_rounds: int) -> DraftSize:
        if not any(stats.is_known for stats in self._stats.values()):
            return self._start
        best, rate = self._best()
        # All who share a pass wait for the one that tries something.
        sharers = max(1, round(self._load.batch_size.value))
        if num_rounds % (_EXPLORE_EVERY * sharers) == 0 and (unknown := self._unknown(best, rate)):
            return unknown
        return self._probe(best) if num_rounds % (_PROBE_EVERY * sharers) == 0 else best

    def observe(self, size: DraftSize, this: Round) -> None:
        """Learn what the round cost and brought; while a drafter is lost or late, nothing of drafts."""
        self._load.observe(this)
        if size.draft_depth and this.draft.is_complete:
            self._stats[size.draft_nodes].observe(size, this)
            self._mine[size.draft_nodes].add(size.draft_depth, this.verified.num_accepted_tokens)

    def _best(self) -> tuple[DraftSize, float]:
        """The size with the most tokens per nanosecond, and how many."""
        best, best_rate = PLAIN_SIZE, self._load.caution / self._cost_ns(PLAIN_SIZE)
        for budget in self._budgets:
            if self._stats[budget].is_known:
                length, rate = self._best_length(budget)
                if rate > best_rate:
                    best, best_rate = DraftSize(length, budget), rate
        return best, best_rate

    def _best_length(self, budget: int) -> tuple[int, float]:
        """The best K with that budget, which is deeper in no tree, and its tokens per nanosecond."""
        lengths = [length for length in self._lengths if not budget or length <= budget]
        expected = self._expected_lengths(budget, lengths[-1])
        rates = [expected[length] / self._cost_ns(DraftSize(length, budget)) for length in lengths]
        best = max(range(len(rates)), key=rates.__getitem__)
        return lengths[best], rates[best]

    def _unknown(self, best: DraftSize, best_rate: float) -> DraftSize | None:
        """A draft with a budget that was hardly tried yet; None: all were, or trees have grown enough."""
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
        """Acceptance length by K, from 0."""
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
        """In turn: the next longer draft, the next shorter, none, and the next larger and smaller budget."""
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
