"""A copy of a session's target state in the drafter's own memory, fed by a stream."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from typing import Any

import grpc
import numpy
import torch
from torch import Tensor

from specdec.contract.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    SpecdecError,
    UnavailableError,
    UnimplementedError,
    from_rpc_error,
    log_defect,
)
from specdec.contract.request_id import request_metadata
from specdec.contract.retry import SOONEST_S
from specdec.contract.target_state import (
    PROJECTED,
    SLIDING_ATTENTION,
    TargetStateRef,
    TargetStateSpec,
    TensorRef,
)
from specdec.runtime.kv_slots import BLOCK_TOKENS, KvAllocation, num_blocks_of
from specdec.runtime.memory import dtype_of
from specdec.state.source import StateSource
from specdec.state.verifier_peers import from_verifier, silent_verifier
from specdec.state.view import Projection, TargetStateView
from specdec.transport.channel import MAX_MESSAGE_BYTES
from specdec.v1 import target_state_pb2 as pb

logger = logging.getLogger(__name__)

_PROJECTION_CHUNK_BYTES = MAX_MESSAGE_BYTES // 4
_UNKNOWN_PROJECTION = "UNKNOWN_PROJECTION"


class MirrorBudget:
    """Memory of all mirrors of a service together, bytes."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.num_used = 0
        self.retry_after_s: Callable[[int], float] = lambda num_missing_bytes: SOONEST_S
        """Says after how many seconds so many more bytes should be free; set by whoever has the sessions."""

    def take(self, num_bytes: int) -> None:
        """Reserve.

        Raises:
            ResourceExhaustedError: there is not so much left.
        """
        num_missing = self.num_used + num_bytes - self.num_bytes
        if num_missing > 0:
            raise ResourceExhaustedError(
                f"A mirror of this session's state takes {num_bytes / 2**20:.1f} MiB, "
                f"{self.num_used / 2**20:.1f} of {self.num_bytes / 2**20:.1f} are in use; raise "
                "--mirror-mib, or share a host with the verifier.",
                reason="MIRROR_FULL",
                retry_after_s=self.retry_after_s(num_missing),
            )
        self.num_used += num_bytes

    def give_back(self, num_bytes: int) -> None:
        """Release what was reserved."""
        self.num_used -= num_bytes


class MirroredState(StateSource):
    """A copy of the state in the drafter's own memory, fed by a stream.

    Args:
        stub: the verifier's methods.
        max_length: positions the session can reach.
        timeout_s: how long a round waits for its positions, and how long an upload may take, seconds.
        projection: the spec's, if it has one.
        is_projected: have the verifier apply it, and mirror the result in place of the hidden states.

    Raises:
        ResourceExhaustedError: no memory for it.
    """

    def __init__(
        self,
        stub: Any,
        budget: MirrorBudget,
        ref: TargetStateRef,
        spec: TargetStateSpec,
        max_length: int,
        *,
        device: torch.device,
        timeout_s: float,
        projection: Projection | None,
        is_projected: bool,
    ) -> None:
        self._stub = stub
        self._budget = budget
        self._ref = ref
        self._spec = spec
        self._timeout_s = timeout_s
        self._projection = projection
        self._sent_projection = projection if is_projected else None
        self._read_names = spec.read_of(ref.tensors)
        refs = _mirrored(ref.tensors, spec, self._read_names, self._sent_projection)
        self.row_bytes = sum(math.prod(tensor.shape[1:]) * dtype_of(tensor.dtype).itemsize for tensor in refs)
        # The verifier has checked what the session may need; a gateway's max_length may be anything.
        most = ref.max_length or len(ref.block_ids) * BLOCK_TOKENS
        num_blocks = num_blocks_of(min(max_length, most))
        self.num_reserved_bytes = self.row_bytes * num_blocks * BLOCK_TOKENS
        budget.take(self.num_reserved_bytes)
        try:
            self._allocation = KvAllocation.of(range(num_blocks), device)
            self._tensors = {tensor.name: _empty(tensor, num_blocks, device) for tensor in refs}
            self._known_names = {tensor.name for tensor in (*ref.tensors, *refs)}
        except (RuntimeError, MemoryError) as error:
            budget.give_back(self.num_reserved_bytes)
            raise ResourceExhaustedError(
                f"There is no memory for a mirror of this session's state: {error}", reason="MIRROR_FULL"
            ) from error
        self.length = 0
        self._window_names = {
            each.name for each in ref.tensors if ref.window and each.attention_type == SLIDING_ATTENTION
        }
        self._first_in_window = self._first_in_view = 0
        """From which position on all are here of layers with sliding attention, and what the last view shows
        first."""
        self._error: SpecdecError | None = None
        self._changed = asyncio.Event()
        self._task = asyncio.ensure_future(self._follow())

    async def view(self, ref: TargetStateRef) -> TargetStateView:
        """Wait for the stream and return the view."""
        cached_length = ref.cached_length
        try:
            async with asyncio.timeout(self._timeout_s):
                while self.length < cached_length and self._error is None:
                    await self._changed.wait()
        except TimeoutError:
            raise silent_verifier(self._timeout_s) from None
        if self._error:
            raise self._error
        self._first_in_view = ref.window.first(cached_length) if ref.window else 0
        return TargetStateView(
            self._spec,
            self._tensors,
            self._ref.tensors,
            self._allocation,
            cached_length,
            self._projection,
            self._first_in_view,
        )

    def add_blocks(self, num_known: int, block_ids: Sequence[int]) -> None:
        """Ignore them: the mirror has blocks of its own."""

    def check(self) -> None:
        """Check that the session has not ended; a mirror belongs to nobody else."""
        if isinstance(self._error, FailedPreconditionError):
            raise self._error

    @property
    def is_behind(self) -> bool:
        """Whether the stream came too late for some positions."""
        return self._first_in_view < self._first_in_window

    async def close(self) -> None:
        """End the stream and free the mirror."""
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        self._tensors = {}
        self._budget.give_back(self.num_reserved_bytes)

    async def _follow(self) -> None:
        try:
            async with aclosing(self._chunks()) as chunks:
                async for chunk in chunks:
                    self._store(chunk)
            self._error = FailedPreconditionError(
                "The session this state belonged to has ended.", reason="STALE_STATE"
            )
        except grpc.RpcError as error:
            self._error = _stream_error(from_verifier(error))
        except SpecdecError as error:
            self._error = error
        except Exception as error:  # the drafter must learn of any failure, or it would wait for ever
            log_defect(logger, "mirroring failed", error)
            self._error = UnavailableError(f"Mirroring failed: {type(error).__name__}: {error}")
        self._notify()

    async def _chunks(self) -> AsyncGenerator[pb.StreamTargetStateResponse]:
        projection = self._sent_projection
        request = pb.StreamTargetStateRequest(
            session_id=self._ref.session_id,
            projection_sha256=projection.info.sha256 if projection else "",
            tensor_names=self._read_names,
        )
        try:
            async for chunk in self._stub.StreamTargetState(request, metadata=request_metadata()):
                yield chunk
            return
        except grpc.aio.AioRpcError as error:
            if projection is None or from_rpc_error(error).reason != _UNKNOWN_PROJECTION:
                raise
        await self._stub.PutProjection(
            _projection_messages(projection), metadata=request_metadata(), timeout=self._timeout_s
        )
        async for chunk in self._stub.StreamTargetState(request, metadata=request_metadata()):
            yield chunk

    def _store(self, chunk: pb.StreamTargetStateResponse) -> None:
        """Copy a chunk into the mirror.

        Raises:
            UnavailableError: it does not fit what was announced.
        """
        start, stop = chunk.start_position, chunk.start_position + chunk.num_positions
        rows = {tensor.name: tensor for tensor in chunk.tensors}
        # An older verifier also sends what only other drafters of the session read.
        is_whole = self._tensors.keys() <= rows.keys() <= self._known_names
        if start != self.length or stop > self._allocation.capacity or not is_whole:
            raise UnavailableError("The verifier sent state that was not asked for.", reason="BAD_STATE")
        for name, tensor in self._tensors.items():
            first, data = start + rows[name].num_gone_positions, rows[name].data
            target = tensor[first:stop]
            is_allowed = first == start or (name in self._window_names and first <= stop)
            if len(data) != target.nbytes or not is_allowed:
                raise UnavailableError(f"The verifier sent {name} of another size.", reason="BAD_STATE")
            if first > start:
                self._first_in_window = max(self._first_in_window, first)
            _write(target, data)
        self.length = stop
        self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _stream_error(error: SpecdecError) -> SpecdecError:
    """Return what a drafter is told of the error that ended its stream: another try may help or not."""
    if error.reason == "UNKNOWN_SESSION":
        return FailedPreconditionError("The session this state belonged to has ended.", reason="STALE_STATE")
    if isinstance(error, UnimplementedError | InvalidArgumentError):
        return FailedPreconditionError(
            f"The target state cannot be streamed: {error.message}", reason="STATE_NOT_STREAMED"
        )
    return UnavailableError(f"The stream of target state broke: {error.message}")


def _mirrored(
    refs: Sequence[TensorRef], spec: TargetStateSpec, names: Sequence[str], projection: Projection | None
) -> list[TensorRef]:
    """Return the tensors that a stream carries to a drafter that reads these."""
    kept = [ref for ref in refs if ref.name in names]
    if projection is None:
        return kept
    kept = [ref for ref in kept if ref.name not in spec.hidden_names]
    return [*kept, TensorRef(PROJECTED, projection.info.dtype, (0, projection.info.output_size))]


def _empty(ref: TensorRef, num_blocks: int, device: torch.device) -> Tensor:
    """Make memory for a tensor's rows of one session."""
    shape = (num_blocks * BLOCK_TOKENS, *ref.shape[1:])
    return torch.empty(shape, dtype=dtype_of(ref.dtype), device=device)


def _write(target: Tensor, data: bytes) -> None:
    """Fill a contiguous tensor with its bytes. On the CPU by way of numpy: the event loop's thread must not
    run torch operations, which would give it OpenMP workers of its own."""
    if target.device.type == "cpu":
        target.view(torch.uint8).numpy().reshape(-1)[:] = numpy.frombuffer(data, numpy.uint8)
    else:
        source = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        target.view(torch.uint8).view(-1).copy_(source)


def _projection_messages(projection: Projection) -> Iterator[pb.PutProjectionRequest]:
    yield pb.PutProjectionRequest(projection=projection.info.to_proto())
    data = memoryview(projection.to_bytes())
    for start in range(0, len(data), _PROJECTION_CHUNK_BYTES):
        yield pb.PutProjectionRequest(data=bytes(data[start : start + _PROJECTION_CHUNK_BYTES]))
