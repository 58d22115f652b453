"""Room in the KV pool for sessions that grow: blocks are taken as answers get longer.

Where a session needs a block and there is none, the youngest session is preempted: it has lost the least, and
the oldest one always goes on to its end. So some session ends in any case, and all of them do in their turn.

A pass may be writing to a session's blocks. They are given back when it is over, and never before.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from specdec.runtime.kv_pool import KvPool, SharedBlocks
from specdec.runtime.kv_slots import KvAllocation
from verifier_service.session import Session

logger = logging.getLogger(__name__)

MARGIN_TOKENS = 16
"""Room behind the prompt that a session begins with, tokens."""


class KvRoom:
    """Shares the blocks of a pool among sessions. Used from one event loop.

    Args:
        give_back: frees all that a session holds of the pool, once.
        on_preempted: called once for every session that is preempted.
    """

    def __init__(
        self, pool: KvPool, give_back: Callable[[Session], None], on_preempted: Callable[[], None]
    ) -> None:
        self._pool = pool
        self._give_back = give_back
        self._on_preempted = on_preempted
        self._sessions: dict[Session, None] = {}
        """Those that hold blocks, in the order in which they were opened."""
        self._waiting: set[Session] = set()
        """Those that wait for a block."""
        self._changed = asyncio.Event()

    @property
    def sessions(self) -> Sequence[Session]:
        """The sessions that hold blocks, the oldest first."""
        return tuple(self._sessions)

    def allocate(self, num_tokens: int, max_length: int, shared: SharedBlocks) -> KvAllocation:
        """Take blocks for a session that begins with so many tokens, and for a little more.

        Every session that runs and is not at its end yet keeps a block to go on with.

        Args:
            max_length: the most tokens that the session may have.
            shared: blocks that hold the first tokens already.

        Raises:
            InvalidArgumentError: the session would never fit.
            ResourceExhaustedError: there is no room now.
        """
        self._pool.require_possible(max_length)
        num_growing = sum(session.may_grow for session in self._sessions)
        return self._pool.allocate(
            min(max_length, num_tokens + MARGIN_TOKENS), shared, num_spared=num_growing, will_grow=True
        )

    def add(self, session: Session) -> None:
        """Let a session that has its first blocks take part; it is the youngest."""
        self._sessions[session] = None

    def remove(self, session: Session) -> None:
        """Give back what a session holds, if it still holds anything."""
        if session in self._sessions:
            del self._sessions[session]
            self._give_back(session)
            self._notify()

    @contextmanager
    def in_pass(self, session: Session) -> Iterator[None]:
        """Keep a session's blocks while a pass may use them: if it is preempted meanwhile, until the end.

        Raises:
            AbortedError: it has been preempted before.
        """
        session.check_preempted()
        session.is_in_pass = True
        try:
            yield
        finally:
            session.is_in_pass = False
            if session.is_preempted:
                self.remove(session)

    async def grow(self, session: Session, num_drafted: int) -> None:
        """Take room for a session's next round: for its committed tokens in any case, and for drafted ones
        where there are free blocks. Nobody is preempted for a draft.

        Raises:
            AbortedError: the session was preempted.
        """
        length = session.committed_length
        if length + num_drafted <= session.allocation.capacity:
            return
        if not self._waiting and self._take(session, length + num_drafted):
            return
        if length > session.allocation.capacity:
            await self._require(session, length)

    async def prepare(self, session: Session, length: int) -> None:
        """Take room for the next tokens of a prompt, up to so many in all.

        A session begins with room for all of its prompt, except in layers with a sliding window, where a long
        prompt passes through.

        Raises:
            AbortedError: the session was preempted.
        """
        session.check_preempted()
        if length > session.allocation.capacity:
            await self._require(session, length)

    def give_back_unseen(self, session: Session, position: int, keys: Sequence[bytes]) -> None:
        """Give back blocks that no token from a position on sees.

        Args:
            keys: of the first blocks of the session's text, to keep what they hold while there is room.
        """
        rest = self._pool.give_back(session.allocation, position, keys)
        if rest is not session.allocation:
            session.use(rest)
            self._notify()

    async def _require(self, session: Session, length: int) -> None:
        """Take room for so many tokens, at the cost of younger sessions if need be."""
        self._waiting.add(session)
        try:
            while not (self._is_next(session) and self._take(session, length)):
                if self._is_next(session) and not any(other.is_preempted for other in self._sessions):
                    self._preempt(self._youngest())
                else:
                    await self._changed.wait()
                session.check_preempted()
        finally:
            self._waiting.discard(session)
            self._notify()

    def _is_next(self, session: Session) -> bool:
        """Return whether a session that waits is the oldest that does."""
        return next(each for each in self._sessions if each in self._waiting) is session

    def _take(self, session: Session, length: int) -> bool:
        """Return whether a session has got room for so many tokens."""
        grown = self._pool.grow(session.allocation, length)
        if grown:
            session.use(grown)
        return grown is not None

    def _youngest(self) -> Session:
        """Return the session that loses least by ending: one that has finished, else the youngest."""
        finished = (session for session in self._sessions if session.finish_reason)
        return next(finished, next(reversed(self._sessions)))

    def _preempt(self, session: Session) -> None:
        if session.finish_reason:
            self.remove(session)
            return
        session.is_preempted = True
        self._on_preempted()
        logger.info(
            "session preempted: an older one needs its KV",
            extra={"committed_length": session.committed_length, "num_sessions": len(self._sessions)},
        )
        if not session.is_in_pass:
            self.remove(session)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
