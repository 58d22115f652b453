"""The drafter service without its network side: sessions over the loaded drafters and one engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import Drafter, DraftItem, DraftSession, OpenDraft
from specdec.contract.bounds import MAX_NUMBER, bound_passed
from specdec.contract.draft_tree import NO_DRAFT, DraftTree
from specdec.contract.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    SpecdecError,
)
from specdec.contract.load import Load, scarcest
from specdec.contract.retry import retry_after_s
from specdec.contract.sampling import validate_probability, validate_token_ids
from specdec.contract.target_state import TargetStateRef
from specdec.runtime.engine import Engine, EngineResult
from specdec.runtime.model_thread import ModelThread

if TYPE_CHECKING:
    from specdec.state.reader import StateReader


class DrafterHost:
    """Opens draft sessions and runs their rounds. Used from one event loop.

    Args:
        reader: reads target state; None: no drafter needs any.
        on_step: called after each engine step, see Engine.
    """

    def __init__(
        self,
        drafters: Mapping[str, Drafter],
        config: DrafterConfig,
        thread: ModelThread | None = None,
        reader: StateReader | None = None,
        on_step: Callable[[int, int, int], None] = lambda batch_size, batch_tokens, duration_ns: None,
    ) -> None:
        self.drafters = drafters
        self.reader = reader
        self.config = config
        self._sessions: dict[DraftSession, Drafter] = {}
        for drafter in drafters.values():
            if drafter.kv_pool:
                drafter.kv_pool.retry_after_s = partial(self._kv_free_in_s, drafter)
        if reader:
            reader.mirrors.retry_after_s = self._mirrors_free_in_s
        self.engine: Engine[DraftItem, DraftTree] = Engine(
            _step, max_batch_tokens=config.max_batch_tokens, thread=thread, on_step=on_step
        )

    @property
    def num_sessions(self) -> int:
        """Number of open sessions."""
        return len(self._sessions)

    @property
    def num_waiting(self) -> int:
        """Number of items that wait for an engine step."""
        return self.engine.num_waiting

    @property
    def current_load(self) -> Load:
        """How busy the service is, with all its drafters."""
        pools = (drafter.kv_pool for drafter in self.drafters.values() if drafter.kv_pool)
        capacity, free = scarcest((pool.capacity_tokens, pool.free_tokens) for pool in pools)
        return Load(self.num_sessions, self.config.max_sessions, self.num_waiting, capacity, free)

    def close(self) -> None:
        """Stop the engine thread."""
        self.engine.close()

    def drafter(self, name: str) -> Drafter:
        """Return a loaded drafter by its name.

        Raises:
            NotFoundError: no drafter has that name.
        """
        if name not in self.drafters:
            raise NotFoundError(
                f"No drafter {name!r} here; loaded are {', '.join(self.drafters)}.", reason="UNKNOWN_DRAFTER"
            )
        return self.drafters[name]

    @asynccontextmanager
    async def open(self, drafter: Drafter, request: OpenDraft) -> AsyncIterator[DraftSession]:
        """Open a session, which is freed at the end of the block.

        Raises:
            FailedPreconditionError: the text is longer than what the drafter was made for.
            InvalidArgumentError: a value of the request is out of range.
            ResourceExhaustedError: no session slot or memory is free.
        """
        num_committed = len(request.committed_token_ids)
        if not num_committed:
            raise InvalidArgumentError(
                "A draft needs at least one committed token.", field="committed_token_ids"
            )
        for name, low, high in (
            ("max_length", num_committed, MAX_NUMBER),
            ("prompt_length", 1, num_committed),
        ):
            if passed := bound_passed(getattr(request, name), low, high):
                raise InvalidArgumentError(
                    f"{name} is {getattr(request, name)}; it must be {passed}, with {num_committed} "
                    "committed tokens.",
                    field=name,
                )
        token_ids = list(request.committed_token_ids)
        validate_token_ids("committed_token_ids", token_ids, drafter.traits.vocab_size)
        # A drafter may know fewer tokens than the target, and shorter texts.
        _require_context(drafter, num_committed)
        request.sampling.validate()
        request = replace(
            request,
            sampling=request.sampling.within(drafter.traits.vocab_size),
            max_length=min(request.max_length, drafter.traits.max_length or request.max_length),
        )
        validate_probability("min_draft_confidence", request.min_draft_confidence)
        if self.num_sessions >= self.config.max_sessions:
            raise ResourceExhaustedError(
                f"All {self.config.max_sessions} session slots are taken.",
                reason="NO_SESSION_SLOT",
                retry_after_s=retry_after_s(session.progress() for session in self._sessions),
            )
        session = drafter.open(request)
        self._sessions[session] = drafter
        try:
            if self.reader and drafter.traits.target_state_spec:
                session.state = self.reader.open(
                    drafter.traits.target_state_spec, request.max_length, drafter.projection
                )
            yield session
        finally:
            del self._sessions[session]
            self.engine.forget(session)
            try:
                drafter.close(session)
            finally:
                if session.state:
                    await session.state.close()

    def _kv_free_in_s(self, drafter: Drafter, num_missing_tokens: int) -> float:
        """Return when so many more tokens of a drafter's own KV should be free."""
        owners = (session for session, other in self._sessions.items() if other is drafter)
        running = (session.progress(session.num_reserved_tokens) for session in owners)
        return retry_after_s(running, num_missing_tokens)

    def _mirrors_free_in_s(self, num_missing_bytes: int) -> float:
        """Return when so many more bytes for streamed state should be free."""
        states = ((session, session.state) for session in self._sessions)
        running = (session.progress(state.num_reserved_bytes) for session, state in states if state)
        return retry_after_s(running, num_missing_bytes)

    def commit(
        self,
        drafter: Drafter,
        session: DraftSession,
        committed_token_ids: Sequence[int],
        committed_length: int,
    ) -> None:
        """Append what the target committed since the last round.

        Raises:
            FailedPreconditionError: a round was missed, or the text outgrew what the drafter was made for.
            InvalidArgumentError: the drafter lacks the tokens, or has no room for them.
        """
        validate_token_ids("committed_token_ids", list(committed_token_ids), drafter.traits.vocab_size)
        _require_context(drafter, len(session.token_ids) + len(committed_token_ids))
        session.commit(committed_token_ids, committed_length)

    async def read_state(self, drafter: Drafter, session: DraftSession, ref: TargetStateRef | None) -> None:
        """Make the target's state of a round readable, where the drafter reads any.

        Raises:
            FailedPreconditionError: the handle is missing, is another round's, or belongs to no live session.
            UnavailableError: the stream of state broke.
        """
        if session.state is None or self.reader is None:
            return
        if ref is None:
            raise FailedPreconditionError(
                f"{drafter.traits.name} reads the target's state, and the round has no handle on it.",
                reason="NO_TARGET_STATE",
            )
        if ref.cached_length != len(session.token_ids) - 1:
            raise FailedPreconditionError(
                f"The handle is of {ref.cached_length} positions; with {len(session.token_ids)} committed "
                "tokens it must be of one less.",
                reason="STALE_BASE",
            )
        session.view = await session.state.view(ref)
        if drafter.traits.needs_target_weights:
            session.target_weights = await self.reader.weights(ref.verifier_uri)

    async def prefill(self, drafter: Drafter, session: DraftSession, *, num_left: int = 0) -> None:
        """Read the committed tokens chunk by chunk, so that other sessions' drafts go between.

        Args:
            num_left: number of tokens that need not be read.
        """
        while session.num_prefill_tokens > num_left:
            num_tokens = min(session.num_prefill_tokens, self.config.prefill_chunk_tokens)
            await self.engine.submit(DraftItem(drafter, session, 0, num_tokens))

    async def propose(
        self, drafter: Drafter, session: DraftSession, draft_depth: int, draft_nodes: int = 0
    ) -> EngineResult[DraftTree]:
        """Draft up to `draft_depth` tokens in a row after the committed ones.

        Args:
            draft_nodes: most tokens of a tree; 0: a chain is wanted.

        Raises:
            InvalidArgumentError: K or the number of nodes is out of range.
        """
        if not 1 <= draft_depth <= drafter.traits.max_draft_depth:
            raise InvalidArgumentError(
                f"draft_depth is {draft_depth}; {drafter.traits.name} drafts 1 to "
                f"{drafter.traits.max_draft_depth} tokens a round.",
                field="draft_depth",
            )
        if draft_nodes > drafter.traits.max_draft_nodes:
            raise InvalidArgumentError(
                f"draft_nodes is {draft_nodes}; {drafter.traits.name} drafts trees of at most "
                f"{drafter.traits.max_draft_nodes} tokens.",
                field="draft_nodes",
            )
        # The first round brings the target's state of the whole prompt.
        await self.prefill(drafter, session, num_left=self.config.prefill_chunk_tokens)
        num_tokens = session.num_prefill_tokens + 1
        item = DraftItem(drafter, session, draft_depth, num_tokens, draft_nodes)
        drafted = await self.engine.submit(item, session)
        if session.state:
            session.state.check()
            if session.state.is_behind:
                # The text went on meanwhile: nobody waits for this draft, and what it was made of may be
                # another's.
                return replace(drafted, value=NO_DRAFT)
        return drafted


def _require_context(drafter: Drafter, num_committed: int) -> None:
    """Refuse a text after which the drafter has no position left to draft for.

    Raises:
        FailedPreconditionError: it is one.
    """
    limit = drafter.traits.max_length
    if limit and num_committed >= limit:
        raise FailedPreconditionError(
            f"{drafter.traits.name} was made for texts of {limit} tokens, and this one has {num_committed}; "
            "it goes on without this drafter.",
            reason="DRAFTER_CONTEXT_FULL",
        )


def _step(items: Sequence[DraftItem]) -> list[DraftTree | SpecdecError]:
    """Let each drafter propose for all its items at once; a defect of a drafter spares the others' items."""
    drafts: dict[int, DraftTree | SpecdecError] = {}
    order = sorted(range(len(items)), key=lambda index: id(items[index].drafter))
    for _, group in groupby(order, key=lambda index: id(items[index].drafter)):
        indices = list(group)
        proposals = _propose(items[indices[0]].drafter, [items[index] for index in indices])
        drafts.update(zip(indices, proposals, strict=True))
    return [drafts[index] for index in range(len(items))]


def _propose(drafter: Drafter, items: Sequence[DraftItem]) -> Sequence[DraftTree | SpecdecError]:
    try:
        return [DraftTree.of(draft) if isinstance(draft, list) else draft for draft in drafter.propose(items)]
    except Exception as error:  # drafters are plug-ins
        return [drafter.failure(error)] * len(items)
