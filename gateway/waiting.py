"""Requests that wait for room: callers take turns, and what room verifiers have is found out by trying.

There are two kinds of room. How many requests may run at a time is known here. What the verifiers have is
not: other gateways use them as well, and a request may need much or little. So a request whose turn has come
tries, and is sent back where all verifiers are too full for it. From then on they are taken for full, and
only these may try: one request for each session of ours that has ended since, and one after a pause now and
then, because other gateways' sessions end as well. Where such a trial finds room, two more may try.
"""

from __future__ import annotations

import asyncio
import time
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto
from typing import Protocol

from specdec.contract.errors import SpecdecError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
"""Pauses before a trial, seconds: the first, and the longest, to which they double."""
_NUM_FOLLOWERS = 2
"""How many may try once a trial found room."""


class _State(Enum):
    WAITING = auto()
    TRYING = auto()
    """Its turn has come; it does not know yet whether a verifier takes it."""
    HOLDING = auto()
    """It holds room of a verifier."""
    FINISHING = auto()
    """It runs, but holds a verifier's room no longer: its client still reads."""
    GONE = auto()


class Place:
    """A request's place: it waits for its turn, runs, and is sent back where there is no room after all."""

    def __init__(
        self, queue: WaitingQueue, caller: str, number: int, num_bytes: int, may_begin: Callable[[int], bool]
    ) -> None:
        self.caller = caller
        self.number = number
        """Number of the request in the order in which they came."""
        self.num_bytes = num_bytes
        """Size of the request."""
        self.may_begin = may_begin
        """Whether it may begin as one of so many requests that have room."""
        self._queue = queue
        self._state = _State.WAITING
        self._called = asyncio.Event()
        self._refusal: SpecdecError | None = None
        self._begun_at = time.monotonic()
        self._started_at: float | None = None
        self.has_waited = False
        """Whether its turn did not come at once, or it was sent back."""
        self._is_trial = False
        """Whether it tries because a pause is over, not because a session has ended."""
        self._num_seen = 0
        """How many sessions had ended when it began to try."""
        self._has_lost = False
        """Whether its verifier was lost, and no other has taken it yet."""

    @property
    def waited_s(self) -> float:
        """Seconds from its arrival until its last turn, or until now if it waits."""
        return (time.monotonic() if self._started_at is None else self._started_at) - self._begun_at

    @property
    def num_sharing(self) -> int:
        """How many requests have room of the verifiers, or try to, this one included."""
        return self._queue.num_holding + (self._state is _State.WAITING)

    @property
    def has_run(self) -> bool:
        """Whether a verifier took the request."""
        return self._state in (_State.HOLDING, _State.FINISHING)

    async def turn(self) -> None:
        """Return when the request may run.

        Raises:
            SpecdecError: the queue is full, and it has to give way.
        """
        self.has_waited |= not self._called.is_set()
        await self._called.wait()
        if self._refusal:
            raise self._refusal

    def lost_room(self) -> None:
        """Note that its verifier was lost: it goes on elsewhere, before anybody begins."""
        if not self._has_lost and self._state is not _State.GONE:
            self._has_lost = True
            self._queue.one_lost()

    def _goes_on(self) -> None:
        if self._has_lost:
            self._has_lost = False
            self._queue.one_goes_on()

    def took_room(self) -> None:
        """Note that a verifier has the request: it began, or a round of it ended."""
        self._goes_on()
        if self._state is _State.TRYING:
            self._state = _State.HOLDING
            self._queue.found_room(is_trial=self._is_trial)

    def gave_room(self) -> None:
        """Note that its session on a verifier has ended, if there was one."""
        self._goes_on()
        if self._state is _State.HOLDING:
            self._state = _State.FINISHING
            self._queue.session_ended()

    def send_back(self, refusal: SpecdecError) -> None:
        """Let a request wait again, before all others: the verifiers have no room for it.

        Args:
            refusal: what they said; the request ends with it if the queue is full.
        """
        assert self._state is _State.TRYING
        self._state, self._refusal, self._started_at = _State.WAITING, refusal, None
        self.has_waited = True
        self._called.clear()
        self._queue.found_none(self, self._num_seen, is_trial=self._is_trial)

    # What follows is the queue's own.

    def start(self, num_seen: int, *, is_trial: bool) -> None:
        """Call the request: its turn has come."""
        self._state, self._refusal = _State.TRYING, None
        self._num_seen, self._is_trial = num_seen, is_trial
        self._started_at = time.monotonic()
        self._called.set()

    def give_way(self, refusal: SpecdecError, *, is_final: bool) -> None:
        """End the wait with an error; its verifier's own goes before one that is not final, if it has been
        sent back."""
        self._state = _State.GONE
        self._refusal = refusal if is_final else self._refusal or refusal
        self._started_at = time.monotonic()
        self._called.set()

    def leave(self) -> _State:
        """End it, and return how far it had come."""
        self._goes_on()
        state, self._state = self._state, _State.GONE
        return state


class Timer(Protocol):
    """A call that is to come, as asyncio.TimerHandle is."""

    def cancel(self) -> None: ...


def _call_later(delay_s: float, callback: Callable[[], None]) -> Timer:
    return asyncio.get_running_loop().call_later(delay_s, callback)


class WaitingQueue:
    """Lets requests run while there is room, callers in turn, first come first served within a caller.

    A request that has been sent back comes before all others, however much it needs, so that small ones do
    not keep a large one waiting for ever. Of a queue that is too long or too large, the longest or largest
    line loses its last request, so that a caller with many does not push out a caller with one.

    Args:
        max_running: most requests that run at a time.
        max_waiting: most requests that wait; 0: none does.
        max_waiting_bytes: most bytes of all requests that wait.
        refusal: makes the error for a request that finds the queue full.
        call_later: starts a timer, as an event loop does.
    """

    def __init__(
        self,
        max_running: int,
        max_waiting: int,
        *,
        max_waiting_bytes: int,
        refusal: Callable[[], SpecdecError],
        call_later: Callable[[float, Callable[[], None]], Timer] = _call_later,
    ) -> None:
        self._max_running, self._max_waiting = max_running, max_waiting
        self._max_waiting_bytes = max_waiting_bytes
        self._make_refusal = refusal
        self._is_draining = False
        self._call_later = call_later
        self._lines: OrderedDict[str, list[Place]] = OrderedDict()
        """Who waits, by caller; the first caller's turn is next."""
        self.num_waiting = 0
        """Requests that wait."""
        self.num_running = 0
        """Requests that run, or try to."""
        self._num_finishing = 0
        """Those among them that hold a verifier's room no longer."""
        self._num_lost = 0
        """Requests that run and have lost their verifier: room that comes is theirs."""
        self._num_come = 0
        self._is_full = False
        """Whether the verifiers are taken for full."""
        self._num_ended = 0
        """Sessions that have ended."""
        self._num_answered = 0
        """How many of these have been answered by a try, or ended before one that was refused."""
        self._num_trials = 0
        """How many may try without a session's end."""
        self._pause_s = FIRST_PAUSE_S
        self._timer: Timer | None = None

    @property
    def num_holding(self) -> int:
        """Requests that have room of the verifiers, or try to."""
        return self.num_running - self._num_finishing

    @contextmanager
    def place(
        self, caller: str, num_bytes: int = 0, may_begin: Callable[[int], bool] = lambda number: True
    ) -> Iterator[Place]:
        """Give a request of so many bytes a place until the block is left.

        Args:
            may_begin: whether it may begin as one of so many requests that have room. It may in any case
                where there are no others; where it may not, nobody begins before it.

        Raises:
            SpecdecError: the queue is full.
        """
        self.require_room(caller, num_bytes)
        place = Place(self, caller, self._num_come, num_bytes, may_begin)
        self._num_come += 1
        self._line_up(place)
        try:
            self._call()
            self._shorten()
            yield place
        finally:
            self._leave(place)

    def require_room(self, caller: str, num_bytes: int = 0) -> None:
        """Check that a caller's request may run at once or wait, if need be in the place of another's.

        Raises:
            SpecdecError: the queue is full.
        """
        may_run = not self._lines and not self._is_full and self.num_running < self._max_running
        own = self._lines.get(caller, [])
        is_short = self.num_waiting < self._max_waiting or self._most(len) > len(own) + 1
        num_bytes_then = sum(map(_num_bytes, self._lines.values())) + num_bytes
        is_small = (
            num_bytes_then <= self._max_waiting_bytes or self._most(_num_bytes) > _num_bytes(own) + num_bytes
        )
        if not (may_run or (is_short and is_small)):
            raise self._make_refusal()

    def drain(self, refusal: Callable[[], SpecdecError]) -> None:
        """Let nobody wait from now on; what runs goes on.

        Args:
            refusal: makes the error for those who wait now, and for whoever would have to later.
        """
        self._max_waiting, self._make_refusal, self._is_draining = 0, refusal, True
        self._shorten()

    def found_room(self, *, is_trial: bool) -> None:
        """Take note that a verifier took a request."""
        if is_trial or not self._is_full:
            self._pause_s = FIRST_PAUSE_S
        if is_trial and self._is_full:
            self._num_trials += _NUM_FOLLOWERS
            self._call()

    def found_none(self, place: Place, num_seen: int, *, is_trial: bool) -> None:
        """Put a request that all verifiers refused before all others.

        Args:
            num_seen: how many sessions had ended when it began to try: their room did not do.
        """
        self.num_running -= 1
        if not self._is_full and not is_trial:
            self._pause_s = FIRST_PAUSE_S
        self._is_full, self._num_trials = True, 0
        self._num_answered = max(self._num_answered, num_seen)
        self._line_up(place)
        self._lines.move_to_end(place.caller, last=False)
        self._call()
        self._shorten()

    def one_lost(self) -> None:
        """Call nobody while a request that runs looks for another verifier."""
        self._num_lost += 1

    def one_goes_on(self) -> None:
        """Call whoever may run now: that request has found one, or has ended."""
        self._num_lost -= 1
        self._call()

    def session_ended(self) -> None:
        """Let a request try: one of ours has left its verifier."""
        self._num_ended += 1
        self._num_finishing += 1
        self._call()

    def _leave(self, place: Place) -> None:
        state = place.leave()
        if state is _State.WAITING:
            self._lines[place.caller].remove(place)
            self._forget_if_empty(place.caller)
            self.num_waiting -= 1
        elif state is not _State.GONE:
            self.num_running -= 1
            # Who tried may have held room, of which nobody told it yet.
            self._num_ended += state is not _State.FINISHING
            self._num_finishing -= state is _State.FINISHING
        self._call()

    def _line_up(self, place: Place) -> None:
        insort(self._lines.setdefault(place.caller, []), place, key=lambda waiting: waiting.number)
        self.num_waiting += 1

    def _forget_if_empty(self, caller: str) -> None:
        if not self._lines[caller]:
            del self._lines[caller]

    def _call(self) -> None:
        """Call all who may run now."""
        while self._lines and self._may_begin():
            may_try, is_trial = self._take_try()
            if not may_try:
                break
            caller, line = next(iter(self._lines.items()))
            place = line.pop(0)
            self._lines.move_to_end(caller)
            self._forget_if_empty(caller)
            self.num_waiting -= 1
            self.num_running += 1
            place.start(self._num_ended, is_trial=is_trial)
        self._settle()

    def _may_begin(self) -> bool:
        """Return whether the next request may run, if the verifiers have room for it."""
        if self._num_lost or self.num_running >= self._max_running:
            return False
        next_one = next(iter(self._lines.values()))[0]
        return not self.num_holding or next_one.may_begin(self.num_holding + 1)

    def _take_try(self) -> tuple[bool, bool]:
        """Return whether one more may try, and whether without a session's end; it is taken to do so."""
        if not self._is_full:
            return True, False
        if self._num_answered < self._num_ended:
            self._num_answered += 1
            return True, False
        if self._num_trials:
            self._num_trials -= 1
            return True, True
        return False, False

    def _most(self, measure: Callable[[Sequence[Place]], int]) -> int:
        return max(map(measure, self._lines.values()), default=0)

    def _excess(self) -> Callable[[Sequence[Place]], int] | None:
        """Return the measure of lines by which too much waits; None: nothing is too much."""
        if self.num_waiting > self._max_waiting:
            return len
        is_large = sum(map(_num_bytes, self._lines.values())) > self._max_waiting_bytes
        return _num_bytes if is_large else None

    def _shorten(self) -> None:
        """Refuse who is one too many: the last to come of the lines that have most."""
        while measure := self._excess():
            most = self._most(measure)
            place = max((line[-1] for line in self._lines.values() if measure(line) == most), key=_number)
            self._lines[place.caller].pop()
            self._forget_if_empty(place.caller)
            self.num_waiting -= 1
            place.give_way(self._make_refusal(), is_final=self._is_draining)
        self._settle()

    def _settle(self) -> None:
        """Let a pause run where somebody waits for verifiers; whoever comes when nobody waits finds out anew
        whether they are full."""
        if not self._lines:
            self._is_full, self._num_trials = False, 0
        if self._is_full and self._timer is None:
            self._timer = self._call_later(self._pause_s, self._end_pause)
        elif not self._is_full and self._timer:
            self._timer.cancel()
            self._timer = None

    def _end_pause(self) -> None:
        self._timer = None
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        self._num_trials = max(self._num_trials, 1)
        self._call()


def _number(place: Place) -> int:
    return place.number


def _num_bytes(line: Sequence[Place]) -> int:
    return sum(place.num_bytes for place in line)
