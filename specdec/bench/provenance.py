"""Collects where figures come from: commit, versions, hardware and command."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

_PACKAGES = ("specdec", "grpcio", "protobuf", "tokenizers", "torch", "transformers", "numpy", "safetensors")
_COMMAND_TIMEOUT_S = 10.0


def collect() -> dict[str, Any]:
    """Return what is known before the run: commit, dirty, versions, hardware, command and started_at (UTC).

    `commit` and `dirty` are null where the package does not run from a git checkout.
    """
    commit, is_dirty = _git_state()
    return {
        "commit": commit,
        "dirty": is_dirty,
        "versions": versions(),
        "hardware": hardware(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return the processor, the cores that this process may use, memory in GiB, and the GPU (null: none)."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]),
    }


def _git_state() -> tuple[str | None, bool | None]:
    git = ["git", "-C", str(Path(__file__).parent)]
    # An installed copy may lie within the checkout of another project.
    if _output([*git, "ls-files", Path(__file__).name]) is None:
        return None, None
    changes = _output([*git, "status", "--porcelain"], allow_empty=True)
    return _output([*git, "rev-parse", "HEAD"]), None if changes is None else bool(changes)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _output(command: list[str], *, allow_empty: bool = False) -> str | None:
    """Return what a command prints, stripped; None if it is missing, fails, or prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_COMMAND_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return None
    text = result.stdout.strip()
    return text if result.returncode == 0 and (text or allow_empty) else None
