"""A drafter that may be late, lost or wrong, seen by a loop that must not care."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Protocol, TypeVar

from gateway.rounds.vocabulary import Draft, DraftRequest, DraftSize, StateHandle
from specdec.contract.draft_tree import DraftTree
from specdec.contract.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
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
_OPENING = "opening"
_PERMANENT = (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnimplementedError,
)
"""Errors another try would meet again."""


class DrafterSession(Protocol):
    """One generation on one drafter."""

    @property
    def reads_target_state(self) -> bool:
        """Whether it reads the state of the verifier's session it began with."""

    async def propose(self, new_token_ids: Sequence[int], request: DraftRequest) -> Draft:
        """Guess what follows, after `new_token_ids` were committed since the last call."""

    async def close(self) -> None:
        """End the session."""


Connect = Callable[[Sequence[int]], Awaitable[DrafterSession]]
"""Open a session whose committed tokens are the argument, on a healthy drafter."""


class NoDrafts:
    """The draft source of plain decoding."""

    async def propose(self, request: DraftRequest) -> Draft:
        """No guess."""
        return Draft()


class DraftLink:
    """Keeps a request supplied with a drafter as long as one is healthy.

    Opening runs beside the target's prefill; only the first round waits for it. A first draft, which may
    have much to read, may take until `open_timeout_s`, the rounds after `timeout_s` going on without it. What
    goes wrong - no drafter, an error, another draft later than `timeout_s`, token ids the target does not
    have - costs the round its draft and is tried again, elsewhere perhaps, after a pause of `retry_s`, which
    grows while it fails. Use as `async with`.
    """

    def __init__(
        self,
        connect: Connect,
        prompt_token_ids: Sequence[int],
        *,
        vocab_size: int,
        timeout_s: float,
        open_timeout_s: float = _OPEN_TIMEOUT_S,
        retry_s: float = _FIRST_RETRY_S,
    ) -> None:
        self._connect = connect
        self._prompt = list(prompt_token_ids)
        self._vocab_size = vocab_size
        self._timeout_s = timeout_s
        self._open_timeout_s = open_timeout_s
        self._may_wait_for_opening = True
        self._session: DrafterSession | None = None
        self._opening: asyncio.Task[DrafterSession] | None = None
        self._is_new = False
        self._first_draft: asyncio.Task[Draft] | None = None
        self._num_sent = 0
        self._first_retry_s = retry_s
        self._retry_s = retry_s
        self._retry_at = 0.0
        self._reason = ""
        self._code = ""
        self._state_session_id = ""

    async def __aenter__(self) -> DraftLink:
        self._open(self._prompt)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._opening:
            self._opening.cancel()
            with suppress(asyncio.CancelledError, Exception):
                self._session = await self._opening
        await self._leave()

    async def propose(self, request: DraftRequest) -> Draft:
        """A draft, or an empty one that says why."""
        started_ns = time.monotonic_ns()
        try:
            async with asyncio.timeout(self._timeout_s):
                draft = await self._propose(request)
        except TimeoutError:
            if self._opening or self._first_draft:
                # Not yet a failure: the rounds go on and it may join later, even if it is done this moment.
                self._note_opening()
            else:
                await self._lose(DeadlineExceededError(f"no draft within {self._timeout_s:g} s"))
        except SpecdecError as error:
            await self._lose(error, permanent=isinstance(error, _PERMANENT))
        except Exception as error:  # no defect around a drafter may fail a request
            log_defect(logger, "drafting failed", error)
            await self._lose(InternalError(f"{type(error).__name__}: {error}"))
        else:
            if draft:
                self._retry_s = self._first_retry_s
                self._reason = self._code = ""
                return draft
        # Time spent waiting for a draft is the drafter's, not the wire's.
        waited_ns = time.monotonic_ns() - started_ns
        return Draft(
            server_ns=waited_ns,
            elapsed_ns=waited_ns,
            fallback_reason=self._reason,
            fallback_code=self._code,
        )

    async def _propose(self, request: DraftRequest) -> Draft | None:
        """A draft; None while there is no drafter to ask."""
        await self._follow(request.target_state)
        committed = request.committed_token_ids
        session = await self._ready_session(committed)
        if session is None:
            return None
        if self._first_draft:
            if not self._first_draft.done():
                self._note_opening()
                return None
            await self._first_draft  # for its failure; what it drafted is for a round long past
            self._first_draft = None
        coming = session.propose(committed[self._num_sent :], request)
        self._num_sent = len(committed)
        if self._is_new:
            self._is_new = False
            self._first_draft = asyncio.ensure_future(self._in_time(coming, "first draft"))
            draft = replace(await asyncio.shield(self._first_draft), is_first=True)
            self._first_draft = None
        else:
            draft = await coming
        return self._checked(draft, request.size)

    async def _follow(self, target_state: StateHandle | None) -> None:
        """After a verifier was lost, leave the session that read its state for one that reads the next's."""
        session_id = target_state.session_id if target_state else ""
        if session_id == self._state_session_id:
            return
        self._state_session_id = session_id
        # What failed may have failed for want of the lost one's state.
        self._retry_at, self._reason, self._code = 0.0, "", ""
        if self._session and self._session.reads_target_state:
            self._may_wait_for_opening = True
            await self._leave()

    async def _ready_session(self, committed_token_ids: Sequence[int]) -> DrafterSession | None:
        if self._session is None and self._opening is None:
            if time.monotonic() < self._retry_at:
                return None
            self._open(committed_token_ids)
        if self._opening and (self._opening.done() or self._may_wait_for_opening):
            self._may_wait_for_opening = False
            # A slow opening must outlive the round that waits for it.
            opening = asyncio.shield(self._opening)
            self._session, self._opening = await opening, None
            self._is_new = True
        if self._opening:
            self._note_opening()
        return self._session

    def _note_opening(self) -> None:
        if self._reason and self._code != _OPENING:
            return  # that one was lost before, and how, says more
        still = "its first draft takes longer" if self._first_draft else "the drafter is still opening"
        self._reason, self._code = still, _OPENING

    def _open(self, committed_token_ids: Sequence[int]) -> None:
        self._num_sent = len(committed_token_ids)
        connecting = self._connect(list(committed_token_ids))
        self._opening = asyncio.ensure_future(self._in_time(connecting, "session"))

    async def _in_time(self, coming: Awaitable[_T], what: str) -> _T:
        try:
            async with asyncio.timeout(self._open_timeout_s):
                return await coming
        except TimeoutError:
            raise UnavailableError(f"no {what} within {self._open_timeout_s:g} s") from None

    async def _leave(self) -> None:
        """End the session, if there is one."""
        session, self._session = self._session, None
        reading, self._first_draft = self._first_draft, None
        if reading:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        if session:
            await session.close()

    def _checked(self, draft: Draft, size: DraftSize) -> Draft:
        """Refuse what the verifier would refuse: a drafter may waste time, never fail a request."""
        tree = DraftTree.of(draft.token_ids, draft.parent_indices)
        most = size.draft_depth if tree.is_chain else size.draft_nodes
        if len(tree) > most or tree.depth > size.draft_depth:
            raise InvalidArgumentError(f"the drafter sent more than {most} tokens")
        if tree.token_ids and max(tree.token_ids) >= self._vocab_size:
            raise InvalidArgumentError("the drafter sent a token the target does not have")
        return replace(draft, parent_indices=tree.parent_indices)

    async def _lose(self, error: SpecdecError, *, permanent: bool = False) -> None:
        self._reason, self._code = _readable(error.message), status_code(error).name.lower()
        logger.warning("drafting without a drafter", extra={"code": self._code})
        # A drafter knows the prompt, and its words are its own.
        logger.debug("why there is no drafter", extra={"reason": self._reason})
        self._opening = None
        self._retry_at = float("inf") if permanent else time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
        await self._leave()


def _readable(reason: str) -> str:
    """A short line for logs, clients and their terminals, of what a peer may have made up."""
    return "".join(c if c.isprintable() else " " for c in reason[:_MAX_REASON_LENGTH])
