"""What there is to know of this machine before services run on it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import NormalizedName, canonicalize_name

from specdec.contract.errors import FailedPreconditionError
from specdec.local.launcher import health_service
from specdec.local.probe import is_serving
from specdec.local.state_file import read_live_state
from specdec.service.tuning import CGROUPS, CGROUPS_OF_PROCESS, cpu_quota

_SAMPLE_S = 1.0
_TIMEOUT_S = 60.0
_SHARED_DIR = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class TorchFacts:
    """What torch finds; see `torch_facts`."""

    version: str
    cuda: str
    """The version of CUDA that it was built for; empty: it was built for CPUs."""
    gpu_error: str
    """What it says of the GPU; empty: nothing is wrong."""
    is_gpu_usable: bool
    has_kernels: bool
    """Whether the kernels in C of this package are there and can be used."""


@dataclass(frozen=True, slots=True)
class Library:
    """An installed library beside what this package asks for."""

    name: str
    installed: str
    """The version that is installed; empty: the library is not there."""
    wanted: str
    """The versions that this package takes."""
    is_wanted: bool
    pinned: str = ""
    """The version that this project's tests run with; empty: it is not known here."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found on this machine."""

    busy_cores: float
    """Cores that programs kept busy while this one slept, of those that this process may use."""
    num_cores: int
    """Cores that this process may use."""
    quota: int | None
    """Cores' worth of time that a container leaves it; None: all."""
    cpu: str
    """The architecture, such as x86_64."""
    cpu_flags: frozenset[str]
    """What the processor can do, in the kernel's words."""
    shared_dir: str
    """The directory in which services share memory."""
    shared_free_bytes: int | None
    """What is free there; None: there is no such directory, or it cannot be written to."""
    available_bytes: int
    """Memory that programs may still take."""
    open_files: int
    """How many files a process may have open at a time."""
    most_open_files: int
    """To how many that may be raised without being root."""
    gpu: str = ""
    """Name of the GPU and version of its driver; empty: the driver tells of none."""
    torch: TorchFacts | None = None
    """None: torch cannot be loaded."""
    torch_error: str = ""
    """Why torch cannot be loaded; empty: it is not installed."""
    libraries: tuple[Library, ...] = ()
    system: Mapping[str, bool] | None = None
    """Whether each service of `specdec up` answers that it is healthy, by name; None: none was started."""
    system_error: str = ""
    """Why the notes of `specdec up` cannot be read."""
    logs: str = ""
    """Where the services' logs are."""


def read_facts() -> Facts:
    """Look at this machine; it takes some seconds."""
    torch, torch_error = _torch()
    system, system_error, logs = _system()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    cores = os.sched_getaffinity(0)
    return Facts(
        busy_cores=_busy_cores(cores),
        num_cores=len(cores),
        quota=cpu_quota(),
        cpu=os.uname().machine,
        cpu_flags=_cpu_flags(),
        shared_dir=str(_SHARED_DIR),
        shared_free_bytes=_free_bytes(_SHARED_DIR),
        available_bytes=_available_bytes(),
        open_files=_limit(soft),
        most_open_files=_limit(hard),
        gpu=_gpu(),
        torch=torch,
        torch_error=torch_error,
        libraries=tuple(_libraries()),
        system=system,
        system_error=system_error,
        logs=logs,
    )


def _limit(value: int) -> int:
    return 2**31 if value == resource.RLIM_INFINITY else value


def _busy_cores(cores: set[int]) -> float:
    """Return how many of these cores were busy for a second in which this process slept."""
    before = _core_times(cores)
    time.sleep(_SAMPLE_S)
    after = _core_times(cores)
    pairs = [(after[core][0] - busy, after[core][1] - total) for core, (busy, total) in before.items()]
    return sum(busy / total for busy, total in pairs if total > 0)


def _core_times(cores: set[int]) -> dict[int, tuple[float, float]]:
    """Return each core's busy time and all of its time, in ticks; what a host took from us is busy time."""
    times: dict[int, tuple[float, float]] = {}
    with suppress(OSError):
        for line in Path("/proc/stat").read_text().splitlines():
            name, *ticks = line.split()
            if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cores:
                numbers = [float(tick) for tick in ticks[:8]]  # what guests took is in "user" already
                idle = sum(numbers[3:5])
                times[int(name[3:])] = (sum(numbers) - idle, sum(numbers))
    return times


def _cpu_flags() -> frozenset[str]:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return frozenset(value.split())
    return frozenset()


def _free_bytes(directory: Path) -> int | None:
    if not os.access(directory, os.W_OK):
        return None
    return shutil.disk_usage(directory).free


def _available_bytes() -> int:
    """Return what the machine has, or less where a container has less."""
    return min([psutil.virtual_memory().available, *_left_in_cgroups(CGROUPS, CGROUPS_OF_PROCESS)])


def _left_in_cgroups(root: Path, membership: Path) -> Iterator[int]:
    """Yield what the cgroups of this process, of version 2, leave it; those without a limit are left out."""
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            group = Path(line.rpartition(":")[2].lstrip("/"))
            for folder in (root / each for each in (group, *group.parents)):
                with suppress(OSError, ValueError):
                    limit = int((folder / "memory.max").read_text())
                    yield max(0, limit - int((folder / "memory.current").read_text()))


def _gpu() -> str:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
        return next(iter(done.stdout.splitlines()), "")
    return ""


def _torch() -> tuple[TorchFacts | None, str]:
    """Return what torch finds; where it cannot be loaded, why."""
    # -P: a folder named torch where the user stands is not meant.
    command = [sys.executable, "-P", "-m", "specdec.doctor.torch_facts"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None, f"it did not load within {_TIMEOUT_S:g} s"
    if done.returncode == 0:
        return TorchFacts(**json.loads(done.stdout)), ""
    last = next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
    return None, "" if "No module named 'torch'" in last else last


def _libraries() -> Iterator[Library]:
    pins = _pins()
    for line in metadata.requires("specdec") or []:
        with suppress(InvalidRequirement):
            wanted = Requirement(line)
            library = _library(wanted, pins)
            is_needed = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
            is_of_models = wanted.marker is None or wanted.marker.evaluate({"extra": "models"})
            # What runs models may be left out; whether it is there is torch's own finding.
            if is_needed or (is_of_models and library.installed):
                yield library


def _library(wanted: Requirement, pins: Mapping[NormalizedName, str]) -> Library:
    try:
        installed = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        installed = ""
    is_wanted = wanted.specifier.contains(installed, prereleases=True) if installed else False
    return Library(
        wanted.name, installed, str(wanted.specifier), is_wanted, pins.get(canonicalize_name(wanted.name), "")
    )


def _pins() -> dict[NormalizedName, str]:
    """Return the versions that the tests run with, where this package runs from a checkout."""
    path = Path(__file__).parents[2] / ".ci" / "constraints.txt"
    with suppress(OSError):
        lines = (line.partition("==") for line in path.read_text().splitlines() if "==" in line)
        return {canonicalize_name(name.strip()): version.strip() for name, _, version in lines}
    return {}


def _system() -> tuple[dict[str, bool] | None, str, str]:
    """Return whether the services of `specdec up` are healthy, why that is not known, and their logs."""
    try:
        state = read_live_state()
    except FailedPreconditionError as error:
        return None, error.message, ""
    if state is None:
        return None, "", ""
    addresses = {"gateway": state.gateway, "verifier": state.verifier, "drafter": state.drafter}
    healthy = {name: is_serving(address, health_service(name)) for name, address in addresses.items()}
    return healthy, "", state.log_dir
