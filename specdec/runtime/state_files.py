"""Files of target state in a memory-backed directory: whose they are, and who may open them.

Each user's files are in a directory of its own, with names nobody can guess. Nobody else may read them (modes
0700 and 0600), unless a group may (0750 and 0640); nobody else may ever write. The owner holds a lock on each
file for as long as it lives, which the kernel drops however it ends: a file without its lock belongs to
nobody and is swept. A lock, unlike a pid, means the same in every container.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from specdec.contract.errors import FailedPreconditionError, InvalidArgumentError

logger = logging.getLogger(__name__)

_SUFFIX = ".state"
_FOLDER = re.compile(r"specdec-\d+")
_OTHERS_MAY_WRITE = 0o022


class StateFiles:
    """State files below `root` that this process may read.

    Args:
        root: the memory-backed directory.
        group: id of a group whose members share their files with this process; None: only files of this
            process's user are read.
    """

    def __init__(self, root: Path, group: int | None = None) -> None:
        self.root = root.absolute()
        self._group = group

    @property
    def path(self) -> Path:
        """The directory of this user's files, whether it is there or not."""
        return self.root / f"specdec-{os.getuid()}"

    def open(self, path: str) -> int:
        """Open a state file for reading, and return its descriptor.

        Raises:
            FailedPreconditionError: it is nowhere where state files are, or of somebody who shares none.
            OSError: it cannot be opened.
        """
        folder = Path(path).parent
        if not self._may_hold(path):
            raise FailedPreconditionError(
                f"The state is not in this service's shared directory {self.path}; start both services with "
                "the same --shared-dir, and with the same --shared-group if they are of two users.",
                reason="STATE_NOT_MAPPED",
            )
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # Not blocking: a FIFO would wait for its writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(Path(path).name, flags, dir_fd=directory)
            if not self._is_shared(os.fstat(directory), os.fstat(descriptor)):
                os.close(descriptor)
                raise FailedPreconditionError(
                    "The state file is neither this user's nor shared with its group.",
                    reason="STATE_NOT_MAPPED",
                )
        finally:
            os.close(directory)
        return descriptor

    def _may_hold(self, path: str) -> bool:
        """Return whether a state file may be there, spelled as by its owner: each file is mapped once."""
        folder = self.root / Path(path).parent.name
        is_known = folder == self.path or (self._group is not None and _FOLDER.fullmatch(folder.name))
        return bool(is_known) and path == str(folder / Path(path).name) and path.endswith(_SUFFIX)

    def _is_shared(self, folder: os.stat_result, file: os.stat_result) -> bool:
        """Return whether a file, and the folder it is in, are of one user who lets this process read them."""
        if not stat.S_ISREG(file.st_mode) or file.st_uid != folder.st_uid or not file.st_size:
            return False
        return file.st_uid == os.getuid() or all(
            status.st_gid == self._group and not status.st_mode & _OTHERS_MAY_WRITE
            for status in (folder, file)
        )

    def sweep(self) -> int:
        """Remove this user's files whose owner is gone; how many."""
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


class SharedDirectory(StateFiles):
    """The directory of this user's state files below `root`; made if it is not there.

    Args:
        group: id of the group whose members may read the files; None: nobody but this user may.

    Raises:
        InvalidArgumentError: it cannot be made, or others may enter it.
    """

    def __init__(self, root: Path, group: int | None = None) -> None:
        super().__init__(root, group)
        try:
            self.path.mkdir(mode=0o700, exist_ok=True)
            status = self.path.lstat()
            is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            if group is not None and is_own:
                os.chown(self.path, -1, group)
                self.path.chmod(0o750)
                status = self.path.lstat()
        except OSError as error:
            raise InvalidArgumentError(
                f"The shared directory {self.path} cannot be made: {error.strerror}. Name a memory-backed "
                "directory that is there with --shared-dir, and a group of this user with --shared-group.",
                field="shared_dir",
            ) from error
        self._mode = 0o750 if group is not None else 0o700
        if not is_own or status.st_mode & 0o777 & ~self._mode:
            raise InvalidArgumentError(
                f"The shared directory {self.path} must be this user's own, mode {self._mode:04o}; remove "
                "it, or name another --shared-dir.",
                field="shared_dir",
            )

    def create(self, num_bytes: int) -> tuple[int, Path]:
        """Create a new locked file; return its descriptor, which holds the lock, and its path.

        Raises:
            OSError: no room, or no such directory.
        """
        path = self.path / f"{secrets.token_hex(16)}{_SUFFIX}"
        directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            if os.fstat(directory).st_uid != os.getuid():
                raise PermissionError(errno.EPERM, "it is not this user's any more", str(self.path))
            # Nameless until it is locked: a sweep never meets a file whose owner has not come that far.
            descriptor = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o600, dir_fd=directory)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if self._group is not None:
                    os.fchown(descriptor, -1, self._group)
                    os.fchmod(descriptor, 0o640)
                os.posix_fallocate(descriptor, 0, num_bytes)
                # The source's directory is ignored; naming one makes Python follow the link.
                os.link(
                    f"/proc/self/fd/{descriptor}",
                    path.name,
                    src_dir_fd=descriptor,
                    dst_dir_fd=directory,
                    follow_symlinks=True,
                )
            except BaseException:
                os.close(descriptor)
                raise
        finally:
            os.close(directory)
        return descriptor, path


@contextmanager
def same_file(path: str, descriptor: int) -> Iterator[str]:
    """Open the file at a path again, and yield a path under which this process has that file and no other.

    Where others may write to the root, another file could have the first path by now.

    Raises:
        OSError: it is another file than the descriptor's.
    """
    again = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        if not os.path.sameopenfile(again, descriptor):
            raise PermissionError(errno.EPERM, "another file has its path", path)
        yield f"/proc/self/fd/{again}"
    finally:
        os.close(again)


def is_abandoned(descriptor: int) -> bool:
    """Return whether nobody holds the lock of a file: its owner is gone."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return True
