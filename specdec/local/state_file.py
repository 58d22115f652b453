"""The state file: where the system that `specdec up` started can be found."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
import psutil

from specdec.contract.errors import FailedPreconditionError

STATE_DIR_VARIABLE = "SPECDEC_STATE_DIR"
"""Environment variable that names the directory of the state file and the logs."""

STATE_VERSION = 1
_STATE_FILE = "system.json"


@dataclass(frozen=True, slots=True)
class SystemState:
    """A running local system."""

    supervisor_pid: int
    """Process that supervises the services."""
    supervisor_started_at: float
    """When it started, seconds since the epoch, which tells it from a later process with the same pid."""
    gateway: str
    """Address of the gateway, HOST:PORT."""
    verifier: str
    """Address of the verifier, HOST:PORT."""
    drafter: str
    """Address of the drafter service, HOST:PORT."""
    pids: dict[str, int]
    """Pid of each service by name."""
    log_dir: str
    """Directory of the logs."""
    version: int = STATE_VERSION
    """Layout of the file."""

    @property
    def is_alive(self) -> bool:
        """Whether the supervisor still runs."""
        try:
            process = psutil.Process(self.supervisor_pid)
            same = abs(process.create_time() - self.supervisor_started_at) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


def how_to_stop() -> str:
    """The command that stops the system whose state is in this directory, from any shell."""
    override = os.environ.get(STATE_DIR_VARIABLE)
    return f"{STATE_DIR_VARIABLE}={shlex.quote(override)} specdec down" if override else "specdec down"


def state_dir() -> Path:
    """The directory of the state file, made if it is not there: mode 0700, this user's.

    $SPECDEC_STATE_DIR, else the user's runtime directory, else, where there is none, the cache.
    """
    override = os.environ.get(STATE_DIR_VARIABLE)
    if override:
        return _private(Path(override))
    # Asked for here, not of platformdirs: without a directory of the user's own it names a place every user
    # can write to, and says so once per process only.
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")
    try:
        if runtime.is_dir():
            return _private(runtime / "specdec")
    except OSError:
        pass
    return _private(platformdirs.user_cache_path("specdec") / "run")


def _private(directory: Path) -> Path:
    # A directory that is there already keeps its mode; the file in it is private by its own.
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"{directory} is not writable")
    return directory


def write_state(state: SystemState) -> None:
    """Write the file, mode 0600, in one step, so that a reader never sees half of it."""
    directory = state_dir()
    descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=_STATE_FILE)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(state), file, indent=2)
    Path(temporary).replace(directory / _STATE_FILE)


def read_live_state() -> SystemState | None:
    """The running system; None if there is none. The file of a system that is gone is removed."""
    try:
        path = state_dir() / _STATE_FILE
        fields = json.loads(path.read_text())
    except (OSError, ValueError):
        # Not there, not readable or not JSON: nothing that could be talked to.
        return None
    try:
        state = SystemState(**fields)
    except TypeError:
        # Written by another version.
        path.unlink(missing_ok=True)
        return None
    if not state.is_alive:
        path.unlink(missing_ok=True)
        return None
    return state


def remove_state() -> None:
    """Forget the system."""
    (state_dir() / _STATE_FILE).unlink(missing_ok=True)


@contextmanager
def sole_supervisor() -> Iterator[None]:
    """Holds the lock that only one supervisor can hold; the kernel frees it however the holder ends.

    Raises:
        FailedPreconditionError: another one holds it.
    """
    with (state_dir() / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _already_running(read_live_state()) from None
        yield


def refuse_if_running() -> None:
    """Look for a running system before starting one takes time.

    Raises:
        FailedPreconditionError: there is one.
    """
    state = read_live_state()
    if state is not None:
        raise _already_running(state)


def _already_running(state: SystemState | None) -> FailedPreconditionError:
    where = f"its gateway on {state.gateway}" if state else "still starting or stopping"
    return FailedPreconditionError(
        f"A system runs already, {where}. Use it, or stop it with `{how_to_stop()}`.",
        reason="ALREADY_RUNNING",
    )
