"""A shared directory with little room."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


class SmallMemory:
    """A memory-backed directory of a size."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def mount(self, num_kib: int) -> None:
        """Mount it, or skip the test where that is forbidden."""
        self.path.mkdir()
        command = ("mount", "-t", "tmpfs", "-o", f"size={num_kib}k", "tmpfs", str(self.path))
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a small tmpfs cannot be mounted here: {error}")

    def unmount(self) -> None:
        if self.path.is_mount():
            # Lazily: mappings last until they are collected.
            subprocess.run(("umount", "-l", str(self.path)), check=True)
