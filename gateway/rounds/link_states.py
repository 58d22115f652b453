"""The states of a request's link to a drafter.

    Lost        -> Opening      the pause is over, or the target's state can be read anew
    Opening     -> FirstDraft   the session is open
    FirstDraft  -> Ready        the first draft is there, for its round or after it
    any         -> Lost         something went wrong, the drafter is never right, the verifier was lost, or
                                the request ends

A state holds what exists only in that state. `DraftLink` moves from each to the next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from gateway.rounds.records import TrackRecord
from gateway.rounds.vocabulary import Draft, DraftRequest

_NOT_YET = "opening"


class DrafterSession(Protocol):
    """One generation on one drafter."""

    @property
    def reads_target_state(self) -> bool:
        """Whether it reads the state of the verifier's session it began with."""

    @property
    def record(self) -> TrackRecord:
        """How often the replica that it runs on was right, in all sessions."""

    async def propose(self, new_token_ids: Sequence[int], request: DraftRequest) -> Draft:
        """Guess what follows, after `new_token_ids` were committed since the last call."""

    async def close(self) -> None:
        """End the session."""


@dataclass(frozen=True, slots=True)
class Fallback:
    """Why a round has no draft."""

    reason: str
    code: str
    """Kind of reason, see Draft."""


@dataclass(frozen=True, slots=True)
class LinkState:
    """What is common to all states."""

    why_no_draft: ClassVar[Fallback] = Fallback("there is no drafter", "unavailable")
    """What a round without a draft is told in this state, unless something went wrong before."""

    async def close(self) -> None:
        """End what the state holds."""


@dataclass(frozen=True, slots=True)
class Lost(LinkState):
    """There is no session."""

    retry_at: float
    """When another may be opened, by time.monotonic."""


@dataclass(frozen=True, slots=True)
class Opening(LinkState):
    """A session is being opened."""

    session: asyncio.Task[DrafterSession]
    num_sent: int
    """Committed tokens the session begins with."""
    round_waits: bool
    """Whether the next round waits for it; the rounds after that go on without a draft."""

    why_no_draft = Fallback("the drafter is still opening", _NOT_YET)

    async def close(self) -> None:
        """Stop opening, and end a session that opened nevertheless."""
        self.session.cancel()
        (opened,) = await asyncio.gather(self.session, return_exceptions=True)
        if not isinstance(opened, BaseException):
            await opened.close()


@dataclass(frozen=True, slots=True)
class FirstDraft(LinkState):
    """The session reads all that was before, so its first draft may come after the round it was for."""

    session: DrafterSession
    num_sent: int
    """Committed tokens the session was sent."""
    draft: asyncio.Task[Draft]

    why_no_draft = Fallback("its first draft takes longer", _NOT_YET)

    async def close(self) -> None:
        """End the draft and the session."""
        self.draft.cancel()
        await asyncio.gather(self.draft, return_exceptions=True)
        await self.session.close()


@dataclass(frozen=True, slots=True)
class Ready(LinkState):
    """The session drafts for each round while the round waits."""

    session: DrafterSession
    num_sent: int
    """Committed tokens the session was sent."""

    async def close(self) -> None:
        """End the session."""
        await self.session.close()
