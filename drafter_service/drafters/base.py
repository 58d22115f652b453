"""The interface of all drafters, and what their sessions have in common."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

from specdec.contract.draft_tree import DraftTree
from specdec.contract.errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    SpecdecError,
    log_defect,
)
from specdec.contract.retry import Progress
from specdec.contract.sampling import SamplingParams
from specdec.contract.target_state import TargetStateSpec

if TYPE_CHECKING:
    # For types only: drafters that need no target state run without torch.
    from specdec.runtime.kv_pool import KvPool
    from specdec.runtime.kv_slots import KvAllocation
    from specdec.state.reader import StateSession
    from specdec.state.view import Projection, TargetStateView
    from specdec.state.weights import TargetWeights

logger = logging.getLogger(__name__)

RoundT = TypeVar("RoundT")


Drafted = list[int] | DraftTree
"""A draft: a chain's tokens, or a tree."""


@dataclass(frozen=True, slots=True)
class DrafterTraits:
    """What peers are told of a drafter; see specdec.v1.DrafterInfo."""

    name: str
    family: str
    max_draft_depth: int
    default_draft_depth: int
    model_id: str = ""
    vocabulary_fingerprint: str = ""
    vocab_size: int = 0
    max_length: int = 0
    dtype: str = ""
    device: str = ""
    target_state_spec: TargetStateSpec | None = None
    """What the drafter reads of the target; None: nothing."""
    needs_target_weights: bool = False
    """Whether the drafter uses the target's embedding and LM head."""
    max_draft_nodes: int = 0
    """Most tokens of a draft tree; 0: the drafter makes chains only."""
    revision: str = ""
    """Revision of the weights, see `specdec.models.files.revision`."""
    model_impl: str = ""
    """Whose code computes a pass, see specdec.v1.ModelInfo; empty: there are no decoder layers."""


@dataclass(frozen=True, slots=True)
class OpenDraft:
    """The request that opens a draft session; see specdec.v1.DraftOpen."""

    committed_token_ids: tuple[int, ...]
    prompt_length: int
    max_length: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    min_draft_confidence: float = 0.0
    """Probability, 0 to 1, of a token below which a draft ends, if the drafter knows probabilities."""
    caller_key: str = ""
    """Tells callers apart, see specdec.v1.DraftOpen."""
    cache_salt: str = ""
    """Tells what may be remembered together apart, see specdec.v1.DraftOpen."""
    vocabulary_fingerprint: str = ""
    """Checksum of the target's vocabulary; empty: it is not known."""


@dataclass(slots=True)
class Confidence:
    """How likely it is that a chain is accepted as far as it goes, and when it ends."""

    least_token: float
    """Least probability of a token; 0: any."""
    least_path: float
    """Least probability of all its tokens; 0: any."""
    path: float = 1.0
    """Probability of all its tokens so far."""

    @property
    def matters(self) -> bool:
        """Whether any probability is asked for."""
        return self.least_token > 0 or self.least_path > 0

    def takes(self, probability: float) -> bool:
        """Count a further token in; return whether it is likely enough."""
        self.path *= probability
        return probability >= self.least_token and self.path >= self.least_path


class DraftSession:
    """One generation as a drafter sees it: the committed tokens. Families add what else they keep."""

    def __init__(self, request: OpenDraft) -> None:
        self.token_ids = list(request.committed_token_ids)
        self.prompt_length = request.prompt_length
        self.max_length = request.max_length
        self.sampling = request.sampling
        self.min_draft_confidence = request.min_draft_confidence
        self.min_path_confidence = 0.0
        """Least probability of a path in this round; 0: any."""
        self.state: StateSession | None = None
        """Source of the target's state; None: the drafter reads none."""
        self.view: TargetStateView | None = None
        """The target's state in this round, of the positions below committed_length - 1."""
        self.target_weights: TargetWeights | None = None
        """The target's embedding and LM head, set from the first round on where the drafter needs them."""
        self._opened_at = time.monotonic()
        self._num_given = len(self.token_ids)

    def confidence(self) -> Confidence:
        """Return what decides where a chain of this round ends."""
        return Confidence(self.min_draft_confidence, self.min_path_confidence)

    @property
    def num_reserved_tokens(self) -> int:
        """Tokens of the drafter's own KV that are reserved for the session."""
        return 0

    def progress(self, room: int = 1) -> Progress:
        """Return how far the generation has come, of which so much is free once it has ended."""
        num_done, num_left = len(self.token_ids) - self._num_given, self.max_length - len(self.token_ids)
        return Progress(self._opened_at, num_done, num_left, room)

    @property
    def num_prefill_tokens(self) -> int:
        """Number of committed tokens that passes must read before a draft can be quick."""
        return 0

    def commit(self, committed_token_ids: Sequence[int], committed_length: int) -> None:
        """Append what the target committed since the last round.

        Raises:
            FailedPreconditionError: a round was missed; nothing changes.
            InvalidArgumentError: the session has no room for the tokens; nothing changes.
        """
        expected = len(self.token_ids) + len(committed_token_ids)
        if committed_length != expected:
            raise FailedPreconditionError(
                f"committed_length is {committed_length}, with this round's tokens it is {expected}.",
                reason="STALE_BASE",
            )
        if expected > self.max_length:
            raise InvalidArgumentError(
                f"With this round's tokens {expected} are committed; the session was opened with max_length "
                f"{self.max_length}.",
                field="committed_token_ids",
            )
        self.token_ids.extend(committed_token_ids)


class CachedSession(DraftSession):
    """A session whose drafter keeps keys and values of the positions of the target's state."""

    def __init__(self, request: OpenDraft, allocation: KvAllocation) -> None:
        super().__init__(request)
        self.allocation = allocation
        self.num_cached = 0

    @property
    def num_reserved_tokens(self) -> int:
        """Tokens of the drafter's own KV that are reserved for the session."""
        return self.allocation.capacity

    @property
    def num_prefill_tokens(self) -> int:
        """Positions of the target's state, as far as it is known, without keys and values."""
        return self.view.length - self.num_cached if self.view else 0


@dataclass(frozen=True, slots=True)
class DraftItem:
    """One session's work in an engine step: draft up to K tokens, or (K = 0) read committed ones."""

    drafter: Drafter
    session: DraftSession
    draft_depth: int
    num_tokens: int
    """Number of tokens that the item adds to the first pass of the step."""
    draft_nodes: int = 0
    """Most tokens of a draft tree of depth K; 0: a chain is wanted."""

    @property
    def wants_tree(self) -> bool:
        """Whether a tree is wanted: more tokens than a chain has."""
        return self.draft_nodes > self.draft_depth

    @property
    def is_urgent(self) -> bool:
        """Whether the item goes before others: drafts go before prefill chunks."""
        return self.draft_depth > 0


class Drafter(ABC):
    """Proposes tokens for many sessions.

    `open` and `close` run on the event loop, `propose` on the engine thread.
    """

    traits: DrafterTraits
    projection: Projection | None = None
    """The projection in the drafter's target state spec."""
    kv_pool: KvPool | None = None
    """Pool of the drafter's own KV; None: it has none."""

    def open(self, request: OpenDraft) -> DraftSession:
        """Start a session and reserve its memory.

        Raises:
            SpecdecError: the drafter has no room, or cannot follow the generation.
        """
        return DraftSession(request)

    def close(self, session: DraftSession) -> None:  # noqa: B027 - most drafters reserve nothing
        """Free what `open` reserved."""

    @abstractmethod
    def propose(self, items: Sequence[DraftItem]) -> Sequence[Drafted | SpecdecError]:
        """Guess at most `draft_depth` tokens in a row for each item. An empty draft: there is no guess.

        The likelier tokens of a tree come first, as far as parents come before their children.

        Returns:
            A draft or an error for each item; an error concerns that item alone.
        """

    def failure(self, error: Exception) -> SpecdecError:
        """Return the error for the sessions whose draft raised `error`; a defect is logged."""
        if isinstance(error, SpecdecError):
            return error
        log_defect(logger, "drafter failed", error, drafter=self.traits.name)
        return InternalError(f"{self.traits.name} failed: {type(error).__name__}: {error}")

    def refuse_misfit(self, session: DraftSession, misfit: Callable[[], str]) -> None:
        """Refuse a session of a target that the drafter cannot follow.

        Args:
            misfit: says what of the target has another size than the drafter reads; empty: everything fits.

        Raises:
            FailedPreconditionError: there is no state yet, or it does not fit.
        """
        assert session.view is not None
        if not session.view.length:
            raise FailedPreconditionError(
                f"{self.traits.name} drafts from the target's state of at least one position.",
                reason="NO_TARGET_STATE",
            )
        if what := misfit():
            raise FailedPreconditionError(
                f"{self.traits.name} was made for another target: {what}.", reason="DRAFTER_MISFIT"
            )

    def propose_by_target(
        self,
        items: Sequence[DraftItem],
        start: Callable[[DraftItem], RoundT | None],
        draft: Callable[[Sequence[RoundT]], Sequence[Drafted]],
    ) -> list[Drafted | SpecdecError]:
        """Draft for the sessions of one target after another.

        What `start` raises is the error of that session, what `draft` raises that of all the target's
        sessions.

        Args:
            start: returns a session's part of the drafts; None: there is nothing to draft.
            draft: drafts for the sessions of one target, side by side.
        """
        drafts: list[Drafted | SpecdecError] = [[] for _ in items]
        started: list[tuple[int, RoundT]] = []
        for index, item in enumerate(items):
            try:
                part = start(item)
            except Exception as error:  # whatever it is, it concerns this session alone
                drafts[index] = self.failure(error)
            else:
                started += [] if part is None else [(index, part)]

        def target(entry: tuple[int, RoundT]) -> int:
            return id(items[entry[0]].session.target_weights)

        for _, group in groupby(sorted(started, key=target), key=target):
            indices, rounds = zip(*group, strict=True)
            found: Sequence[Drafted | SpecdecError]
            try:
                found = draft(rounds)
            except Exception as error:  # whatever it is, it concerns these sessions alone
                found = [self.failure(error)] * len(indices)
            for index, outcome in zip(indices, found, strict=True):
                drafts[index] = outcome
        return drafts
