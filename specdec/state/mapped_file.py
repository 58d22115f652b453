"""State files of another process: mapped for reading only, and tensors in what is mapped."""

from __future__ import annotations

import math
import mmap
import os
import warnings

import torch
from torch import Tensor

from specdec.contract.errors import FailedPreconditionError
from specdec.contract.target_state import TensorRef
from specdec.runtime.memory import dtype_of
from specdec.runtime.state_files import StateFiles, is_abandoned


class MappedFile:
    """A state file of another process, mapped for reading only: no reader can change what the target sees.

    Raises:
        FailedPreconditionError: this process may not read it, or its owner is gone.
    """

    def __init__(self, files: StateFiles, path: str) -> None:
        try:
            self._descriptor = files.open(path)
            try:
                self._map(self._descriptor)
            except BaseException:
                os.close(self._descriptor)
                raise
        except (OSError, ValueError) as error:
            raise FailedPreconditionError(
                f"The state file cannot be mapped: {error}.", reason="STATE_NOT_MAPPED"
            ) from error

    def _map(self, descriptor: int) -> None:
        if is_abandoned(descriptor):
            raise FailedPreconditionError("The state's verifier is gone.", reason="STALE_STATE")
        mapping = mmap.mmap(descriptor, os.fstat(descriptor).st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        with warnings.catch_warnings():
            # torch has no read-only tensors and says so; nothing here writes.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)

    @property
    def is_abandoned(self) -> bool:
        """Whether the owner is gone."""
        return is_abandoned(self._descriptor)

    def tensor(self, ref: TensorRef, offset: int) -> Tensor:
        """Return a tensor of the file.

        Raises:
            FailedPreconditionError: it would end after the file.
        """
        return carve(self._bytes, ref, offset)

    def close(self) -> None:
        """Give the descriptor back; the memory goes with the last tensor."""
        os.close(self._descriptor)
        del self._bytes


def carve(memory: Tensor, ref: TensorRef, offset: int) -> Tensor:
    """Return the tensor a ref describes, in uint8 [num_bytes] memory from byte `offset` on.

    Raises:
        FailedPreconditionError: it is of no known type, is empty, or would end after the memory.
    """
    dtype = dtype_of(ref.dtype)
    if not ref.shape or not all(ref.shape):
        raise FailedPreconditionError(f"{ref.name} is said to have no rows.", reason="STATE_NOT_MAPPED")
    num_bytes = math.prod(ref.shape) * dtype.itemsize
    if offset % dtype.itemsize or offset + num_bytes > len(memory):
        raise FailedPreconditionError(
            f"{ref.name} would lie outside the memory it is said to be in.", reason="STATE_NOT_MAPPED"
        )
    return memory[offset : offset + num_bytes].view(dtype).view(ref.shape)
