"""How much to draft: K and the node budget of each round, by measured cost and acceptance.

A round with draft size s emits tau(s) tokens and takes draft(s) + pass(B x (nodes(s) + 1)) + overhead, where
B is how many items share a pass of the verifier now. What is chosen has the most tokens per second, K = 0
included. Every session is taken to choose alike: one that drafts more makes all others wait, and on a busy
verifier all of them drafting is what costs.

Nothing here can change an answer, only how fast it comes.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from weakref import WeakKeyDictionary

from gateway.decode import DraftSize, Round, SizeControl

_NEW_SHARE = 0.1
"""Weight of a new observation once there are many."""
_PROBE_EVERY = 24
"""A session tries another size than the best once in so many rounds: what is never tried is never known."""
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
PLAIN_SIZE = DraftSize(0)
"""Plain decoding."""


@dataclass(frozen=True, slots=True)
class FixedSize:
    """What the request asked for, in every round."""

    size: DraftSize

    def choose(self, most: int) -> DraftSize:
        """The size, cut to `most`."""
        return DraftSize(min(self.size.num_draft_tokens, most), self.size.num_draft_nodes)

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


class Curve:
    """A quantity by size, learned at the sizes that occur: linear between them, on with the last slope
    beyond.

    Sizes are grouped, about three groups to a doubling. Costs do not fall with size, and are read so.
    """

    def __init__(self, *, through_origin: bool = False) -> None:
        self._through_origin = through_origin
        self._groups: dict[int, tuple[Mean, Mean]] = {}
        self._points: list[tuple[float, float]] = []

    def add(self, size: float, value: float) -> None:
        """Observe a value at a size."""
        sizes, values = self._groups.setdefault(round(3 * math.log2(size + 1)), (Mean(), Mean()))
        sizes.add(size)
        values.add(value)
        points = sorted((sizes.value, values.value) for sizes, values in self._groups.values())
        heights = accumulate((value for _, value in points), max)
        self._points = [(size, height) for (size, _), height in zip(points, heights, strict=True)]
        if self._through_origin and self._points[0][0] > 0:
            self._points.insert(0, (0.0, 0.0))

    def __call__(self, size: float) -> float:
        """The value at a size; 0 while nothing is known."""
        points = self._points
        if len(points) < 2:
            return points[0][1] if points else 0.0
        index = min(max(bisect_left(points, (size,)), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[index - 1], points[index]
        if size <= points[0][0]:
            return points[0][1]
        return y0 + (y1 - y0) * (size - x0) / (x1 - x0)


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
        self.overhead_ns = Mean()
        """Queue, transport, and whatever else an answer waits for."""

    def observe(self, this: Round) -> None:
        """Take a round's timings in."""
        verified = this.verified
        if this.is_prefill or not verified.compute_ns:
            return
        self.pass_ns.add(verified.batch_tokens, verified.compute_ns)
        self.batch_size.add(verified.batch_size)
        self.overhead_ns.add(max(0, verified.elapsed_ns - verified.compute_ns))

    def round_ns(self, num_nodes: float) -> float:
        """Time of a verify with that many draft tokens, every session of the pass having as many."""
        return self.pass_ns(self.batch_size.value * (num_nodes + 1)) + self.overhead_ns.value


@dataclass(slots=True)
class MethodStats:
    """What drafts of one method with one node budget cost and bring, over all sessions."""

    draft_ns: Curve = field(default_factory=lambda: Curve(through_origin=True))
    """Time until a draft is here, by K."""
    num_nodes: Curve = field(default_factory=lambda: Curve(through_origin=True))
    """Tokens drafted, by K."""
    survival: Survival = field(default_factory=lambda: Survival(_METHOD_MEMORY))
    is_known: bool = False

    def observe(self, size: DraftSize, this: Round) -> None:
        """Take a round in that asked for such a draft."""
        self.is_known = True
        self.draft_ns.add(size.num_draft_tokens, this.draft.elapsed_ns)
        self.num_nodes.add(size.num_draft_tokens, len(this.draft.token_ids))
        self.survival.add(size.num_draft_tokens, this.verified.num_accepted_tokens)

    def rates(self, depth: int) -> list[float]:
        """Acceptance at the first depths."""
        return self.survival.rates(depth, [_FIRST_GUESS] * depth, _GUESS_ROUNDS)


class Controller:
    """What a gateway knows of its verifiers and methods; makes the control of each session."""

    def __init__(self) -> None:
        self._loads: WeakKeyDictionary[object, VerifierLoad] = WeakKeyDictionary()
        self._methods: dict[str, dict[int, MethodStats]] = {}

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
        known = self._methods.setdefault(method, {})
        stats = {budget: known.setdefault(budget, MethodStats()) for budget in budgets}
        return AdaptiveSize(load, stats, start, longest)


class AdaptiveSize:
    """Chooses the size with the most tokens per second, round by round."""

    def __init__(
        self, load: VerifierLoad, stats: dict[int, MethodStats], start: DraftSize, longest: int
    ) -> None:
        self._load, self._stats, self._start = load, stats, start
        self._mine = {budget: Survival(_SESSION_MEMORY) for budget in stats}
        self._lengths = [k for k in _LENGTHS if k < longest] + [longest]
        self._num_rounds = 0
        self._num_probes = 0

    def choose(self, most: int) -> DraftSize:
        """The best size, or now and then another one."""
        if most <= 0:
            return PLAIN_SIZE
        self._num_rounds += 1
        if not any(stats.is_known for stats in self._stats.values()):
            best = self._start
        elif self._num_rounds % _PROBE_EVERY == 0:
            best = self._probe(self._best())
        else:
            best = self._best()
        return FixedSize(best).choose(most)

    def observe(self, size: DraftSize, this: Round) -> None:
        """Learn what the round cost and brought; while a drafter is lost or late, nothing of drafts."""
        self._load.observe(this)
        if size.num_draft_tokens and this.draft.is_complete:
            self._stats[size.num_draft_nodes].observe(size, this)
            self._mine[size.num_draft_nodes].add(size.num_draft_tokens, this.verified.num_accepted_tokens)

    def _best(self) -> DraftSize:
        best, best_rate = PLAIN_SIZE, 1.0 / self._cost_ns(PLAIN_SIZE)
        for budget, stats in self._stats.items():
            if not stats.is_known:
                continue  # until a probe has tried it
            expected = self._expected_lengths(budget, self._lengths[-1])
            for length in self._lengths:
                size = DraftSize(length, budget)
                rate = expected[length] / self._cost_ns(size)
                if rate > best_rate:
                    best, best_rate = size, rate
        return best

    def _expected_lengths(self, budget: int, longest: int) -> list[float]:
        """Acceptance length by K, from 0."""
        rates = self._mine[budget].rates(longest, self._stats[budget].rates(longest), _METHOD_ROUNDS)
        return list(accumulate(accumulate(rates, mul), initial=1.0))

    def _cost_ns(self, size: DraftSize) -> float:
        """Time of a round, nanoseconds."""
        if not size.num_draft_tokens:
            return max(1.0, self._load.round_ns(0))
        stats = self._stats[size.num_draft_nodes]
        num_nodes = stats.num_nodes(size.num_draft_tokens)
        return max(1.0, stats.draft_ns(size.num_draft_tokens) + self._load.round_ns(num_nodes))

    def _probe(self, best: DraftSize) -> DraftSize:
        """In turn: the next longer draft, the next shorter, none, and as long a one with other budgets."""
        index = bisect_left(self._lengths, best.num_draft_tokens) if best.num_draft_tokens else -1
        longer = self._lengths[min(index + 1, len(self._lengths) - 1)]
        shorter = self._lengths[max(index - 1, 0)]
        budget, length = best.num_draft_nodes, max(best.num_draft_tokens, self._start.num_draft_tokens)
        others = [DraftSize(length, other) for other in self._stats if other != budget]
        sizes = [DraftSize(longer, budget), DraftSize(shorter, budget), PLAIN_SIZE, *others]
        self._num_probes += 1
        return sizes[self._num_probes % len(sizes)]
