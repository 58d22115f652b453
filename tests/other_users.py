"""Processes of other users than this one, which only root can start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_OPEN = 'mount --bind "$1" "$2"; mount -t tmpfs -o mode=755 none "$3"; mkdir -p "$1"; mount --bind "$2" "$1"'
"""Mounts a folder $1 that only root reaches anew, where everyone does: $3, which hides it, is put away."""


@dataclass(frozen=True)
class User:
    """A user and its only group."""

    uid: int
    gid: int

    def runs(self, command: Sequence[str], folder: Path) -> tuple[str, ...]:
        """Return the command line by which root runs a command as this user.

        Args:
            folder: everyone may enter it.
        """
        drop = (
            _path("setpriv"),
            f"--reuid={self.uid}",
            f"--regid={self.gid}",
            "--clear-groups",
            "--no-new-privs",
        )
        python = Path(sys.base_prefix)
        hidden = [path for path in (python, *python.parents) if not path.stat().st_mode & 0o001]
        if not hidden:
            return (*drop, *command)
        (target := folder / "python").mkdir(exist_ok=True)
        script = f'set -e; {_OPEN}; shift 3; exec "$@"'
        mounts = ("sh", "-c", script, "sh", str(python), str(target), str(hidden[-1]))
        return (_path("unshare"), "--mount", *mounts, *drop, *command)

    def run(self, command: Sequence[str], folder: Path) -> str:
        """Run a command as this user and return what it prints.

        Raises:
            OSError: it fails.
        """
        line = self.runs(command, folder)
        done = subprocess.run(line, capture_output=True, text=True, check=False, cwd="/")
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
        return done.stdout


def _path(program: str) -> str:
    return shutil.which(program) or program


@contextmanager
def open_folder() -> Iterator[Path]:
    """Make a folder that everyone may enter; skip the test where no other user can run Python."""
    if os.getuid():
        pytest.skip("only root can run processes of other users")
    if not shutil.which("setpriv") or not shutil.which("unshare"):
        pytest.skip("needs the commands setpriv and unshare")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        try:
            User(65534, 65534).run([sys.executable, "-c", "import torch, grpc"], folder)
        except OSError as error:
            pytest.skip(f"other users cannot run Python here: {error}")
        yield folder
    finally:
        shutil.rmtree(folder)
