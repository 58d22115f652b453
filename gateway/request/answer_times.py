"""How long an answer should take at the present load, by what came lately and how long answers are."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable

_MEMORY_S = 10.0
"""For how long what was seen counts, seconds in which something ran; also the longest pause that counts: a
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


class AnswerTimes:
    """What the verifiers make of all answers together, which share it evenly.

    Where verifiers have time to spare, more answers get more tokens a second, and what is expected of more
    than there are is too long; it is right once there are as many.

    Args:
        clock: the time in seconds, as time.monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen_s = 0.0
        """Time in which something ran, the less of it the longer ago it is."""
        self._seen_tokens = 0.0
        """Tokens that came meanwhile, likewise."""
        self._num_tokens = 0
        """All tokens that ever came."""
        self._last = clock()
        self._lengths: deque[int] = deque(maxlen=_NUM_LENGTHS)

    def begun(self) -> None:
        """Take note that an answer begins while none runs: until now there was nothing to do."""
        self._last = self._clock()

    def came(self, num_tokens: int) -> None:
        """Take note of tokens of any answer."""
        now = self._clock()
        passed_s = min(now - self._last, _MEMORY_S)
        kept = math.exp(-passed_s / _MEMORY_S)
        self._seen_s = kept * self._seen_s + passed_s
        self._seen_tokens = kept * self._seen_tokens + num_tokens
        self._num_tokens += num_tokens
        self._last = now

    def ended(self, num_tokens: int) -> None:
        """Take note of how long a whole answer is."""
        self._lengths.append(num_tokens)

    def longest_s(self, max_new_tokens: int, num_sharing: int) -> float:
        """Return how long an answer of so many tokens at most should take at most, as one of so many that
        run; 0 while nothing is known."""
        if self._num_tokens < _TOKENS_TO_KNOW:
            return 0.0
        token_s = num_sharing * self._seen_s / self._seen_tokens
        return _MARGIN * token_s * self._length(max_new_tokens)

    def _length(self, max_new_tokens: int) -> int:
        if not self._lengths:
            return min(_FIRST_LENGTH, max_new_tokens)
        long = sorted(self._lengths)[math.ceil(_LONG * len(self._lengths)) - 1]
        return min(long, max_new_tokens)
