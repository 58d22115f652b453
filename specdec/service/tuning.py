"""Set a process up before it loads a model or serves: threads, memory, the interpreter. Loads no torch."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

_SPIN_COUNT = "10000"
"""How long an idle OpenMP thread spins. The default steals cores from the other model process on the host;
no spin at all nearly doubles a pass."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
"""Options of glibc's mallopt."""
_LARGE_BYTES = 2**20

_SWITCH_INTERVAL_S = 0.0005
"""How long the engine thread may hold the GIL while the event loop wants it."""


def tune_process() -> None:
    """Prepare this process for running a model; must come before the first import of torch."""
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def keep_freed_memory() -> None:
    """Have malloc keep what large tensors give back, where it is glibc's.

    Pages that go back to the system are cleared and mapped anew for the next tensor, which costs a step of
    training on a CPU a third of its time.
    """
    _mallopt(_M_MMAP_MAX, 0)
    _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Have malloc give large buffers back at once, where it is glibc's.

    By itself it keeps buffers as large as the largest it was given back, scattered over the heaps of all
    threads: messages of megabytes then leave hundreds of them behind.
    """
    _mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _mallopt(option: int, value: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, value)
