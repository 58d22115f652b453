"""How long an answer should take, by how many run: what came lately, and how long answers are."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_MEMORY_S = 10.0
"""For how long what was seen counts, seconds with as many answers; also the longest pause that counts: a
machine that stood still for longer says nothing of what it can do."""
_MARGIN = 1.25
"""By how much longer than on average an answer may take."""
_TOKENS_TO_KNOW = 50
"""How many tokens it takes to know how fast they come: the first ones come slowly, as answers begin."""
_LONG = 0.9
"""Share of the last answers that are not longer than an answer is expected to be."""
_FIRST_LENGTH = 32
"""What an answer is expected to have before one has ended, tokens: most have far fewer than they may."""
_NUM_LENGTHS = 64
"""How many answers that is taken from."""
SHARE_TO_RUN = 0.65
"""Share of the time until a request's deadline that its answer may take: the rest is for waiting."""


@dataclass(slots=True)
class _Pace:
    """How fast tokens come while about so many answers run, what is long ago forgotten."""

    seen_s: float = 0.0
    """Time that so many ran."""
    answer_s: float = 0.0
    """The same of all of them together."""
    tokens: float = 0.0
    """Tokens that came meanwhile."""
    num_tokens: int = 0
    """All tokens that ever came."""

    def add(self, passed_s: float, num_running: int, num_tokens: int) -> None:
        """Take in tokens that came so long after those before."""
        kept = math.exp(-passed_s / _MEMORY_S)
        self.seen_s = kept * self.seen_s + passed_s
        self.answer_s = kept * self.answer_s + passed_s * num_running
        self.tokens = kept * self.tokens + num_tokens
        self.num_tokens += num_tokens

    @property
    def point(self) -> tuple[float, float]:
        """How many answers ran on average, and the time that each of them took for a token."""
        return self.answer_s / max(self.seen_s, 1e-9), self.answer_s / self.tokens


class AnswerTimes:
    """What the verifiers make of all answers, which share it evenly.

    Numbers of answers are told apart by doublings. More answers than ever ran are expected to take as long
    as they did, up to twice as many: verifiers may have time to spare, and it is soon seen.

    Args:
        clock: the time in seconds, as time.monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._paces: dict[int, _Pace] = {}
        self._num_running = 0
        self._last = clock()
        self._lengths: deque[int] = deque(maxlen=_NUM_LENGTHS)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Take note that an answer runs until the block is left."""
        if not self._num_running:
            self._last = self._clock()  # until now there was nothing to do
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1

    def came(self, num_tokens: int) -> None:
        """Take note of tokens of an answer that runs."""
        now = self._clock()
        pace = self._paces.setdefault(self._num_running.bit_length(), _Pace())
        pace.add(min(now - self._last, _MEMORY_S), self._num_running, num_tokens)
        self._last = now

    def ended(self, num_tokens: int) -> None:
        """Take note of how long a whole answer is."""
        self._lengths.append(num_tokens)

    def longest_s(self, max_new_tokens: int, num_running: int) -> float:
        """Return how long an answer of so many tokens at most should take at most, as one of so many that
        run; 0 while nothing is known."""
        return _MARGIN * self._token_s(num_running) * self._length(max_new_tokens)

    def _token_s(self, num_running: int) -> float:
        """Return the time that one of so many answers takes for a token: straight between what is known."""
        known = sorted(pace.point for pace in self._paces.values() if pace.num_tokens >= _TOKENS_TO_KNOW)
        if not known:
            return 0.0
        most, slowest_s = known[-1]
        if num_running >= most:
            # Up to twice as many may take as long each; beyond that they share what these get.
            return slowest_s * max(1.0, num_running / (2 * most))
        below = max((point for point in known if point[0] <= num_running), default=known[0])
        above = min(point for point in known if point[0] > num_running)
        if below == above:
            return above[1]
        share = (num_running - below[0]) / (above[0] - below[0])
        return below[1] + share * (above[1] - below[1])

    def _length(self, max_new_tokens: int) -> int:
        if not self._lengths:
            return min(_FIRST_LENGTH, max_new_tokens)
        long = sorted(self._lengths)[math.ceil(_LONG * len(self._lengths)) - 1]
        return min(long, max_new_tokens)
