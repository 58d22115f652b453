"""The words of the draft-verify loop: sizes, drafts, verdicts, rounds, and the two services as interfaces."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from gateway.rounds.records import NEVER_RIGHT
from specdec.contract.draft_tree import DraftTree

TokenLogprobs = tuple[float, tuple[tuple[int, float], ...]]
"""Log probability of a token, and the best (token id, log probability) pairs."""


@dataclass(frozen=True, slots=True)
class DraftSize:
    """How much a round drafts."""

    draft_depth: int
    """K: most tokens in a row; 0: nothing is drafted."""
    draft_nodes: int = 0
    """Most tokens of a draft tree; 0: each drafter drafts a chain."""
    min_path_confidence: float = field(default=0.0, compare=False)
    """Probability below which a token is not worth what it costs; 0: none is left out. It follows the costs
    from round to round, and is not part of what sizes are told apart by."""
    method: str = ""
    """The method that drafts, where the request leaves it open; empty: all drafters of the request do."""
    joining: str = field(default="", compare=False)
    """A method whose drafters are opened beside the round, as a later round may want them; empty: none."""
    is_experiment: bool = field(default=False, compare=False)
    """Whether it was chosen to learn from it."""


PLAIN_SIZE = DraftSize(0)
"""The size of a round without a draft: plain decoding."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What drafters propose for one round, possibly nothing."""

    token_ids: tuple[int, ...] = ()
    server_ns: int = 0
    """Time the drafter itself took, nanoseconds."""
    elapsed_ns: int = 0
    """Time until the draft was here, nanoseconds."""
    compute_ns: int = 0
    """The draft's share of the drafter's computing, nanoseconds: a step is shared by all its drafts."""
    fallback_reason: str = ""
    """Why there is no draft although one was wanted; empty: nothing went wrong."""
    fallback_code: str = "unavailable"
    """Kind of reason, one of a few: "opening", "busy", NEVER_RIGHT, or a status code's name in lower case; it
    has a meaning only with a reason."""
    parent_indices: tuple[int, ...] = ()
    """The parents of a draft tree's tokens, see DraftTree; empty: a chain."""
    proposals: tuple[Proposal, ...] = ()
    """Who proposed what, if several were asked."""
    is_first: bool = False
    """Whether it is its session's first draft, which reads all that was before: its time is not the usual."""

    @property
    def is_complete(self) -> bool:
        """Whether someone was asked, and everyone who was answered in time."""
        if not self.proposals:
            return not self.fallback_reason
        asked = [proposal for proposal in self.proposals if proposal.fallback_code != NEVER_RIGHT]
        return bool(asked) and not any(proposal.fallback_reason for proposal in asked)

    @property
    def tree(self) -> DraftTree:
        """The tokens as the tree, or chain, they are."""
        return DraftTree(self.token_ids, self.parent_indices)


@dataclass(frozen=True, slots=True)
class Proposal:
    """One drafter's part in a round that several drafted for."""

    drafter: str
    nodes: frozenset[int] = frozenset()
    """Which of the draft's tokens it proposed."""
    fallback_reason: str = ""
    """Why the drafter was left out of the round; empty: it was not."""
    fallback_code: str = "unavailable"
    """Kind of reason, see Draft."""


@dataclass(frozen=True, slots=True)
class Verified:
    """The target's answer: it commits the accepted path of the draft, then the bonus token."""

    num_accepted_tokens: int
    bonus_token_id: int
    finish_reason: str = ""
    """Why the generation ended with the bonus token; empty: it goes on."""
    logprobs: tuple[TokenLogprobs, ...] = ()
    server_ns: int = 0
    """Time the verifier itself took, nanoseconds."""
    elapsed_ns: int = 0
    """Time until the answer was here, nanoseconds."""
    compute_ns: int = 0
    """Time of the target's pass, shared by all its items, nanoseconds."""
    batch_size: int = 1
    """Items of that pass."""
    batch_tokens: int = 1
    """Tokens of all items of that pass."""
    batch_background_tokens: int = 0
    """How many of these are of prompts."""
    target_state: StateHandle | None = None
    """Where the drafter finds the target's state as of this answer."""
    accepted_node_indices: tuple[int, ...] = ()
    """The accepted path in the draft; empty: its first num_accepted_tokens tokens."""
    num_reused_tokens: int = 0
    """Tokens of the prompt that needed no pass, in the answer to an open."""
    is_reopened: bool = False
    """Whether a session was opened anew in place of the round: its draft was not looked at."""

    @property
    def path(self) -> Sequence[int]:
        """Which of the draft's tokens are accepted, in order."""
        return self.accepted_node_indices or range(self.num_accepted_tokens)


@dataclass(frozen=True, slots=True)
class Round:
    """One draft and one verify. The prefill is a round with an empty draft."""

    draft: Draft
    verified: Verified
    is_prefill: bool = False
    ended_ns: int = field(default_factory=time.monotonic_ns, compare=False)
    """When the target's answer was here, by time.monotonic_ns."""

    @property
    def elapsed_ns(self) -> int:
        """Time that was waited for the draft and the target's answer, nanoseconds."""
        return self.draft.elapsed_ns + self.verified.elapsed_ns

    @property
    def transport_ns(self) -> int:
        """Time on the wire and in gRPC, nanoseconds: what was waited for less what the services took."""
        return max(0, self.elapsed_ns - self.draft.server_ns - self.verified.server_ns)

    @property
    def phases_ns(self) -> dict[str, int]:
        """Time of each phase, nanoseconds; "draft" is left out where nobody was asked to draft."""
        phases = {"verify": self.verified.server_ns, "transport": self.transport_ns}
        return {"draft": self.draft.server_ns, **phases} if self.draft.elapsed_ns else phases

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens that the round commits, all of them picks of the target."""
        accepted = (self.draft.token_ids[node] for node in self.verified.path)
        return (*accepted, self.verified.bonus_token_id)

    def ended_after(self, num_tokens: int) -> Round:
        """Return the round as one that commits only its first tokens, at least one: the text ends there.

        The last of them counts as the bonus token, as a stop token does, and those after it as not accepted.
        """
        if num_tokens > self.verified.num_accepted_tokens:
            return self
        verified = replace(
            self.verified,
            num_accepted_tokens=num_tokens - 1,
            bonus_token_id=self.token_ids[num_tokens - 1],
            logprobs=self.verified.logprobs[:num_tokens],
            accepted_node_indices=self.verified.accepted_node_indices[: num_tokens - 1],
        )
        return replace(self, verified=verified)


class StateHandle(Protocol):
    """Target state as the gateway sees it: something one service hands out and the other takes."""

    @property
    def session_id(self) -> str:
        """Id of the verifier's session whose state it is; it changes after a verifier was lost."""

    @property
    def cached_length(self) -> int:
        """Positions that may be read."""


@dataclass(frozen=True, slots=True)
class DraftRequest:
    """What one round asks a drafter for."""

    committed_token_ids: Sequence[int]
    """Prompt and output so far."""
    size: DraftSize
    traceparent: str = ""
    """Context of the round's span; empty: the round is not traced."""
    target_state: StateHandle | None = None
    """The target's state as of the last committed token but one; None: it is not exported."""


class VerifierSession(Protocol):
    """One generation on one verifier."""

    async def open(self, traceparent: str) -> Verified:
        """Prefill the prompt; the first token is the bonus token."""

    async def verify(
        self,
        base_committed_length: int,
        draft_token_ids: Sequence[int],
        traceparent: str,
        parent_indices: Sequence[int] = (),
    ) -> Verified:
        """Check a draft, chain or tree, in one pass."""


class DraftSource(Protocol):
    """Where drafts come from. Never raises: without a guess the draft is empty."""

    async def propose(self, request: DraftRequest) -> Draft:
        """Guess what follows the committed tokens, no more than was asked for."""


class RequestDrafts(DraftSource, Protocol):
    """The drafts of one request, which holds no drafter while it waits in the middle of its answer."""

    async def let_go(self) -> None:
        """End all sessions on drafters, between two rounds."""

    async def open_again(self, committed_token_ids: Sequence[int]) -> None:
        """Open the sessions that were let go, beside the target's prefill; the next round waits for them."""


class SizeControl(Protocol):
    """Decides what a generation drafts."""

    @property
    def first_method(self) -> str:
        """The method whose drafters are opened at the start; empty: all drafters of the request are."""

    def follow(self, is_open: Callable[[str], bool]) -> None:
        """Learn from now on by `is_open` whether all drafters of a method are open."""

    def choose(self, limit: int) -> DraftSize:
        """Return the size of the next round's draft, K no more than `limit`."""

    def observe(self, size: DraftSize, completed: Round) -> None:
        """Learn from a round whose draft had that size."""

    def goes_on_at(self, verifier: object) -> None:
        """Learn from now on, and choose, for that replica: the generation goes on there."""

    def close(self) -> None:
        """End with the generation."""
