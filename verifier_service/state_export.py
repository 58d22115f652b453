"""Target state of sessions, offered to drafters: by handle where it can be mapped, by stream everywhere."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial, reduce
from itertools import combinations

from specdec.contract.errors import (
    InvalidArgumentError,
    NotFoundError,
    ResourceExhaustedError,
    SpecdecError,
)
from specdec.contract.target_state import (
    GENERATIONS,
    ProjectionInfo,
    StateStorage,
    TargetStateRef,
    TargetStateSpec,
    TensorRef,
    storage_kind,
)
from specdec.runtime.capture import HiddenCapture
from specdec.runtime.kv_pool import KvPool
from specdec.runtime.kv_slots import BLOCK_TOKENS, KvAllocation
from specdec.state.view import Projection, num_projection_bytes
from verifier_service.state_offer import StateOffer
from verifier_service.state_stream import ExportedState, RunOnEngine, StateChunk, StateStreams

_MAX_PROJECTIONS = 4
_MAX_PROJECTIONS_BYTES = 2**30
"""Most bytes of all projections that are kept; a single one is never larger."""


class StateExport:
    """What sessions export, by session id; and the projections drafters have handed over.

    Args:
        pool: memory of all sessions.
        capture: what hidden states the model has.
        attention_types: per layer that stores KV.
        uri: where drafters reach this verifier.
        max_hidden_layers: hidden states kept at most, all sessions together.
        run_on_engine: where memory is made and projections are computed.
    """

    def __init__(
        self,
        pool: KvPool,
        capture: HiddenCapture,
        attention_types: dict[int, str],
        *,
        uri: str,
        max_hidden_layers: int,
        run_on_engine: RunOnEngine,
    ) -> None:
        self.uri = uri
        self.max_projection_bytes = _MAX_PROJECTIONS_BYTES
        self._pool = pool
        self._offer = StateOffer(capture, attention_types, max_hidden_layers=max_hidden_layers)
        self._streams = StateStreams(pool, run_on_engine)
        self._run_on_engine = run_on_engine
        self._sessions: dict[str, ExportedState] = {}
        self._projections: OrderedDict[str, Projection] = OrderedDict()
        self._allocating = asyncio.Lock()

    @property
    def storage(self) -> StateStorage:
        """How a drafter on this host gets at state."""
        return storage_kind(self._pool.ref(self._offer.any_kv_name).storage)

    @property
    def num_sessions(self) -> int:
        """Sessions that export state."""
        return len(self._sessions)

    @property
    def num_streams(self) -> int:
        """Streams of all sessions."""
        return self._streams.num_streams

    def hidden_names(self, specs: Sequence[TargetStateSpec]) -> frozenset[str]:
        """Return the names of all hidden states that a session with these specs may keep."""
        possible = (spec for spec in specs if not self._offer.why_not(spec))
        return frozenset(name for spec in possible for name in self._offer.names(spec)[0])

    async def open(
        self, spec: TargetStateSpec, allocation: KvAllocation, max_length: int = 0
    ) -> ExportedState:
        """Export a session's state from now on, until `close`.

        Args:
            max_length: positions that the session can have; 0: as many as it has slots.

        Raises:
            InvalidArgumentError: the target does not have what the spec names.
            ResourceExhaustedError: there is no memory for more hidden states.
        """
        hidden_names, kv_names = self._offer.names(spec)
        async with self._allocating:
            await self._make_room(hidden_names)
            return self._register(
                spec, allocation, hidden_names, [*hidden_names, *kv_names], max_length or allocation.capacity
            )

    async def open_for(
        self, specs: Sequence[TargetStateSpec], allocation: KvAllocation, max_length: int = 0
    ) -> tuple[ExportedState | None, tuple[str, ...]]:
        """Export what as many drafters as possible need, from now on, until `close`.

        Drafters need the state, the generation does not: nothing is raised.

        Args:
            specs: what each drafter needs; of two that do not fit together, the first one gets it.
            max_length: see `open`.

        Returns:
            The state, None if there is none; and for each spec why it is not served, empty if it is.
        """
        refusals = [self._offer.why_not(spec) for spec in specs]
        possible = [index for index, refusal in enumerate(refusals) if not refusal]
        unmet: dict[frozenset[int], str] = {}
        state, served = None, frozenset[int]()
        for chosen in _choices(possible):
            try:
                union = reduce(TargetStateSpec.union, [specs[index] for index in chosen])
                state = await self.open(union, allocation, max_length)
            except SpecdecError as error:
                unmet[frozenset(chosen)] = error.message
            else:
                served = frozenset(chosen)
                break
        for index in served.symmetric_difference(possible):
            refusals[index] = unmet[served | {index}]
        return state, tuple(refusals)

    def _register(
        self,
        spec: TargetStateSpec,
        allocation: KvAllocation,
        hidden_names: list[str],
        names: list[str],
        max_length: int,
    ) -> ExportedState:
        ref = TargetStateRef(
            session_id=secrets.token_hex(16),
            verifier_uri=self.uri,
            generation=allocation.generation,
            tensors=tuple(self._tensor_ref(name) for name in (GENERATIONS, *names)),
            block_ids=allocation.blocks,
            block_tokens=BLOCK_TOKENS,
            num_shared_blocks=allocation.num_shared,
            projection_sha256=spec.projection.sha256 if spec.projection else "",
            max_length=max_length,
        )
        has_window = any(map(self._pool.holds_window, names))
        window_of = self._pool.window_blocks if has_window else _no_window
        state = ExportedState(ref, spec, allocation, frozenset(hidden_names), window_of)
        self._sessions[ref.session_id] = state
        return state

    def close(self, state: ExportedState) -> None:
        """Forget a session's state and end its streams."""
        del self._sessions[state.session_id]
        state.close()

    def find(self, session_id: str) -> ExportedState:
        """Return a session by id.

        Raises:
            NotFoundError: there is none, or no longer.
        """
        if session_id not in self._sessions:
            raise NotFoundError("No session of that id exports state here.", reason="UNKNOWN_SESSION")
        return self._sessions[session_id]

    def put_projection(self, projection: Projection) -> None:
        """Keep a projection; the least recently used one gives way when there are too many."""
        self._projections[projection.info.sha256] = projection.to(self._pool.device)
        self._projections.move_to_end(projection.info.sha256)
        while (
            len(self._projections) > _MAX_PROJECTIONS or self.num_projection_bytes > self.max_projection_bytes
        ):
            self._projections.popitem(last=False)

    @property
    def num_projection_bytes(self) -> int:
        """Bytes of the projections that are kept."""
        return sum(num_projection_bytes(projection.info) for projection in self._projections.values())

    def projection(self, sha256: str) -> Projection:
        """Return a projection that was put.

        Raises:
            NotFoundError: it was not, or was forgotten.
        """
        if sha256 not in self._projections:
            raise NotFoundError(
                "That projection is not here; send it with PutProjection.", reason="UNKNOWN_PROJECTION"
            )
        self._projections.move_to_end(sha256)
        return self._projections[sha256]

    def expect_projection(self, info: ProjectionInfo) -> None:
        """Refuse a projection that no session's spec names: weights are taken from no stranger.

        Raises:
            InvalidArgumentError: it is of no live session.
        """
        if all(state.spec.projection != info for state in self._sessions.values()):
            raise InvalidArgumentError("No session here has that projection in its spec.", field="projection")

    def stream(
        self,
        state: ExportedState,
        start: int,
        projection: Projection | None,
        tensor_names: Collection[str] = (),
    ) -> AsyncGenerator[StateChunk]:
        """Stream a session's state from a position on, until it ends; see StateStreams."""
        return self._streams.follow(state, start, projection, tensor_names)

    async def _make_room(self, hidden_names: list[str]) -> None:
        pool, offer = self._pool, self._offer
        new = [name for name in hidden_names if name not in pool.hidden]
        used = {name for state in self._sessions.values() for name in state.hidden_names}
        idle = [name for name in pool.hidden if name not in used and name not in hidden_names]
        num_excess = len(pool.hidden) + len(new) - offer.max_hidden_layers
        if num_excess > len(idle):
            raise ResourceExhaustedError(
                f"This verifier keeps hidden states of at most {offer.max_hidden_layers} layers, and "
                f"{len(pool.hidden) - len(idle)} are in use; raise --max-hidden-layers.",
                reason="TOO_MANY_HIDDEN_LAYERS",
            )
        # Reserving pages takes milliseconds; the engine thread alone may run torch operations.
        for name in idle[: max(0, num_excess)]:
            pool.full.prefixes.forget_hidden(name)
            await self._run_on_engine(partial(pool.remove_hidden, name))
        for name in new:
            await self._run_on_engine(partial(pool.add_hidden, name, offer.hidden_size))

    def _tensor_ref(self, name: str) -> TensorRef:
        ref = self._pool.ref(name)
        kind = self._offer.attention_type(name)
        return replace(ref, attention_type=kind) if kind else ref


def _no_window(allocation: KvAllocation) -> None:
    """Return that a session's state has no part of which the last positions only are there."""


def _choices(indices: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yield every choice of some of these, at least one: larger ones first, then those of earlier ones."""
    for size in range(len(indices), 0, -1):
        yield from combinations(indices, size)
