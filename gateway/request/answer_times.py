"""How long an answer should take, by how many run: how long prompts take to read, how fast tokens came
lately, and how long answers are."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from specdec.contract.step_costs import StepCosts

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
_ROUNDING = 1e-9
_STALE_S = 60.0
"""For how long what so many answers took counts while other numbers of them run, seconds."""
_NUM_PROMPTS = 64
"""How many prompts the knowledge of how long they take to read goes back."""
_MOST_OFF = 4.0
"""By which factor a prompt's time may be off the line and still count as it is."""
SHARE_TO_RUN = 0.65
"""Share of the time until a request's deadline that its answer may take: the rest is for waiting."""


@dataclass(slots=True)
class _Pace:
    """How fast tokens come while about so many answers run, what is long ago forgotten."""

    seen_s: float = 0.0
    """Time that so many ran."""
    answer_s: float = 0.0
    """The same of all of them together."""
    decoding_s: float = 0.0
    """The same of those that have read their prompts."""
    tokens: float = 0.0
    """Tokens that came meanwhile, but for each answer's first, which comes of reading."""
    num_tokens: int = 0
    """All such tokens that ever came."""
    last_s: float = 0.0
    """When so many ran last."""
    num_prompts: int = 0
    """Prompts that were read."""
    reading: StepCosts = field(default_factory=lambda: StepCosts(_NUM_PROMPTS, most_off=_MOST_OFF))
    """Time to the first token by the length of the prompt."""

    def pass_by(self, passed_s: float, num_running: int, num_decoding: int) -> None:
        """Take in that time passed."""
        kept = math.exp(-passed_s / _MEMORY_S)
        self.seen_s = kept * self.seen_s + passed_s
        self.answer_s = kept * self.answer_s + passed_s * num_running
        self.decoding_s = kept * self.decoding_s + passed_s * num_decoding
        self.tokens *= kept

    @property
    def num_running(self) -> float:
        """How many answers ran on average."""
        return self.answer_s / max(self.seen_s, 1e-9)

    @property
    def token_s(self) -> float | None:
        """The time that each of them took for a token; None: it is not known yet."""
        # Of answers with one token each only the time comes in: what is left of earlier tokens tells nothing.
        is_known = self.num_tokens >= _TOKENS_TO_KNOW and self.tokens >= 1.0
        return self.decoding_s / self.tokens if is_known else None

    def reading_s(self, num_prompt_tokens: int) -> float | None:
        """The time that one of them took to read a prompt of that length; None: it is not known yet."""
        return self.reading(num_prompt_tokens) / 1e9 if self.num_prompts else None


@dataclass(eq=False, slots=True)
class RunningAnswer:
    """An answer that runs: it reads its prompt, then its tokens come."""

    _times: AnswerTimes
    has_read: bool = False
    """Whether its first token is there."""
    is_whole: bool = False
    """Whether it came to its own end, and was not cut."""
    num_tokens: int = 0
    num_at_start: int = 0
    """How many answers ran when it began, this one included."""

    def read(self, num_prompt_tokens: int, reading_s: float) -> None:
        """Take note of the first token: it took so long to read a prompt of that length."""
        self._times.read(self, num_prompt_tokens, reading_s)
        self.has_read, self.num_tokens = True, 1

    def came(self, num_tokens: int) -> None:
        """Take note of further tokens."""
        self.num_tokens += num_tokens
        self._times.came(num_tokens)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Take note that it waits, and does not run, until the block is left."""
        self._times.leave(self)
        try:
            yield
        finally:
            self._times.enter(self)


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
        self._running: set[RunningAnswer] = set()
        self._last = clock()
        self._lengths: deque[tuple[int, bool]] = deque(maxlen=_NUM_LENGTHS)
        """How long the last answers are, and whether they are whole."""
        self._long = _FIRST_LENGTH
        """How long an answer is expected to be."""

    @contextmanager
    def running(self) -> Iterator[RunningAnswer]:
        """Take note that an answer runs until the block is left."""
        answer = RunningAnswer(self)
        self.enter(answer)
        try:
            yield answer
        finally:
            self.leave(answer)
            if answer.num_tokens:
                self._lengths.append((answer.num_tokens, answer.is_whole))
                self._long = _long(self._lengths)

    def longest_s(self, max_new_tokens: int, num_running: int, num_prompt_tokens: int = 0) -> float:
        """Return how long an answer of so many tokens at most should take at most, as one of so many that
        run; 0 while it is not known how fast tokens come."""
        token_s = self._time_s(num_running, lambda pace: pace.token_s)
        if not token_s:
            return 0.0
        reading_s = self._time_s(num_running, lambda pace: pace.reading_s(num_prompt_tokens))
        return _MARGIN * (reading_s + token_s * min(self._long, max_new_tokens))

    def _time_s(self, num_running: int, of: Callable[[_Pace], float | None]) -> float:
        """Return a time of one of so many answers: straight between what is known. What was long ago counts
        only where nothing is newer, so that a bad moment does not keep so many from being tried again.
        """
        seen = (pace for pace in self._paces.values() if pace.answer_s)
        paces = [(pace, value) for pace in seen if (value := of(pace)) is not None]
        if not paces:
            return 0.0
        newest_s = max(pace.last_s for pace, _ in paces)
        known = sorted(
            (pace.num_running, value) for pace, value in paces if pace.last_s > newest_s - _STALE_S
        )
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

    # What follows is for the answers that run.

    def enter(self, answer: RunningAnswer) -> None:
        """Count an answer."""
        if self._running:
            self._pass_by()
        self._last = self._clock()  # without any there was nothing to do
        self._running.add(answer)
        answer.num_at_start = len(self._running)

    def leave(self, answer: RunningAnswer) -> None:
        """Count an answer no more."""
        self._pass_by()
        self._running.remove(answer)

    def read(self, answer: RunningAnswer, num_prompt_tokens: int, reading_s: float) -> None:
        """Take note that an answer's prompt was read."""
        self._pass_by()
        # The others may have ended meanwhile, and it is they who made it long.
        pace = self._pace(max(answer.num_at_start, len(self._running)))
        pace.num_prompts += 1
        pace.reading.add(num_prompt_tokens, reading_s * 1e9)

    def came(self, num_tokens: int) -> None:
        """Take note of tokens of an answer that runs."""
        pace = self._pass_by()
        pace.tokens += num_tokens
        pace.num_tokens += num_tokens

    def _pace(self, num_running: int) -> _Pace:
        return self._paces.setdefault(num_running.bit_length(), _Pace())

    def _pass_by(self) -> _Pace:
        """Take in the time that passed while the same answers ran, and return their pace."""
        now, num_running = self._clock(), len(self._running)
        pace = self._pace(num_running)
        num_decoding = sum(answer.has_read for answer in self._running)
        pace.pass_by(min(now - self._last, _MEMORY_S), num_running, num_decoding)
        self._last = pace.last_s = now
        return pace


@dataclass(slots=True)
class ExpectedTime:
    """How long one request's answer should take."""

    times: AnswerTimes
    max_new_tokens: int
    num_prompt_tokens: int = 0
    """Length of its prompt; 0 until the prompt is tokenised."""

    def longest_s(self, num_running: int) -> float:
        """Return how long it should take at most, as one of so many that run."""
        return self.times.longest_s(self.max_new_tokens, num_running, self.num_prompt_tokens)


def _long(lengths: Collection[tuple[int, bool]]) -> int:
    """Return the length that most answers do not exceed, by their lengths and whether they are whole.

    An answer that was cut would have been longer than it got: leaving it out would count the short ones only.
    After Kaplan and Meier 1958, "Nonparametric estimation from incomplete observations".
    """
    share_of_longer, num_left = 1.0, len(lengths)
    for length, is_whole in sorted(lengths, key=lambda each: (each[0], not each[1])):
        share_of_longer *= 1 - is_whole / num_left
        num_left -= 1
        if share_of_longer <= 1 - _LONG + _ROUNDING:
            return length
    return max(length for length, _ in lengths)
