"""Memory a verifier keeps its KV and hidden states in, so that another process on the host can map it.

Files in a memory-backed directory: mode 0600 in a directory of mode 0700, with names nobody can guess. The
owner holds a lock on each file for as long as it lives, which the kernel drops however it ends: a file
without its lock belongs to nobody and is swept. A lock, unlike a pid, means the same in every container.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import stat
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from specdec.contract.errors import (
    FailedPreconditionError,
    InvalidArgumentError,
    ResourceExhaustedError,
    UnavailableError,
)
from specdec.contract.target_state import SharedMemory, StateStorage, Storage, boot_id

logger = logging.getLogger(__name__)

_SUFFIX = ".state"
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
    """Files of a shared directory, mapped by this process and by drafters of the same user.

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
            return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
        except RuntimeError as error:
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


class SharedDirectory:
    """The directory of this user's state files below `root`; made if it is not there.

    Raises:
        InvalidArgumentError: it cannot be made, or others may enter it.
    """

    def __init__(self, root: Path) -> None:
        self.path = root.absolute() / f"specdec-{os.getuid()}"
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            status = self.path.lstat()
        except OSError as error:
            raise InvalidArgumentError(
                f"The shared directory {self.path} cannot be made: {error.strerror}. Name a memory-backed "
                "directory that is there with --shared-dir.",
                field="shared_dir",
            ) from error
        is_private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
        if not is_private or status.st_uid != os.getuid():
            raise InvalidArgumentError(
                f"The shared directory {self.path} must be this user's own, mode 0700; remove it, or name "
                "another --shared-dir.",
                field="shared_dir",
            )

    def create(self, num_bytes: int) -> tuple[int, Path]:
        """Create a new locked file; return its descriptor, which holds the lock, and its path.

        Raises:
            OSError: no room, or no such directory.
        """
        # Nameless until it is locked: a sweep never meets a file whose owner has not come that far.
        descriptor = os.open(self.path, os.O_TMPFILE | os.O_RDWR, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.posix_fallocate(descriptor, 0, num_bytes)
            path = self.path / f"{secrets.token_hex(16)}{_SUFFIX}"
            # The directory is ignored beside an absolute path; naming one makes Python follow the link.
            os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor, follow_symlinks=True)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor, path

    def may_hold(self, path: str) -> bool:
        """Return whether a state file may be there, spelled as by its owner: each file is mapped once."""
        return path == str(self.path / Path(path).name) and path.endswith(_SUFFIX)

    def sweep(self) -> int:
        """Remove files whose owner is gone; how many."""
        num_removed = 0
        for path in self.path.glob(f"*{_SUFFIX}"):
            with suppress(OSError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    if is_abandoned(descriptor):
                        path.unlink()
                        num_removed += 1
                finally:
                    os.close(descriptor)
        if num_removed:
            logger.info("removed state files of processes that are gone", extra={"num_files": num_removed})
        return num_removed


def is_abandoned(descriptor: int) -> bool:
    """Return whether nobody holds the lock of a file: its owner is gone."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True


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
