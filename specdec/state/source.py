"""Where a drafter's view of target state comes from: the verifier's own memory, mapped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy
import torch
from torch import Tensor

from specdec.contract.errors import FailedPreconditionError, InvalidArgumentError
from specdec.contract.target_state import (
    GENERATIONS,
    SLIDING_ATTENTION,
    CudaIpc,
    SharedMemory,
    TargetStateRef,
    TargetStateSpec,
    TensorRef,
    WindowBlocks,
    boot_id,
)
from specdec.runtime.kv_slots import BLOCK_TOKENS, GONE, KvAllocation
from specdec.runtime.state_files import StateFiles
from specdec.state.mapped_file import MappedFile, carve
from specdec.state.view import Projection, TargetStateView


class StateSource(ABC):
    """Where one session's state comes from."""

    row_bytes: int
    """Bytes of one position."""
    num_reserved_bytes = 0
    """Memory that is reserved for it here."""

    @abstractmethod
    async def view(self, ref: TargetStateRef) -> TargetStateView:
        """Return the positions that a handle gives access to, once they are here."""

    @abstractmethod
    def add_blocks(self, num_known: int, block_ids: Sequence[int]) -> None:
        """Take note of blocks that the session took since it was opened.

        Args:
            num_known: how many of the session's blocks come before them.

        Raises:
            FailedPreconditionError: they do not fit those that are known.
        """

    @abstractmethod
    def check(self) -> None:
        """Refuse state that belongs to another session by now.

        Raises:
            FailedPreconditionError: it does.
        """

    @property
    @abstractmethod
    def is_behind(self) -> bool:
        """Whether the session has got on so far that layers with sliding attention have given back some of
        what the last view shows: what was read of it is worth nothing."""

    @abstractmethod
    async def close(self) -> None:
        """Let go of it."""


class Mappings:
    """Memory of verifiers on this host, mapped once and kept while anybody may use it.

    Args:
        device: the drafter's.
        directory: where files may be; None: nowhere.
    """

    def __init__(self, device: torch.device, directory: StateFiles | None) -> None:
        self._device = device
        self._directory = directory
        self._boot_id = boot_id()
        self._files: dict[str, MappedFile] = {}
        self._gpu: dict[bytes, Any] = {}

    def why_not(self, refs: Sequence[TensorRef]) -> str:
        """Return why tensors cannot be mapped here; empty: they may."""
        reasons = (self._why_not(ref) for ref in refs)
        return next((reason for reason in reasons if reason), "")

    def _why_not(self, ref: TensorRef) -> str:
        match ref.storage:
            case SharedMemory() as shared:
                if not self._boot_id or shared.boot_id != self._boot_id:
                    return "the verifier is on another host"
                if ref.name != GENERATIONS and self._device.type != "cpu":
                    return "the state is in the host's memory, the drafter on a GPU"
                return "" if self._directory else "this drafter has no shared directory"
            case CudaIpc():
                return "" if self._device.type == "cuda" else "the state is on a GPU, the drafter is not"
            case None:
                return "the verifier offers no handle"

    def tensor(self, ref: TensorRef) -> Tensor:
        """Return a tensor in another process's memory.

        Raises:
            FailedPreconditionError: it cannot be mapped.
        """
        match ref.storage:
            case SharedMemory(path, offset, _) if self._directory:
                if path not in self._files:
                    self._files[path] = MappedFile(self._directory, path)
                return self._files[path].tensor(ref, offset)
            case CudaIpc() as storage:
                return carve(self._on_gpu(storage).bytes, ref, storage.offset)
        raise FailedPreconditionError(self._why_not(ref), reason="STATE_NOT_MAPPED")

    def _on_gpu(self, storage: CudaIpc) -> Any:
        from specdec.runtime.cuda_ipc import CudaMapping

        if storage.memory_handle not in self._gpu:
            self._gpu[storage.memory_handle] = CudaMapping(storage, self._device)
        return self._gpu[storage.memory_handle]

    def wait(self, refs: Sequence[TensorRef]) -> None:
        """Order the GPU's next work after the verifier's; nothing where the state is the host's."""
        storages = {
            ref.storage.memory_handle: ref.storage for ref in refs if isinstance(ref.storage, CudaIpc)
        }
        for storage in storages.values():
            self._on_gpu(storage).wait()

    def sweep(self) -> bool:
        """Unmap the files of verifiers that are gone and remove what they left; whether there were any."""
        gone = [path for path, file in self._files.items() if file.is_abandoned]
        for path in gone:
            self._files.pop(path).close()
        if gone:
            # Tensors in use keep their memory; what is still wanted of others is mapped again.
            self._gpu.clear()
            if self._directory:
                self._directory.sweep()
        return bool(gone)

    def close(self) -> None:
        """Let go of everything; the memory goes with the last tensor."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._gpu.clear()


class MappedState(StateSource):
    """State in the verifier's own memory."""

    def __init__(
        self,
        mappings: Mappings,
        ref: TargetStateRef,
        spec: TargetStateSpec,
        projection: Projection | None,
    ) -> None:
        tensors = {tensor.name: mappings.tensor(tensor) for tensor in ref.tensors}
        generations = tensors.pop(GENERATIONS, torch.empty(0))
        if not tensors or not _is_table(generations):
            raise FailedPreconditionError(
                "The handle has no generations, or nothing else.", reason="STATE_NOT_MAPPED"
            )
        # numpy: looking at a few numbers is several times as quick.
        self._generations = generations.numpy()
        in_window = {
            each.name for each in ref.tensors if ref.window and each.attention_type == SLIDING_ATTENTION
        }
        sizes = {name: len(tensor) // BLOCK_TOKENS for name, tensor in tensors.items()}
        num_generations = len(self._generations)
        others = [size for name, size in sizes.items() if name not in in_window]
        self._num_pool_blocks = min([num_generations, *others])
        self._num_window_blocks = min([num_generations, *(sizes[name] for name in in_window)])
        self._window: KvAllocation | None = None
        self._window_entries = numpy.empty(0, numpy.int64)
        self._window_generations = b""
        self._device = next(iter(tensors.values())).device
        self._generation = ref.generation
        self._num_shared = ref.num_shared_blocks
        self._take(ref.block_ids)
        if ref.window and ref.cached_length <= self._allocation.length:
            self._follow_window(ref.window, ref.cached_length)
        self._is_on_gpu = any(isinstance(tensor.storage, CudaIpc) for tensor in ref.tensors)
        self._mappings = mappings
        self._tensors, self._refs = tensors, ref.tensors
        self.row_bytes = sum(tensor[0].nbytes for tensor in tensors.values())
        self._spec, self._projection = spec, projection

    def _take(self, block_ids: Sequence[int]) -> None:
        """Take over all of the session's blocks.

        Raises:
            FailedPreconditionError: the pool does not have them, or none is the session's own.
        """
        if max(block_ids) >= self._num_pool_blocks:
            raise FailedPreconditionError(
                "The handle names blocks the pool lacks.", reason="STATE_NOT_MAPPED"
            )
        self._allocation = KvAllocation.of(block_ids, self._device, generation=self._generation)
        # What is shared with other sessions stays as long as what is the session's own.
        own = block_ids[self._num_shared :]
        if not own:
            raise FailedPreconditionError(
                "The handle names no block of the session's own.", reason="STATE_NOT_MAPPED"
            )
        # A round's first steps run on cold caches: what can be prepared is, and a look compares plain bytes.
        is_run = self._allocation.slot_ids is None
        self._blocks = slice(own[0], own[-1] + 1) if is_run else numpy.asarray(own)
        expected = numpy.full(len(own), self._generation, numpy.uint64)  # as the wire has it
        self._own_generations = expected.tobytes()

    def add_blocks(self, num_known: int, block_ids: Sequence[int]) -> None:
        """Read the blocks that follow from now on as well; they carry the session's generation too."""
        known = self._allocation.blocks
        if num_known != len(known):
            raise FailedPreconditionError(
                f"The handle goes on after {num_known} blocks of the session; {len(known)} are known here.",
                reason="INCOMPLETE_HANDLE",
            )
        self._take((*known, *block_ids))

    def _follow_window(self, window: WindowBlocks, length: int) -> int:
        """Take note of where the last positions are, and return the first of them.

        Raises:
            FailedPreconditionError: the pool does not have them there.
        """
        first, blocks = window.first(length), window.block_ids
        num_blocks = window.num_gone_blocks + len(blocks)
        has_all = window.num_gone_blocks * BLOCK_TOKENS <= first and length <= num_blocks * BLOCK_TOKENS
        has_all = has_all and num_blocks <= len(self._allocation.blocks)
        num_entries = window.first_generation + max(blocks, default=0)
        is_here = max(blocks, default=0) < self._num_window_blocks and num_entries < len(self._generations)
        if not (blocks and has_all and is_here and len(window.generations) == len(blocks)):
            raise FailedPreconditionError(
                "The handle names blocks of a window that the pool lacks.", reason="STATE_NOT_MAPPED"
            )
        seen = slice(first // BLOCK_TOKENS - window.num_gone_blocks, None)
        self._window_entries = window.first_generation + numpy.array(blocks[seen], numpy.int64)
        self._window_generations = numpy.array(window.generations[seen], numpy.uint64).tobytes()
        self._window = KvAllocation.of(
            (*[GONE] * window.num_gone_blocks, *blocks), self._device, num_gone=window.num_gone_blocks
        )
        return first

    async def view(self, ref: TargetStateRef) -> TargetStateView:
        """Return a view of the state where it lies: nothing moves."""
        length, first = ref.cached_length, 0
        if length > self._allocation.capacity:
            raise InvalidArgumentError("The handle's length is past its blocks.", field="target_state")
        if ref.window:
            first = self._follow_window(ref.window, length)
        if self._is_on_gpu:
            self._mappings.wait(self._refs)
        return TargetStateView(
            self._spec,
            self._tensors,
            self._refs,
            replace(self._allocation, sliding=self._window),
            length,
            self._projection,
            first,
        )

    def check(self) -> None:
        """Check that the pool's blocks still belong to the handle's generation."""
        if self._generations[self._blocks].tobytes() != self._own_generations:
            raise FailedPreconditionError(
                "The session this state belonged to has ended.", reason="STALE_STATE"
            )

    @property
    def is_behind(self) -> bool:
        """Whether some blocks hold something else by now."""
        return self._generations[self._window_entries].tobytes() != self._window_generations

    async def close(self) -> None:
        """Keep the mapping for other sessions."""


def _is_table(generations: Tensor) -> bool:
    """Return whether a tensor can be a pool's generations."""
    return generations.dtype is torch.int64 and generations.ndim == 1 and generations.device.type == "cpu"
