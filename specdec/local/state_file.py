"""The state file, which says where the system that `specdec up` started is."""

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
"""The environment variable that names the directory of the state file and the logs."""

STATE_VERSION = 1
_STATE_FILE = "system.json"


@dataclass(frozen=True, slots=True)
class SystemState:
    """A running local system."""

    supervisor_pid: int
    """Pid of the process that supervises the services."""
    supervisor_started_at: float
    """Start time of the supervisor, seconds since the epoch; a later process with its pid has another."""
    gateway: str
    """Address of the gateway, HOST:PORT."""
    verifier: str
    """Address of the verifier, HOST:PORT."""
    drafter: str
    """Address of the drafter service, HOST:PORT."""
    pids: dict[str, int]
    """The pid of each service by name."""
    log_dir: str
    """Directory of the logs."""
    version: int = STATE_VERSION
    """Version of the file's layout."""

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
    """Return the command that stops this system from any shell."""
    override = os.environ.get(STATE_DIR_VARIABLE)
    return f"{STATE_DIR_VARIABLE}={shlex.quote(override)} specdec down" if override else "specdec down"


def state_dir() -> Path:
    """Return the directory of the state file; make it, with mode 0700, if it does not exist.

    It is $SPECDEC_STATE_DIR if set, else a folder of the user's runtime directory, else of the cache.
    """
    override = os.environ.get(STATE_DIR_VARIABLE)
    if override:
        return _private(Path(override))
    # platformdirs is not asked: if the user has no runtime directory, it names a place that every user can
    # write to, and warns of it only once per process.
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}")
    try:
        if runtime.is_dir():
            return _private(runtime / "specdec")
    except OSError:
        pass
    return _private(platformdirs.user_cache_path("specdec") / "run")


def _private(directory: Path) -> Path:
    # An existing directory keeps its mode; the mode of the file in it makes the file private.
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
        raise PermissionError(f"{directory} is not writable; set {STATE_DIR_VARIABLE} to one that is.")
    return directory


def write_state(state: SystemState) -> None:
    """Write the state file, mode 0600, in one step, so that no reader sees a part of it."""
    directory = state_dir()
    descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=_STATE_FILE)
    with os.fdopen(descriptor, "w") as file:
        json.dump(asdict(state), file, indent=2)
    Path(temporary).replace(directory / _STATE_FILE)


def read_live_state() -> SystemState | None:
    """Read the state of the running system; None if none runs. The file of a system that ended is removed."""
    try:
        path = state_dir() / _STATE_FILE
        fields = json.loads(path.read_text())
    except (OSError, ValueError):
        # The file is missing, not readable or not JSON, so it does not name a system.
        return None
    try:
        state = SystemState(**fields)
    except TypeError:
        # Another version wrote the file.
        path.unlink(missing_ok=True)
        return None
    if not state.is_alive:
        path.unlink(missing_ok=True)
        return None
    return state


def remove_state() -> None:
    """Remove the state file."""
    (state_dir() / _STATE_FILE).unlink(missing_ok=True)


@contextmanager
def sole_supervisor() -> Iterator[None]:
    """Hold the lock that makes this process the only supervisor; the kernel frees it if the process dies.

    Raises:
        FailedPreconditionError: another supervisor holds the lock.
    """
    with (state_dir() / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _already_running(read_live_state()) from None
        yield


def refuse_if_running() -> None:
    """Refuse to start a second system, before the start takes time.

    Raises:
        FailedPreconditionError: a system runs already.
    """
    state = read_live_state()
    if state is not None:
        raise _already_running(state)


def _already_running(state: SystemState | None) -> FailedPreconditionError:
    where = f"its gateway is {state.gateway}" if state else "it is still starting or stopping"
    return FailedPreconditionError(
        f"A system runs already; {where}. Use it, or stop it with `{how_to_stop()}`.",
        reason="ALREADY_RUNNING",
    )
