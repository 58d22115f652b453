"""Links to drafters, which may be late, lost or wrong, for a loop that must not care."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from gateway.rounds.link_states import DrafterSession, Fallback, FirstDraft, LinkState, Lost, Opening, Ready
from gateway.rounds.records import NEVER_RIGHT, DrafterRecords, TrackRecord
from gateway.rounds.vocabulary import Draft, DraftRequest, DraftSize
from specdec.contract.draft_tree import ANCHOR, DraftTree
from specdec.contract.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    SpecdecError,
    UnavailableError,
    UnimplementedError,
    log_defect,
    status_code,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_OPEN_TIMEOUT_S = 60.0
"""A drafter may have to read a long prompt, and the target's state of it, before it can draft."""
_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
_MAX_REASON_LENGTH = 500
_READING = DraftSize(1)
"""What a drafter is asked for so that it reads what was before."""
_PERMANENT = (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnimplementedError,
)
"""Errors that another try would meet again."""

Connect = Callable[[Sequence[int]], Awaitable[DrafterSession]]
"""Open a session whose committed tokens are the argument, on a healthy drafter."""


class NoDrafts:
    """The draft source of plain decoding."""

    async def propose(self, request: DraftRequest) -> Draft:
        """Give an empty draft."""
        return Draft()

    async def let_go(self) -> None:
        """Nothing is held."""

    async def open_again(self, committed_token_ids: Sequence[int]) -> None:
        """Nothing was let go."""


class DraftLink:
    """Keeps a request supplied with a drafter as long as one is healthy. Use as `async with`.

    Opening runs beside the target's prefill; only the first round waits for it. A first draft, which may
    have much to read, may take `open_timeout_s`; the rounds go on without it after `timeout_s`. What goes
    wrong costs the round its draft: no drafter, an error, another draft later than `timeout_s`, token ids the
    target does not have. It is tried again, maybe elsewhere, after a pause of `retry_s`, which grows while it
    fails.

    Args:
        drafter: name of the drafter in the log.
        records: how often the drafter's replicas were right, in all sessions. Each draft is judged by what
            the target picked; a replica is left while its record says that asking it is no use, and the
            drafter is not asked while that is said of all its replicas.
        may_pause: whether the records decide; False: the drafter is asked in any case.
        opens_at_once: whether it opens at the start; otherwise it opens when it is first joined.

    The link is always in one state of `link_states`, and `_enter` is the only place where that changes.
    """

    def __init__(
        self,
        connect: Connect,
        prompt_token_ids: Sequence[int],
        *,
        vocab_size: int,
        timeout_s: float,
        drafter: str = "",
        open_timeout_s: float = _OPEN_TIMEOUT_S,
        retry_s: float = _FIRST_RETRY_S,
        records: DrafterRecords | None = None,
        may_pause: bool = True,
        opens_at_once: bool = True,
    ) -> None:
        self._connect = connect
        self._drafter = drafter
        self._prompt = list(prompt_token_ids)
        self._vocab_size = vocab_size
        self._timeout_s = timeout_s
        self._open_timeout_s = open_timeout_s
        self._first_retry_s = retry_s
        self._retry_s = retry_s
        self._records = records or DrafterRecords()
        self._may_pause = may_pause
        self._opens_at_once = opens_at_once
        self._unjudged: tuple[int, frozenset[int], TrackRecord] | None = None
        """Committed length of the last draft's round, the tokens it offered to follow, and the record of who
        drafted it; None: all drafts were judged."""
        self._state: LinkState = Lost(retry_at=0.0)
        self._loss: Fallback | None = None
        """What went wrong last; None again once there is a draft."""
        self._state_session_id = ""
        """The verifier's session whose state the drafter may read."""
        self._was_let_go = False
        """Whether there was a session when the link let go of it."""

    async def __aenter__(self) -> DraftLink:
        if self._opens_at_once and not self._is_paused:
            await self._open(self._prompt, round_waits=True)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._enter(Lost(retry_at=math.inf))

    @property
    def is_open(self) -> bool:
        """Whether a draft would not have to wait until the drafter has opened and read what was before."""
        match self._state:
            case Opening(round_waits=round_waits):
                return round_waits and not self._is_paused
            case FirstDraft(draft=draft):
                return draft.done() and not self._is_paused
            case state:
                return isinstance(state, Ready) and not self._is_paused

    async def join(self, request: DraftRequest) -> None:
        """Open the drafter and let it read what was before, beside the rounds, which go on without it."""
        if isinstance(self._state, Lost):
            if not self._is_paused and time.monotonic() >= self._state.retry_at:
                await self._open(request.committed_token_ids)
        elif isinstance(self._state, Opening) and self._state.session.done():
            try:
                await self._begin_first(self._state, replace(request, size=_READING))
            except SpecdecError as error:
                await self._lose(error)

    async def let_go(self) -> None:
        """End the session, if there is one; `open_again` opens another."""
        if not isinstance(self._state, Lost):
            self._was_let_go = True
            await self._enter(Lost(retry_at=0.0))

    async def open_again(self, committed_token_ids: Sequence[int]) -> None:
        """Open another session in place of one that was let go; the next round waits for it."""
        if self._was_let_go and not self._is_paused:
            await self._open(committed_token_ids, round_waits=True)
        self._was_let_go = False

    async def propose(self, request: DraftRequest) -> Draft:
        """Return a draft, or an empty one that says why."""
        started_ns = time.monotonic_ns()
        try:
            async with asyncio.timeout(self._timeout_s):
                draft = await self._propose(request)
        except TimeoutError:
            # A long beginning is not a failure yet: the rounds go on and the drafter may join later, even if
            # it is ready this moment.
            if not isinstance(self._state, Opening | FirstDraft):
                await self._lose(DeadlineExceededError(f"no draft within {self._timeout_s:g} s"))
        except SpecdecError as error:
            await self._lose(error)
        except Exception as error:  # no defect around a drafter may fail a request
            log_defect(logger, "drafting failed", error)
            await self._lose(InternalError(f"{type(error).__name__}: {error}"))
        else:
            if draft:
                self._retry_s, self._loss = self._first_retry_s, None
                self._remember(draft, len(request.committed_token_ids))
                return draft
        return self._no_draft(time.monotonic_ns() - started_ns)

    def _no_draft(self, waited_ns: int) -> Draft:
        """Return an empty draft; the time spent waiting for it is the drafter's, not the wire's."""
        # How a drafter was lost says more than that the next one is not there yet.
        fallback = self._loss or self._state.why_no_draft
        return Draft(
            server_ns=waited_ns,
            elapsed_ns=waited_ns,
            fallback_reason=fallback.reason,
            fallback_code=fallback.code,
        )

    async def _propose(self, request: DraftRequest) -> Draft | None:
        """Return a draft; None while no drafter can be asked."""
        self._judge(request.committed_token_ids)
        if self._is_paused:
            await self._pause()
            if self._is_paused:
                return None
        await self._follow_verifier(request)
        if isinstance(self._state, Lost) and time.monotonic() >= self._state.retry_at:
            await self._open(request.committed_token_ids)
        match self._state:
            case Opening() as opening if opening.round_waits or opening.session.done():
                draft = await self._draft_first(opening, request)
            case FirstDraft() as first if first.draft.done():
                await first.draft  # its failure is raised; what it drafted is for a round long past
                draft = await self._draft(first.session, first.num_sent, request)
            case Ready() as ready:
                draft = await self._draft(ready.session, ready.num_sent, request)
            case _:
                return None
        return self._checked(draft, request.size)

    @property
    def _is_paused(self) -> bool:
        """Whether the session's replica is not worth asking, or no replica, where there is no session yet."""
        if not self._may_pause:
            return False
        match self._state:
            case FirstDraft(session=session) | Ready(session=session):
                return session.record.is_paused
        return self._records.is_paused

    async def _pause(self) -> None:
        """Let the session go; another one is opened on another replica, or after the pause."""
        match self._state:
            case FirstDraft(session=session) | Ready(session=session):
                verdict = session.record.verdict
            case _:
                verdict = self._records.verdict
        self._loss = Fallback(verdict, NEVER_RIGHT)
        if not isinstance(self._state, Lost):
            await self._enter(Lost(retry_at=0.0))

    def _remember(self, draft: Draft, length: int) -> None:
        tree = draft.tree
        offered = (
            token for token, parent in zip(tree.token_ids, tree.parents, strict=True) if parent == ANCHOR
        )
        assert isinstance(self._state, Ready)
        self._records.used = record = self._state.session.record
        # A drafter without a guess is not wrong.
        self._unjudged = (length, frozenset(offered), record) if tree.token_ids else None

    def _judge(self, committed_token_ids: Sequence[int]) -> None:
        """Compare the last draft with what the target picked in its place."""
        if self._unjudged and len(committed_token_ids) > self._unjudged[0]:
            length, offered, record = self._unjudged
            self._unjudged = None
            record.judge(is_right=committed_token_ids[length] in offered)

    async def _follow_verifier(self, request: DraftRequest) -> None:
        """Leave the session that read a lost verifier's state for one that reads the next verifier's."""
        session_id = request.target_state.session_id if request.target_state else ""
        if session_id == self._state_session_id:
            return
        self._state_session_id = session_id
        self._loss = None
        match self._state:
            case Lost():
                # What failed may have failed for want of the lost one's state.
                await self._open(request.committed_token_ids)
            case FirstDraft(session=session) | Ready(session=session) if session.reads_target_state:
                await self._enter(Lost(retry_at=0.0))
                await self._open(request.committed_token_ids, round_waits=True)

    async def _open(self, committed_token_ids: Sequence[int], *, round_waits: bool = False) -> None:
        connecting = self._connect(list(committed_token_ids))
        session = asyncio.ensure_future(self._in_time(connecting, "session"))
        await self._enter(Opening(session, len(committed_token_ids), round_waits))

    async def _draft_first(self, opening: Opening, request: DraftRequest) -> Draft:
        """Return a session's first draft. It outlives the round that waits for it, as the opening does."""
        await self._enter(replace(opening, round_waits=False))
        first = await self._begin_first(opening, request)
        draft = await asyncio.shield(first.draft)
        await self._enter(Ready(first.session, first.num_sent))
        return replace(draft, is_first=True)

    async def _begin_first(self, opening: Opening, request: DraftRequest) -> FirstDraft:
        session = await asyncio.shield(opening.session)
        committed = request.committed_token_ids
        proposing = session.propose(committed[opening.num_sent :], request)
        drafting = asyncio.ensure_future(self._in_time(proposing, "first draft"))
        first = FirstDraft(session, len(committed), drafting)
        await self._enter(first)
        return first

    async def _draft(self, session: DrafterSession, num_sent: int, request: DraftRequest) -> Draft:
        """Return another draft of a session that was sent `num_sent` committed tokens so far."""
        committed = request.committed_token_ids
        await self._enter(Ready(session, len(committed)))
        return await session.propose(committed[num_sent:], request)

    async def _lose(self, error: SpecdecError) -> None:
        self._loss = Fallback(_readable(error.message), status_code(error).name.lower())
        logger.warning(
            "drafting without a drafter", extra={"drafter": self._drafter, "code": self._loss.code}
        )
        # A drafter knows the prompt, and may repeat it in its message.
        logger.debug("why there is no drafter", extra={"reason": self._loss.reason})
        is_permanent = isinstance(error, _PERMANENT)
        # Where there is no room, the drafter knows best when there will be.
        told_s = error.retry_after_s or 0.0 if isinstance(error, ResourceExhaustedError) else 0.0
        wait_s = max(self._retry_s, min(told_s, _LAST_RETRY_S))
        retry_at = math.inf if is_permanent else time.monotonic() + wait_s
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
        await self._enter(Lost(retry_at))

    async def _enter(self, state: LinkState) -> None:
        """Go over to a state. What is left for `Lost` is closed; else the next state takes it over."""
        left, self._state = self._state, state
        if isinstance(state, Lost):
            await left.close()

    async def _in_time(self, coming: Awaitable[_T], what: str) -> _T:
        try:
            async with asyncio.timeout(self._open_timeout_s):
                return await coming
        except TimeoutError:
            raise UnavailableError(f"no {what} within {self._open_timeout_s:g} s") from None

    def _checked(self, draft: Draft, size: DraftSize) -> Draft:
        """Refuse what the verifier would refuse: a drafter may waste time, never fail a request."""
        tree = DraftTree.of(draft.token_ids, draft.parent_indices)
        limit = size.draft_depth if tree.is_chain else size.draft_nodes
        if len(tree) > limit or tree.depth > size.draft_depth:
            raise InvalidArgumentError(f"the drafter sent more than {limit} tokens")
        if tree.token_ids and max(tree.token_ids) >= self._vocab_size:
            raise InvalidArgumentError("the drafter sent a token the target does not have")
        return replace(draft, parent_indices=tree.parent_indices)


def _readable(reason: str) -> str:
    """Return a short line for logs, clients and their terminals, of what a peer may have made up."""
    return "".join(c if c.isprintable() else " " for c in reason[:_MAX_REASON_LENGTH])
