"""Memory a verifier keeps its KV and hidden states in, so that another process on the host can map it."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from specdec.contract.errors import (
    FailedPreconditionError,
    ResourceExhaustedError,
    UnavailableError,
)
from specdec.contract.target_state import SharedMemory, StateStorage, Storage, boot_id
from specdec.runtime.state_files import SharedDirectory, same_file

logger = logging.getLogger(__name__)

_ADVICE = "Give the directory more memory (Docker: --shm-size), or lower --kv-cache-mib."
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64)
}


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One allocation: uint8 [num_bytes], zeros at first."""

    tensor: Tensor
    storage: Storage | None = None
    """Where another process finds byte 0; None: nowhere."""

    def locate(self, offset: int) -> Storage | None:
        """Return where another process finds a byte of the region."""
        if self.storage is None:
            return None
        return replace(self.storage, offset=offset)


class StateMemory(ABC):
    """Where target state lives."""

    kind: StateStorage
    """How a drafter on this host gets at it."""

    @abstractmethod
    def allocate(self, num_bytes: int) -> Region:
        """Allocate memory on the model's device.

        Raises:
            ResourceExhaustedError: there is not that much.
        """

    def allocate_host(self, num_bytes: int) -> Region:
        """Allocate memory of the host, for what readers check before they touch the device's."""
        return self.allocate(num_bytes)

    def expect(self, num_bytes: int, use: str) -> None:  # noqa: B027 - private memory need not be set aside
        """Warn if there is no room now for what drafters may ask for later; `use` says what that is."""

    def release(self, region: Region) -> None:  # noqa: B027 - private memory goes with its last tensor
        """Take one region out of the reach of new readers."""

    def record(self) -> None:  # noqa: B027 - only devices that run ahead of the host need it
        """Note that everything written so far, on the engine thread, may be read once it is done."""

    def close(self) -> None:  # noqa: B027 - private memory goes with its last tensor
        """Take the memory out of the reach of new readers."""


class PrivateMemory(StateMemory):
    """Memory nobody else can map: state leaves it by stream."""

    kind = StateStorage.STREAM

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate(self, num_bytes: int) -> Region:
        """Return zeros on the device."""
        return Region(torch.zeros(num_bytes, dtype=torch.uint8, device=self._device))

    def allocate_host(self, num_bytes: int) -> Region:
        """Return zeros in the host's memory."""
        return Region(torch.zeros(num_bytes, dtype=torch.uint8))


class SharedHostMemory(StateMemory):
    """Files of a shared directory, mapped by this process and by drafters that may read them.

    Args:
        directory: where.
        strict: raise where there is no room, instead of going on with private memory and a warning.
    """

    kind = StateStorage.SHARED_MEMORY

    def __init__(self, directory: SharedDirectory, *, strict: bool) -> None:
        self._directory = directory
        self._strict = strict
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        self._is_closed = False
        self._boot_id = boot_id()

    def allocate(self, num_bytes: int) -> Region:
        """A new file of that size, its pages reserved: a full directory is an error now, no SIGBUS later."""
        try:
            path = self._create(num_bytes)
        except OSError as error:
            message = f"{self._directory.path} has no room for {num_bytes / 2**20:.0f} MiB ({error.strerror})"
            if self._strict:
                raise ResourceExhaustedError(
                    f"{message}; give it more memory, name another --shared-dir, or do without handles: "
                    "--target-state stream.",
                    reason="SHARED_MEMORY_FULL",
                ) from error
            logger.warning("%s; drafters have to stream this part of the state. %s", message, _ADVICE)
            return PrivateMemory(torch.device("cpu")).allocate(num_bytes)
        return Region(self._mapped(path, num_bytes), SharedMemory(path, 0, self._boot_id))

    def expect(self, num_bytes: int, use: str) -> None:
        """Warn if the directory has not so much room."""
        free = shutil.disk_usage(self._directory.path).free
        if free < num_bytes:
            logger.warning(
                "%s has %.0f MiB left; drafters that map all they read need %s. %s",
                *(self._directory.path, free / 2**20, use, _ADVICE),
            )

    def _mapped(self, path: str, num_bytes: int) -> Tensor:
        try:
            with same_file(path, self._files[path]) as file:
                return torch.from_file(file, shared=True, size=num_bytes, dtype=torch.uint8)
        except (OSError, RuntimeError) as error:
            with self._lock:
                self._remove(path)
            raise ResourceExhaustedError(
                f"{num_bytes / 2**20:.0f} MiB of shared memory cannot be mapped: {error}",
                reason="SHARED_MEMORY_FULL",
            ) from error

    def _create(self, num_bytes: int) -> str:
        with self._lock:
            if self._is_closed:  # a start that was cut short still runs on its thread
                raise UnavailableError("The service is shutting down.")
            descriptor, path = self._directory.create(num_bytes)
            self._files[str(path)] = descriptor
        return str(path)

    def release(self, region: Region) -> None:
        """Unlink one region's file."""
        if isinstance(region.storage, SharedMemory):
            with self._lock:
                self._remove(region.storage.path)

    def close(self) -> None:
        """Unlink the files. The memory itself goes with the last mapping."""
        with self._lock:
            self._is_closed = True
            for path in list(self._files):
                self._remove(path)

    def _remove(self, path: str) -> None:
        if path in self._files:
            Path(path).unlink(missing_ok=True)
            os.close(self._files.pop(path))


def dtype_name(dtype: torch.dtype) -> str:
    """Return the element type as it is sent."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Return the element type of that name.

    Raises:
        FailedPreconditionError: no type that state or weights may have.
    """
    if name not in _DTYPES:
        raise FailedPreconditionError(f"Unknown element type {name!r}.", reason="STATE_NOT_MAPPED")
    return _DTYPES[name]
