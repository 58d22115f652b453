"""Processes that end with the process that started them, however that one ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

_TIED_VARIABLE = "SPECDEC_TIED"
_PR_SET_PDEATHSIG = 1

# The kernel signals a process when the thread that started it ends, so that not even SIGKILL of the launcher
# leaves anything behind. A small program asks for that signal and then becomes the process, because Python
# code between fork and exec (preexec_fn) can deadlock in a process with gRPC's threads.
_DIE_WITH_LAUNCHER = f"""
import os, signal, sys
if sys.platform == "linux":
    import ctypes
    ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the launcher is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def tied(command: Sequence[str]) -> tuple[str, ...]:
    """Return the command line of a process that gets SIGTERM when the thread that starts it ends.

    Args:
        command: the absolute path of the program, then its arguments.
    """
    return (sys.executable, "-I", "-S", "-c", _DIE_WITH_LAUNCHER, str(os.getpid()), *command)


def tied_for_now(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a tied process that will call `outlive_launcher`."""
    return {**environment, _TIED_VARIABLE: "1"}


def outlive_launcher() -> None:
    """Let this process run on when the one that started it ends, if it was `tied_for_now`."""
    # Others may have tied this process for reasons of their own.
    if os.environ.pop(_TIED_VARIABLE, "") and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0)
