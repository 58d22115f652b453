"""Target state of sessions, offered to drafters: by handle where it can be mapped, by stream everywhere."""

from __future__ import annotations

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

from specdec.contract.errors import InvalidArgumentError, NotFoundError, ResourceExhaustedError
from specdec.contract.target_state import (
    GENERATIONS,
    LAST_HIDDEN,
    PROJECTED,
    ProjectionInfo,
    StateStorage,
    TargetStateRef,
    TargetStateSpec,
    TensorRef,
    key_name,
    storage_kind,
    value_name,
)
from specdec.runtime.capture import HiddenCapture
from specdec.runtime.kv_pool import BLOCK_TOKENS, KvAllocation, KvPool
from specdec.state.view import (
    Projection,
    TargetStateView,
    num_projection_bytes,
    tensor_bytes,
)

ValueT = TypeVar("ValueT")

_CHUNK_BYTES = 512 * 1024
_MAX_PROJECTED_POSITIONS = 64
"""Positions projected at a time; a prompt's worth would hold up every round."""
_MAX_STREAMS_PER_SESSION = 4
_MAX_PROJECTIONS = 4
_PROJECTION_DTYPES = ("bfloat16", "float16", "float32")
_MAX_PROJECTION_GROWTH = 4
"""Most a projection's output may be, in hidden sizes."""
_MAX_PROJECTION_BYTES = 2**30
"""Most a projection's weights may be: several times those of the largest known drafter."""


class RunOnEngine(Protocol):
    """Calls a function on the engine thread, after the pass under way."""

    def __call__(self, function: Callable[[], ValueT], num_tokens: int = 0) -> Awaitable[ValueT]:
        """What the function returns; it costs about as much as `num_tokens` of prefill."""


@dataclass(frozen=True, slots=True)
class StateChunk:
    """Positions `start` to `stop` of every tensor, as bytes by name."""

    start: int
    stop: int
    rows: dict[str, bytes]


class ExportedState:
    """One session's state while the session lives.

    Args:
        ref: the handle, tensors included.
        hidden_names: what passes of the session capture.
    """

    def __init__(
        self,
        ref: TargetStateRef,
        spec: TargetStateSpec,
        allocation: KvAllocation,
        hidden_names: frozenset[str],
    ) -> None:
        self.spec = spec
        self.allocation = allocation
        self.hidden_names = hidden_names
        self.num_streams = 0
        self.is_closed = False
        self.cached_length = 0
        self._ref = ref
        self._changed = asyncio.Event()

    @property
    def session_id(self) -> str:
        """Names the session to whoever was given its handle."""
        return self._ref.session_id

    @property
    def tensors(self) -> tuple[TensorRef, ...]:
        """The session's tensors."""
        return self._ref.tensors

    def ref(self, *, with_tensors: bool) -> TargetStateRef:
        """The handle as of now."""
        if with_tensors:
            return replace(self._ref, cached_length=self.cached_length)
        return self._ref.at(self.cached_length)

    def advance(self, cached_length: int) -> None:
        """Publish positions below `cached_length`; they never change again."""
        assert self.cached_length <= cached_length, "published state never shrinks"
        self.cached_length = cached_length
        self._notify()

    def close(self) -> None:
        """End the session's streams."""
        self.is_closed = True
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait_beyond(self, position: int) -> bool:
        """Wait for more than `position` positions; False: the session has ended."""
        while not self.is_closed and self.cached_length <= position:
            await self._changed.wait()
        return not self.is_closed


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
        self.num_streams = 0
        self._pool = pool
        self._capture = capture
        self._attention_types = attention_types
        self._max_hidden_layers = max_hidden_layers
        self._run_on_engine = run_on_engine
        self._sessions: dict[str, ExportedState] = {}
        self._projections: OrderedDict[str, Projection] = OrderedDict()
        self._allocating = asyncio.Lock()

    @property
    def storage(self) -> StateStorage:
        """How a drafter on this host gets at state."""
        return storage_kind(self._pool.ref(key_name(next(iter(self._attention_types)))).storage)

    @property
    def num_sessions(self) -> int:
        """Sessions that export state."""
        return len(self._sessions)

    async def open(self, spec: TargetStateSpec, allocation: KvAllocation) -> ExportedState:
        """Export a session's state from now on, until `close`.

        Raises:
            InvalidArgumentError: the target does not have what the spec names.
            ResourceExhaustedError: there is no memory for more hidden states.
        """
        hidden_names = self._hidden_names(spec)
        names = [*hidden_names, *self._kv_names(spec)]
        if not names:
            raise InvalidArgumentError("The spec names nothing.", field="target_state_spec")
        self._check_projection(spec)
        async with self._allocating:
            await self._make_room(hidden_names)
            return self._register(spec, allocation, hidden_names, names)

    def _register(
        self, spec: TargetStateSpec, allocation: KvAllocation, hidden_names: list[str], names: list[str]
    ) -> ExportedState:
        ref = TargetStateRef(
            session_id=secrets.token_hex(16),
            verifier_uri=self.uri,
            generation=allocation.generation,
            tensors=tuple(self._tensor_ref(name) for name in (GENERATIONS, *names)),
            block_ids=allocation.blocks,
            block_tokens=BLOCK_TOKENS,
        )
        state = ExportedState(ref, spec, allocation, frozenset(hidden_names))
        self._sessions[ref.session_id] = state
        return state

    def close(self, state: ExportedState) -> None:
        """Forget a session's state and end its streams."""
        del self._sessions[state.session_id]
        state.close()

    def find(self, session_id: str) -> ExportedState:
        """A session by id.

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
        while len(self._projections) > _MAX_PROJECTIONS:
            self._projections.popitem(last=False)

    def projection(self, sha256: str) -> Projection:
        """A projection that was put.

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

    @contextmanager
    def _counting(self, state: ExportedState) -> Iterator[None]:
        if state.num_streams >= _MAX_STREAMS_PER_SESSION:
            raise ResourceExhaustedError(
                f"The session's state is streamed {_MAX_STREAMS_PER_SESSION} times already.",
                reason="TOO_MANY_STREAMS",
                retry_after_s=1.0,
            )
        state.num_streams += 1
        self.num_streams += 1
        try:
            yield
        finally:
            state.num_streams -= 1
            self.num_streams -= 1

    async def stream(
        self, state: ExportedState, start: int, projection: Projection | None
    ) -> AsyncGenerator[StateChunk]:
        """Positions from `start` on as they become final, until the session ends.

        Raises:
            InvalidArgumentError: a projection of other hidden states than the session's.
            ResourceExhaustedError: too many streams of this session.
        """
        names = [ref.name for ref in state.tensors if ref.name != GENERATIONS]
        if projection:
            if projection.info != state.spec.projection:
                raise InvalidArgumentError(
                    "The projection is not the one of the session's spec.", field="projection_sha256"
                )
            names = [name for name in names if name not in state.spec.hidden_names]
        row_bytes = sum(self._pool.tensor(name)[0].nbytes for name in names)
        if projection:
            row_bytes += projection.info.output_size * projection.norm.itemsize
        num_positions = max(1, _CHUNK_BYTES // row_bytes)
        if projection:
            num_positions = min(num_positions, _MAX_PROJECTED_POSITIONS)
        with self._counting(state):
            while await state.wait_beyond(start):
                stop = min(start + num_positions, state.cached_length)
                rows = {}
                if projection:
                    rows[PROJECTED] = await self._project(state, projection, start, stop)
                    if state.is_closed:  # what was read may be another session's by now
                        return
                for name in names:
                    rows[name] = self._rows(name, state.allocation, start, stop)
                yield StateChunk(start, stop, rows)
                start = stop

    def _rows(self, name: str, allocation: KvAllocation, start: int, stop: int) -> bytes:
        tensor = self._pool.tensor(name)
        return b"".join(tensor_bytes(tensor[run]) for run in allocation.runs(start, stop))

    async def _project(self, state: ExportedState, projection: Projection, start: int, stop: int) -> bytes:
        tensors = {name: self._pool.tensor(name) for name in state.hidden_names}
        view = TargetStateView(state.spec, tensors, (), state.allocation, stop, projection)
        projected = await self._run_on_engine(lambda: view.projected(start, stop), stop - start)
        return tensor_bytes(projected)

    def _hidden_names(self, spec: TargetStateSpec) -> list[str]:
        if len(spec.hidden_layer_ids) > self._max_hidden_layers:
            raise InvalidArgumentError(
                f"The spec lists hidden states of {len(spec.hidden_layer_ids)} layers; this verifier keeps "
                f"at most {self._max_hidden_layers}; raise --max-hidden-layers.",
                field="target_state_spec",
            )
        names = list(spec.hidden_names)
        if spec.last_hidden_state:
            names.append(LAST_HIDDEN)
        for name in names:
            self._capture.check(name)
        return names

    def _kv_names(self, spec: TargetStateSpec) -> list[str]:
        if len(spec.kv_layer_ids) > len(self._attention_types):
            raise InvalidArgumentError(
                f"The spec lists KV of {len(spec.kv_layer_ids)} layers; the target has that of "
                f"{len(self._attention_types)}.",
                field="target_state_spec",
            )
        layer_ids = set(spec.kv_layer_ids)
        for layer_id in spec.kv_layer_ids:
            if layer_id not in self._attention_types:
                raise InvalidArgumentError(
                    f"Layer {layer_id} of the target stores no KV of its own; those that do are "
                    f"{', '.join(map(str, self._attention_types))}.",
                    field="target_state_spec",
                )
        if spec.kv_last_of_each_attention_type:
            layer_ids |= set({kind: layer for layer, kind in sorted(self._attention_types.items())}.values())
        return [name for layer in sorted(layer_ids) for name in (key_name(layer), value_name(layer))]

    def _check_projection(self, spec: TargetStateSpec) -> None:
        info, hidden_size = spec.projection, self._capture.hidden_size
        if info is None:
            return
        num_values = len(spec.hidden_layer_ids) * hidden_size
        if info.input_size != num_values:
            raise InvalidArgumentError(
                f"The projection takes {info.input_size} values, the spec's hidden states are {num_values}.",
                field="target_state_spec",
            )
        is_small = 0 < info.output_size <= _MAX_PROJECTION_GROWTH * hidden_size
        if not is_small or info.dtype not in _PROJECTION_DTYPES:
            raise InvalidArgumentError(
                f"A {info.dtype} projection to {info.output_size} values does not fit this target: at most "
                f"{_MAX_PROJECTION_GROWTH} times its hidden size of {hidden_size}, "
                f"{' or '.join(_PROJECTION_DTYPES)}.",
                field="target_state_spec",
            )
        if num_projection_bytes(info) > _MAX_PROJECTION_BYTES:
            raise InvalidArgumentError(
                f"The projection's weights are {num_projection_bytes(info) / 2**20:.0f} MiB; at most "
                f"{_MAX_PROJECTION_BYTES // 2**20} MiB are taken.",
                field="target_state_spec",
            )

    async def _make_room(self, hidden_names: list[str]) -> None:
        pool, hidden_size = self._pool, self._capture.hidden_size
        new = [name for name in hidden_names if name not in pool.hidden]
        used = {name for state in self._sessions.values() for name in state.hidden_names}
        idle = [name for name in pool.hidden if name not in used and name not in hidden_names]
        num_excess = len(pool.hidden) + len(new) - self._max_hidden_layers
        if num_excess > len(idle):
            raise ResourceExhaustedError(
                f"This verifier keeps hidden states of at most {self._max_hidden_layers} layers, and "
                f"{len(pool.hidden) - len(idle)} are in use; raise --max-hidden-layers.",
                reason="TOO_MANY_HIDDEN_LAYERS",
            )
        # Reserving pages takes milliseconds; the engine thread alone may run torch operations.
        for name in idle[: max(0, num_excess)]:
            await self._run_on_engine(partial(pool.remove_hidden, name))
        for name in new:
            await self._run_on_engine(partial(pool.add_hidden, name, hidden_size))

    def _tensor_ref(self, name: str) -> TensorRef:
        ref = self._pool.ref(name)
        if not name.startswith("kv."):
            return ref
        kind = self._attention_types[int(name.split(".")[1])]
        return TensorRef(ref.name, ref.dtype, ref.shape, ref.storage, kind)
