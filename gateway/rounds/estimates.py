"""Estimates that follow what they observe: usual values, quantities by size, acceptance by depth."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median_low

NEW_SHARE = 0.1
"""Weight of a new observation once there are many, unless told otherwise."""
_WINDOW = 15
"""How many of the latest observations a usual value is taken from."""
_EASE_TRIALS = 10.0
"""How many tries it takes for a text to count as much as what is usual, unless told otherwise."""
_EASE_OF_OTHERS = 0.25
"""How much a try of another method says of this one."""
_MOST_USUAL = 0.98
_FORGOTTEN_AFTER = 200
"""How many observations at other sizes it takes to forget what was seen at a size."""


@dataclass(slots=True)
class Mean:
    """A mean that follows: exact at first, exponential once there are many observations."""

    value: float = 0.0
    count: int = 0
    new_share: float = NEW_SHARE
    """Weight of a new observation once there are many."""

    def add(self, value: float) -> None:
        """Take one observation in."""
        self.count += 1
        self.value += max(self.new_share, 1 / self.count) * (value - self.value)


class Median:
    """The median of the latest values: one that was slow for a reason of its own does not count."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=_WINDOW)
        self._median: float | None = 0.0
        """None: it is to be found anew."""

    def add(self, value: float) -> None:
        """Take one observation in."""
        self._values.append(value)
        self._median = None

    @property
    def value(self) -> float:
        """The median; 0 while nothing is known."""
        if self._median is None:
            self._median = median_low(self._values)
        return self._median

    @property
    def count(self) -> int:
        """How many values it is taken from."""
        return len(self._values)


@dataclass(slots=True)
class _Group:
    """What was seen at sizes near each other."""

    values: Mean | Median
    sizes: Mean = field(default_factory=Mean)
    last_seen: int = 0
    """Number of the latest observation."""


class Curve:
    """A quantity by size, learned at the sizes that occur: it is linear between them and goes on with the
    outer slopes beyond. So where all draft, it is known what passes would cost if nobody did.

    Sizes are grouped, about three groups to a doubling; a group long out of use is forgotten, lest a bad
    moment keeps it so. What the curve tells does not fall with size: where observations do, it is their mean.

    Args:
        value: what to make of a group's observations.
        through_origin: whether it is 0 at 0.
    """

    def __init__(self, value: Callable[[], Mean | Median] = Median, *, through_origin: bool = False) -> None:
        self._value = value
        self._through_origin = through_origin
        self._groups: dict[int, _Group] = {}
        self._count = 0
        self._points: list[tuple[float, float]] | None = None
        """The curve; None: it is to be made anew, as there are new observations."""

    def add(self, size: float, value: float) -> None:
        """Observe a value at a size."""
        group = self._groups.setdefault(round(3 * math.log2(size + 1)), _Group(self._value()))
        group.sizes.add(size)
        group.values.add(value)
        self._count += 1
        group.last_seen = self._count
        oldest = self._count - _FORGOTTEN_AFTER
        self._groups = {key: group for key, group in self._groups.items() if group.last_seen >= oldest}
        self._points = None

    def _curve(self) -> list[tuple[float, float]]:
        points = _rising(
            sorted(
                (group.sizes.value, group.values.value, min(group.values.count, _WINDOW))
                for group in self._groups.values()
            )
        )
        if self._through_origin and points and points[0][0] > 0:
            points.insert(0, (0.0, 0.0))
        return points

    def __call__(self, size: float) -> float:
        """Return the value at a size; 0 while nothing is known."""
        points = self._points = self._curve() if self._points is None else self._points
        if len(points) < 2:
            return points[0][1] if points else 0.0
        index = min(max(bisect_left(points, (size,)), 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[index - 1], points[index]
        return max(0.0, y0 + (y1 - y0) * (size - x0) / (x1 - x0))


def _rising(points: Iterable[tuple[float, float, int]]) -> list[tuple[float, float]]:
    """Return the nearest curve, in squares, through (size, value, weight) by size that does not fall."""
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

    def add(self, num_asked: int, num_accepted: int, excess: Sequence[float] = ()) -> None:
        """Take in a round that asked for `num_asked` tokens in a row; what is not drafted is not accepted.

        Args:
            excess: by how much more than usual the text is accepted at each depth; it is taken off, lest
                drafts that easy texts have look better than those that hard ones have.
        """
        while len(self._tried) < num_asked:
            self._tried.append(0.0)
            self._accepted.append(0.0)
        for depth in range(min(num_asked, num_accepted + 1)):
            self._tried[depth] = self._memory * self._tried[depth] + 1
            accepted = (depth < num_accepted) - (excess[depth] if excess else 0.0)
            self._accepted[depth] = self._memory * self._accepted[depth] + accepted

    @property
    def num_tried(self) -> float:
        """Weight of the rounds taken in."""
        return self._tried[0] if self._tried else 0.0

    def rates(self, depth: int, prior: Sequence[float], weight: float) -> list[float]:
        """Return the acceptance at the first `depth` depths; a prior weighs as much as `weight` rounds."""
        padding = [0.0] * max(0, depth - len(self._tried))
        return [
            min(1.0, max(0.0, (accepted + weight * guess) / (tried + weight)))
            for accepted, tried, guess in zip(
                [*self._accepted, *padding], [*self._tried, *padding], prior, strict=False
            )
        ]


class Ease:
    """How much easier a text is to guess than others: by what its drafts were accepted more than usual.

    Args:
        memory: what a round's weight becomes with the next one.
    """

    def __init__(self, memory: float) -> None:
        self._memory = memory
        self._tried = self._accepted = self._expected = 0.0

    def add(self, usual: Sequence[float], num_accepted: int) -> None:
        """Take in a round that asked for as many tokens in a row as there are usual rates of acceptance."""
        tried = usual[: num_accepted + 1]
        self._tried = self._memory * self._tried + len(tried)
        self._accepted = self._memory * self._accepted + min(num_accepted, len(usual))
        self._expected = self._memory * self._expected + sum(tried)

    def odds(self, others: Ease, caution: float = _EASE_TRIALS) -> float:
        """Return the factor by which the odds of acceptance are other than usual.

        Args:
            others: of the same text with other drafts, which counts less.
            caution: how many tries it takes for the text to count as much as what is usual.
        """
        tried = self._tried + _EASE_OF_OTHERS * others._tried
        if not tried:
            return 1.0
        expected = (self._expected + _EASE_OF_OTHERS * others._expected) / tried
        usual = min(_MOST_USUAL, max(1 - _MOST_USUAL, expected))
        accepted = self._accepted + _EASE_OF_OTHERS * others._accepted + caution * usual
        return accepted / (tried + caution - accepted) * (1 - usual) / usual


def shifted(rates: Iterable[float], odds: float) -> list[float]:
    """Return rates whose odds are so many times higher."""
    return [rate * odds / (1 - rate + rate * odds) for rate in rates]
