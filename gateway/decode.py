"""The draft-verify loop. Pure asyncio: services appear as two small interfaces, tokens as ids."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.tracing import RequestTrace

TokenLogprobs = tuple[float, tuple[tuple[int, float], ...]]
"""Log probability of a token, and the best (token id, log probability) pairs."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A drafter's proposal for one round, possibly empty."""

    token_ids: tuple[int, ...] = ()
    server_ns: int = 0
    """Time the drafter itself took, nanoseconds."""
    elapsed_ns: int = 0
    """Time until the draft was here, nanoseconds."""
    fallback_reason: str = ""
    """Why there is no draft although one was wanted; empty: nothing went wrong."""


@dataclass(frozen=True, slots=True)
class Verified:
    """The target's answer: it commits the accepted prefix of the draft, then the bonus token."""

    num_accepted_tokens: int
    bonus_token_id: int
    finish_reason: str = ""
    """Why the generation ended with the bonus token; empty: it did not."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    server_ns: int = 0
    """Time the verifier itself took, nanoseconds."""
    elapsed_ns: int = 0
    """Time until the answer was here, nanoseconds."""
    target_state: StateHandle | None = None
    """Where the drafter finds the target's state as of this answer."""


@dataclass(frozen=True, slots=True)
class Round:
    """One draft and one verify. The prefill is a round with an empty draft."""

    draft: Draft
    verified: Verified
    is_prefill: bool = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What the round commits, all of it the target's picks."""
        accepted = self.draft.token_ids[: self.verified.num_accepted_tokens]
        return (*accepted, self.verified.bonus_token_id)


class StateHandle(Protocol):
    """Target state as the gateway sees it: something one service hands out and the other takes."""

    @property
    def cached_length(self) -> int:
        """Positions that may be read."""


class VerifierSession(Protocol):
    """One generation on one verifier."""

    async def open(self, traceparent: str) -> Verified:
        """Prefill the prompt; the first token is the bonus token."""

    async def verify(
        self, base_committed_length: int, draft_token_ids: Sequence[int], traceparent: str
    ) -> Verified:
        """Check a draft in one pass."""


class DraftSource(Protocol):
    """Where drafts come from. Never raises: without a guess the draft is empty."""

    async def propose(
        self,
        committed_token_ids: Sequence[int],
        num_draft_tokens: int,
        traceparent: str,
        target_state: StateHandle | None = None,
    ) -> Draft:
        """Guess what follows the committed tokens."""


async def decode(
    verifier: VerifierSession,
    drafter: DraftSource,
    *,
    prompt_token_ids: Sequence[int],
    max_new_tokens: int,
    num_draft_tokens: int,
    trace: RequestTrace,
) -> AsyncGenerator[Round]:
    """Generate round by round until the target says it has finished.

    Args:
        num_draft_tokens: K; 0 is plain decoding.

    Raises:
        SpecdecError: the verifier failed. A drafter cannot fail a generation.
    """
    committed = list(prompt_token_ids)
    max_length = len(committed) + max_new_tokens
    with trace.prefill() as span:
        this = Round(Draft(), await verifier.open(span.traceparent), is_prefill=True)
        span.describe(this)
    committed.extend(this.token_ids)
    yield this
    while not this.verified.finish_reason:
        with trace.round() as span:
            # A round commits one token more than it accepts, so the last remaining token needs no draft.
            wanted = min(num_draft_tokens, max_length - len(committed) - 1)
            draft = Draft()
            if wanted > 0:
                state = this.verified.target_state
                draft = await drafter.propose(committed, wanted, span.traceparent, state)
            verified = await verifier.verify(len(committed), draft.token_ids, span.traceparent)
            this = Round(draft, verified)
            span.describe(this)
        committed.extend(this.token_ids)
        yield this
