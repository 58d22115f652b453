"""Settings of threads, memory and interpreter for a process that will load torch; this module does not."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_SPIN_COUNT, _SPIN_COUNT_OF_AMD = "10000", "2000"
"""How many times an idle OpenMP thread spins before it sleeps. The default takes cores away from the other
model process of the host; without spinning, a pass takes nearly twice as long. On an Intel Xeon with AMX,
1,000 made a pass 1.3 times as long. On a Zen 4, a single request takes 1.02 times as long with 2,000 as with
30,000, and four at a time with dflash two thirds as long, for then both processes work at once."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
"""Option numbers of glibc's mallopt."""
_LARGE_BYTES = 2**20

_SWITCH_INTERVAL_S = 0.0005
"""Seconds for which the engine thread may hold the GIL while the event loop waits for it."""


CGROUPS = Path("/sys/fs/cgroup")
"""Where cgroups are mounted."""

CGROUPS_OF_PROCESS = Path("/proc/self/cgroup")
"""The file that says which cgroups this process is in."""


def tune_process(root: Path = CGROUPS, membership: Path = CGROUPS_OF_PROCESS) -> None:
    """Prepare this process for running a model. Call this before the first import of torch.

    Args:
        root: as of `cpu_quota`.
        membership: as of `cpu_quota`.
    """
    # By itself torch counts the cores that the process may run on, and a quota does not take any away. With
    # more threads than the quota allows, all of them stand still for most of the time.
    quota = cpu_quota(root, membership)
    if quota is not None and quota < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(quota))
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    os.environ.setdefault("GOMP_SPINCOUNT", spin_count())
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def cpu_quota(root: Path = CGROUPS, membership: Path = CGROUPS_OF_PROCESS) -> int | None:
    """Return how many whole CPUs a container's quota leaves this process, at least 1; None: no quota.

    Args:
        root: where cgroups are mounted, of version 1 or 2.
        membership: the file that says which cgroups the process is in.
    """
    quotas = [quota for folder in _cgroups(root, membership) if (quota := _quota(folder))]
    return max(1, int(min(quotas))) if quotas else None


def _cgroups(root: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of the cgroups that limit the CPU time of the process, each with those above it."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "cpu" if controllers else root  # only version 1 names controllers
        # A container may see the path that its host has for it, while its own cgroup is the mounted one.
        group = Path(path.lstrip("/"))
        yield from (mount / folder for folder in (group, *group.parents))


def _quota(cgroup: Path) -> float | None:
    """Return the CPUs that the quota of one cgroup allows; None: it has none."""
    with suppress(OSError, ValueError):
        quota, period = (cgroup / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError):
        quota = (cgroup / "cpu.cfs_quota_us").read_text()
        period = (cgroup / "cpu.cfs_period_us").read_text()
        return int(quota) / int(period) if int(quota) > 0 else None
    return None


def spin_count() -> str:
    """Return how many times an idle OpenMP thread should spin on this machine."""
    try:
        is_amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        is_amd = False
    return _SPIN_COUNT_OF_AMD if is_amd else _SPIN_COUNT


def keep_freed_memory() -> None:
    """Make glibc's malloc keep the memory of freed large tensors; other allocators are left alone.

    The system clears and maps returned pages again for the next tensor, which takes a third of the time of a
    training step on a CPU.
    """
    _mallopt(_M_MMAP_MAX, 0)
    _mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def return_freed_memory() -> None:
    """Make glibc's malloc return large buffers to the system at once; other allocators are left alone.

    By default it keeps buffers up to the size of the largest buffer that was freed, in the heaps of all
    threads: messages of several megabytes then leave hundreds of them behind.
    """
    _mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def _mallopt(option: int, value: int) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(option, value)
