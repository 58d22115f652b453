"""The verifier without its wire: sessions over one target model, one engine and one KV pool."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from specdec.contract.draft_tree import NO_DRAFT, DraftTree
from specdec.contract.errors import InvalidArgumentError, ResourceExhaustedError
from specdec.contract.load import Load
from specdec.contract.retry import retry_after_s
from specdec.contract.sampling import validate_token_ids
from specdec.runtime.engine import Engine, EngineResult
from specdec.runtime.kv_pool import SharedBlocks
from specdec.runtime.kv_slots import BLOCK_TOKENS
from specdec.runtime.loading import LoadedModel, load_causal_lm
from specdec.runtime.memory import StateMemory
from specdec.runtime.model_thread import ModelThread
from specdec.runtime.packed_model import GivingBack, PackedModel
from specdec.runtime.prefix_cache import PrefixKeys
from specdec.runtime.rounding import try_rounding
from specdec.state.weights import TargetWeightsRef, share_weights
from verifier_service.config import VerifierConfig
from verifier_service.formats import Formats
from verifier_service.room import KvRoom
from verifier_service.session import OpenRequest, Session
from verifier_service.state_export import StateExport
from verifier_service.state_memory import expect_drafters
from verifier_service.target_model import (
    PrefillChunk,
    SideWork,
    StepItem,
    TargetModel,
    Verdict,
    VerifyItem,
)

logger = logging.getLogger(__name__)

ValueT = TypeVar("ValueT")
_STATES_GONE = "The hidden states of the text's beginning gave way to others while the session opened."


@dataclass(frozen=True, slots=True)
class Timed:
    """A verdict and where its time went, over all engine steps it took."""

    verdict: Verdict
    queue_ns: int
    compute_ns: int
    batch_size: int
    batch_tokens: int
    batch_background_tokens: int
    accepted_node_indices: tuple[int, ...] = ()
    """The accepted path, in the draft as it was sent."""


class Verifier:
    """Opens sessions and runs their rounds. Used from one event loop.

    Args:
        memory: where target state lives; None: nobody can map it. Whoever made it closes it.
        uri: where drafters reach it.
        on_step: see Engine.
        on_preempted: see KvRoom.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        config: VerifierConfig,
        thread: ModelThread | None = None,
        *,
        memory: StateMemory | None = None,
        uri: str = "",
        on_step: Callable[[int, int, int], None] = lambda batch_size, batch_tokens, duration_ns: None,
        on_preempted: Callable[[], None] = lambda: None,
    ) -> None:
        self.config = config
        self.loaded = loaded
        packed = PackedModel(
            loaded.model,
            kv_budget_bytes=int(config.kv_cache_mib * 2**20),
            memory=memory,
            giving_back=GivingBack(
                max(config.prefill_chunk_tokens, 2 * (config.max_draft_nodes + 1)), config.kv_session_tokens
            ),
        )
        try_rounding(packed)
        self.vocab_size = packed.vocab_size
        self.max_length = packed.max_length
        self.model_impl = packed.model_impl
        self.pool = packed.pool
        self.pool.retry_after_s = self._retry_after_s
        expect_drafters(packed, loaded)
        self.formats = Formats(loaded.folder, packed.vocab_size, loaded.eos_token_ids)
        self.num_sessions = 0
        self.room = KvRoom(packed.pool, self._give_back, on_preempted)
        self._weights: TargetWeightsRef | None = None
        self.engine: Engine[StepItem, Any] = Engine(
            TargetModel(packed).step,
            max_batch_tokens=config.max_batch_tokens,
            max_background_tokens=config.prefill_chunk_tokens,
            thread=thread,
            on_step=on_step,
        )
        self.export = StateExport(
            packed.pool,
            packed.capture,
            packed.attention_types,
            uri=uri,
            max_hidden_layers=config.max_hidden_layers,
            run_on_engine=self._run_on_engine,
        )

    @classmethod
    def load(
        cls,
        config: VerifierConfig,
        thread: ModelThread,
        *,
        memory: StateMemory,
        uri: str,
        on_step: Callable[[int, int, int], None],
        on_preempted: Callable[[], None],
    ) -> Verifier:
        """Load the model and allocate the pool; takes seconds. To be called on `thread`.

        Raises:
            SpecdecError: the model cannot be served as configured.
        """
        return cls(
            load_causal_lm(config.model, dtype=config.dtype, device=config.device, threads=config.threads),
            config,
            thread,
            memory=memory,
            uri=uri,
            on_step=on_step,
            on_preempted=on_preempted,
        )

    @property
    def num_waiting(self) -> int:
        """Items that wait for an engine step."""
        return self.engine.num_waiting

    @property
    def current_load(self) -> Load:
        """How busy the verifier is."""
        return Load(
            num_sessions=self.num_sessions,
            max_sessions=self.config.max_sessions,
            num_waiting=self.num_waiting,
            kv_capacity_tokens=self.pool.capacity_tokens,
            kv_free_tokens=self.pool.free_tokens,
        )

    def close(self) -> None:
        """Stop the engine thread."""
        self.engine.close()

    async def _run_on_engine(self, function: Callable[[], ValueT], num_tokens: int = 0) -> ValueT:
        value: ValueT = (await self.engine.submit(SideWork(function, num_tokens))).value
        return value

    async def weights(self) -> TargetWeightsRef:
        """Return where the model's embedding and LM head are; they are moved there when first asked for.

        Raises:
            ResourceExhaustedError: there is no room.
        """
        if self._weights is None:
            await self._run_on_engine(self._share_weights)
        assert self._weights is not None
        return self._weights

    def _share_weights(self) -> None:
        """On the engine thread, and noted there: the next caller must not repeat it if this one is gone."""
        if self._weights is None:
            self._weights = share_weights(self.loaded.model, self.pool.memory, self.loaded.model_id)

    @asynccontextmanager
    async def open(self, request: OpenRequest) -> AsyncIterator[Session]:
        """Open a session with KV for its first tokens, not yet prefilled; all is freed on leaving the block.

        Raises:
            FailedPreconditionError: the request has an output format, and the model takes none.
            InvalidArgumentError: a value of the request is out of range, its format cannot be followed, or
                its KV would never fit.
            ResourceExhaustedError: no session slot or KV is free.
        """
        max_length = request.validate(self.vocab_size, self.max_length)
        eos = frozenset() if request.ignore_eos else frozenset(self.loaded.eos_token_ids)
        stop_token_ids = request.stop_token_ids | eos
        guide = None
        if request.output_format:  # before any room is taken
            guide = await self.formats.guide(request.output_format, request.output_token_ids, stop_token_ids)
        if self.num_sessions >= self.config.max_sessions:
            raise ResourceExhaustedError(
                f"All {self.config.max_sessions} session slots are taken; try again when one has ended.",
                reason="NO_SESSION_SLOT",
                retry_after_s=retry_after_s(session.progress for session in self.room.sessions),
            )
        prefix_keys = PrefixKeys(BLOCK_TOKENS, *request.owner)
        num_tokens = len(request.committed_token_ids)
        session = Session(
            request,
            stop_token_ids=stop_token_ids,
            allocation=self.room.allocate(num_tokens, max_length, self._find_shared(request, prefix_keys)),
            prefix_keys=prefix_keys,
            max_length=max_length,
            # Room for a tree's nodes only makes the last rounds quicker.
            room=min(
                max_length + min(request.draft_nodes, self.config.max_draft_nodes), self.pool.most_tokens
            ),
            guide=guide,
        )
        self.room.add(session)
        self.num_sessions += 1
        try:
            await self._export(session, request)
            yield session
        finally:
            self.num_sessions -= 1
            self.engine.forget(session)
            self.room.remove(session)

    async def _export(self, session: Session, request: OpenRequest) -> None:
        """Export as much of a session's state as its drafters ask for and there is."""
        num_forgotten = self.pool.full.prefixes.num_forgotten
        state, refusals = await self.export.open_for(
            request.target_state_specs, session.allocation, session.max_length
        )
        is_gone = session.num_reused_tokens and self.pool.full.prefixes.num_forgotten != num_forgotten
        if state and (is_gone or session.is_preempted):
            self.export.close(state)
            state, refusals = None, (_STATES_GONE,) * len(refusals)
        for refusal in filter(None, refusals):
            logger.warning("a drafter gets no state", extra={"reason": refusal})
        session.state, session.state_refusals = state, refusals

    def _give_back(self, session: Session) -> None:
        """Free what a session holds of the pool; its full blocks are kept for others that begin alike."""
        if session.state:
            self.export.close(session.state)
        self._keep(session)
        self.pool.free(session.allocation)

    def _find_shared(self, request: OpenRequest, prefix_keys: PrefixKeys) -> SharedBlocks:
        """Return blocks that hold the beginning of a request's text; its last token needs a pass in any
        case."""
        if self.config.no_prefix_reuse:
            return SharedBlocks()
        hidden_names = self.export.hidden_names(request.target_state_specs)
        keys = prefix_keys.of(request.committed_token_ids[:-1])
        return self.pool.find(keys, hidden_names)

    def _keep(self, session: Session) -> None:
        """Keep the full blocks of a session for others that begin alike."""
        self.pool.keep(self._keys(session), session.allocation, session.hidden_names)

    def _keys(self, session: Session) -> Sequence[bytes]:
        """Return the keys of a session's full blocks; none where nothing is kept for others."""
        if self.config.no_prefix_reuse:
            return ()
        return session.prefix_keys.of(session.token_ids[: session.cached_length])

    def _give_back_unseen(self, session: Session, length: int) -> None:
        """Give back blocks that are of no use to a session with so many cached tokens.

        A text that goes on from the last full block of this one is to find all that its first token sees.
        """
        self.room.give_back_unseen(session, length // BLOCK_TOKENS * BLOCK_TOKENS, self._keys(session))

    def _retry_after_s(self, num_missing_tokens: int) -> float:
        """Return when so many more tokens of KV should be free."""
        return retry_after_s((session.progress for session in self.room.sessions), num_missing_tokens)

    async def prefill(self, session: Session) -> Timed:
        """Run the prompt through the target chunk by chunk and commit the first token.

        Raises:
            AbortedError: the session was preempted.
        """
        prompt_length, size = session.committed_length, self.config.prefill_chunk_tokens
        results: list[EngineResult[Verdict | None]] = []
        for start in range(session.num_reused_tokens, prompt_length, size):
            chunk = PrefillChunk(session, start, min(start + size, prompt_length))
            await self.room.prepare(session, chunk.stop)
            with self.room.in_pass(session):
                results.append(await self.engine.submit(chunk, session))
                session.cached_length = chunk.stop
                self._give_back_unseen(session, chunk.stop)
        timed = self._commit(session, NO_DRAFT, results)
        if not session.is_preempted:
            self._keep(session)
        return timed

    async def verify(
        self,
        session: Session,
        base_committed_length: int,
        draft_token_ids: Sequence[int],
        parent_indices: Sequence[int] = (),
    ) -> Timed:
        """Check a draft in one pass and commit what the target says.

        Args:
            parent_indices: see DraftTree; empty: a chain.

        Raises:
            AbortedError: the session was preempted.
            FailedPreconditionError: stale base or finished session; nothing changes.
            InvalidArgumentError: too many draft tokens, one outside the vocabulary, or no tree.
        """
        session.check_round(base_committed_length)
        if len(draft_token_ids) > self.config.max_draft_nodes:
            raise InvalidArgumentError(
                f"The draft has {len(draft_token_ids)} tokens; this verifier takes at most "
                f"{self.config.max_draft_nodes} a round.",
                field="draft_token_ids",
            )
        validate_token_ids("draft_token_ids", list(draft_token_ids), self.vocab_size)
        sent = DraftTree.of(draft_token_ids, parent_indices)
        # A round commits one token more than it accepts: the rest of the draft could never be used.
        max_depth = session.num_remaining_tokens - 1
        kept = sent.fitting(max_depth=max_depth, draft_nodes=session.most_free_slots)
        await self.room.grow(session, len(kept))
        if len(kept) > session.num_free_slots:
            kept = sent.fitting(max_depth=max_depth, draft_nodes=session.num_free_slots)
        draft = sent.select(kept)
        with self.room.in_pass(session):
            result = await self.engine.submit(VerifyItem(session, draft), session)
            # A drafter may still read what the last answer named: that stays for another round.
            num_named = session.cached_length
            timed = self._commit(session, draft, [result])
            self._give_back_unseen(session, num_named)
        return replace(
            timed, accepted_node_indices=tuple(kept[node] for node in timed.verdict.acceptance.path)
        )

    def _commit(
        self,
        session: Session,
        draft: DraftTree,
        results: Sequence[EngineResult[Verdict | None]],
    ) -> Timed:
        verdict = results[-1].value
        assert verdict is not None, "the last chunk of a prompt and every round have a verdict"
        session.commit(draft, verdict.acceptance)
        return Timed(
            verdict,
            queue_ns=sum(result.queue_ns for result in results),
            compute_ns=sum(result.compute_ns for result in results),
            batch_size=results[-1].batch_size,
            batch_tokens=results[-1].batch_tokens,
            batch_background_tokens=results[-1].batch_background_tokens,
        )
