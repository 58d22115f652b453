"""Requests that wait for room: callers take turns, and what room verifiers have is found out by trying.

There are two kinds of room. How many requests may run at a time is known here. What the verifiers have is
not: other gateways use them as well, and a request may need much or little. So a request whose turn has come
tries, and is sent back where all verifiers are too full for it. From then on they are taken for full, and
only these may try: one request for each session of ours that has ended since, and one after a pause now and
then, because other gateways' sessions end as well. Where such a trial finds room, two more may try.

A request whose session a verifier preempted waits again, in the middle of its answer. It comes before all
that have not begun, is never refused, and goes on where it was.
"""

from __future__ import annotations

import asyncio
from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from gateway.place import Place, State
from specdec.contract.errors import SpecdecError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
"""Pauses before a trial, seconds: the first, and the longest, to which they double."""
_NUM_FOLLOWERS = 2
"""How many may try once a trial found room."""


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
        self._preempted: list[Place] = []
        """Who waits in the middle of an answer, in the order in which they came; they come first."""
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
        self.num_ended = 0
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
            may_begin: whether it may begin beside so many requests that have room. It may in any case where
                there are no others; where it may not, other callers' requests begin before it.

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
        may_run = not self._is_waited_in and not self._is_full and self.num_running < self._max_running
        own = self._lines.get(caller, [])
        is_short = self._num_new < self._max_waiting or self._most(len) > len(own) + 1
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
        if not place.has_run:
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
        self.num_ended += 1
        self._num_finishing += 1
        self._call()

    def _leave(self, place: Place) -> None:
        state = place.leave()
        if state is State.WAITING:
            self._line_of(place).remove(place)
            self._forget_if_empty(place.caller)
            self.num_waiting -= 1
        elif state is not State.GONE:
            self.num_running -= 1
            # Who tried may have held room, of which nobody told it yet.
            self.num_ended += state is not State.FINISHING
            self._num_finishing -= state is State.FINISHING
        self._call()

    @property
    def _is_waited_in(self) -> bool:
        return bool(self._lines or self._preempted)

    @property
    def _num_new(self) -> int:
        """Requests that wait and have not begun: only these may be too many."""
        return self.num_waiting - len(self._preempted)

    def _line_of(self, place: Place) -> list[Place]:
        return self._preempted if place.has_run else self._lines.setdefault(place.caller, [])

    def _line_up(self, place: Place) -> None:
        insort(self._line_of(place), place, key=_number)
        self.num_waiting += 1

    def _forget_if_empty(self, caller: str) -> None:
        if caller in self._lines and not self._lines[caller]:
            del self._lines[caller]

    def _next(self) -> Place | None:
        """Return whose turn it is. Callers whose first request may not begin yet are passed over, and keep
        their turn; None: there is nobody else."""
        if self._preempted:
            return self._preempted[0]
        firsts = (line[0] for line in self._lines.values())
        return next(
            (place for place in firsts if not self.num_holding or place.may_begin(self.num_holding)), None
        )

    def _take(self, place: Place) -> None:
        """Take who comes next out of the queue."""
        self.num_waiting -= 1
        self._line_of(place).remove(place)
        if not place.has_run:
            self._lines.move_to_end(place.caller)
            self._forget_if_empty(place.caller)

    def _call(self) -> None:
        """Call all who may run now."""
        while not self._num_lost and self.num_running < self._max_running and (place := self._next()):
            may_try, is_trial = self._take_try()
            if not may_try:
                break
            self._take(place)
            self.num_running += 1
            place.start(self.num_ended, is_trial=is_trial)
        self._settle()

    def _take_try(self) -> tuple[bool, bool]:
        """Return whether one more may try, and whether without a session's end; it is taken to do so."""
        if not self._is_full:
            return True, False
        if self._num_answered < self.num_ended:
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
        if self._num_new > self._max_waiting:
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
        if not self._is_waited_in:
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
