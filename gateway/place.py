"""A request's place in a gateway: it waits for its turn, runs, and says how it gets on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol

from specdec.contract.errors import SpecdecError


class State(Enum):
    """How far a request has come."""

    WAITING = auto()
    TRYING = auto()
    """Its turn has come; it does not know yet whether a verifier takes it."""
    HOLDING = auto()
    """It holds room of a verifier."""
    FINISHING = auto()
    """It runs, but holds a verifier's room no longer: its client still reads."""
    GONE = auto()


class Queue(Protocol):
    """What a place belongs to, and tells of what happens to it."""

    @property
    def num_holding(self) -> int:
        """Requests that have room of the verifiers, or try to."""

    @property
    def num_ended(self) -> int:
        """Sessions that have ended."""

    def found_room(self, *, is_trial: bool) -> None:
        """Take note that a verifier took a request."""

    def found_none(self, place: Place, num_seen: int, *, is_trial: bool) -> None:
        """Put a request that all verifiers refused before all others."""

    def one_lost(self) -> None:
        """Call nobody while a request that runs looks for another verifier."""

    def one_goes_on(self) -> None:
        """Call whoever may run now: that request has found one, or has ended."""

    def session_ended(self) -> None:
        """Let a request try: one of ours has left its verifier."""


class Place:
    """A request's place: it waits for its turn, runs, and is sent back where there is no room after all."""

    def __init__(
        self, queue: Queue, caller: str, number: int, num_bytes: int, may_begin: Callable[[int], bool]
    ) -> None:
        self.caller = caller
        self.number = number
        """Number of the request in the order in which they came."""
        self.num_bytes = num_bytes
        """Size of the request."""
        self.may_begin = may_begin
        """Whether it may begin beside so many requests that have room."""
        self._queue = queue
        self._state = State.WAITING
        self._called = asyncio.Event()
        self._refusal: SpecdecError | None = None
        self._earlier_s = 0.0
        """Seconds that it waited before it ran and was preempted."""
        self._waits_from = time.monotonic()
        self._started_at: float | None = None
        self.has_waited = False
        """Whether its turn did not come at once, or it was sent back."""
        self._is_trial = False
        """Whether it tries because a pause is over, not because a session has ended."""
        self._num_seen = 0
        """How many sessions had ended when it began to try."""
        self._has_lost = False
        """Whether its verifier was lost, and no other has taken it yet."""
        self.has_run = False
        """Whether a verifier took the request."""

    @property
    def waited_s(self) -> float:
        """Seconds from its arrival until its last turn, or until now if it waits; without those in which it
        ran before it was preempted."""
        stop = time.monotonic() if self._started_at is None else self._started_at
        return self._earlier_s + stop - self._waits_from

    @property
    def num_sharing(self) -> int:
        """How many requests have room of the verifiers, or try to, this one included."""
        return self._queue.num_holding + (self._state is State.WAITING)

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
        if not self._has_lost and self._state is not State.GONE:
            self._has_lost = True
            self._queue.one_lost()

    def _goes_on(self) -> None:
        if self._has_lost:
            self._has_lost = False
            self._queue.one_goes_on()

    def took_room(self) -> None:
        """Note that a verifier has the request: it began, or a round of it ended."""
        self._goes_on()
        self.has_run = True
        if self._state is State.TRYING:
            self._state = State.HOLDING
            self._queue.found_room(is_trial=self._is_trial)

    def gave_room(self) -> None:
        """Note that its session on a verifier has ended, if there was one."""
        self._goes_on()
        if self._state is State.HOLDING:
            self._state = State.FINISHING
            self._queue.session_ended()

    def send_back(self, refusal: SpecdecError) -> None:
        """Let a request wait again, before all others: the verifiers have no room for it.

        Args:
            refusal: what they said; the request ends with it if the queue is full.
        """
        assert self._state in (State.TRYING, State.HOLDING)
        self._state, self._refusal, self._started_at = State.WAITING, refusal, None
        self.has_waited = True
        self._called.clear()
        self._queue.found_none(self, self._num_seen, is_trial=self._is_trial)

    async def turn_again(self, refusal: SpecdecError) -> None:
        """Wait again in the middle of an answer, and return when it may go on.

        Args:
            refusal: what a verifier said that preempted it, or has no room to go on.
        """
        self._goes_on()
        if self._state is State.HOLDING:
            assert self._started_at is not None
            self._earlier_s += self._started_at - self._waits_from
            self._waits_from = time.monotonic()
            # What ended until now did not do.
            self._num_seen, self._is_trial = self._queue.num_ended, False
        self.has_run = True
        self.send_back(refusal)
        await self._called.wait()

    # What follows is the queue's own.

    def start(self, num_seen: int, *, is_trial: bool) -> None:
        """Call the request: its turn has come."""
        self._state, self._refusal = State.TRYING, None
        self._num_seen, self._is_trial = num_seen, is_trial
        self._started_at = time.monotonic()
        self._called.set()

    def give_way(self, refusal: SpecdecError, *, is_final: bool) -> None:
        """End the wait with an error; its verifier's own goes before one that is not final, if it has been
        sent back."""
        self._state = State.GONE
        self._refusal = refusal if is_final else self._refusal or refusal
        self._started_at = time.monotonic()
        self._called.set()

    def leave(self) -> State:
        """End it, and return how far it had come."""
        self._goes_on()
        state, self._state = self._state, State.GONE
        return state
