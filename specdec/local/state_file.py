"""The state file, which says where the system that `specdec up` started is."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs
import psutil

from specdec.contract.errors import FailedPreconditionError

STATE_DIR_VARIABLE = "SPECDEC_STATE_DIR"
"""The environment variable that names the directory of the state file and the logs."""

STATE_VERSION = 1
_STATE_FILE = "system.json"
_SUPERVISOR_LOCK = "lock"
_STARTER_LOCK = "starting"


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
    http: str = ""
    """URL of the gateway's HTTP interface. Empty: it has none."""
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

    Raises:
        FailedPreconditionError: the directory cannot be made or written to.
    """
    *preferred, last = _candidates()
    for directory in preferred:
        with suppress(OSError):
            return _private(directory)
    with _usable(last):
        return _private(last)


def log_dir() -> Path:
    """Return the directory of the logs of `specdec up`; make it if it does not exist.

    Raises:
        FailedPreconditionError: the directory cannot be made.
    """
    directory = state_dir() / "logs"
    with _usable(directory):
        directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def _candidates() -> list[Path]:
    """Return the directories in which the state file may be, the preferred one first."""
    override = os.environ.get(STATE_DIR_VARIABLE)
    if override:
        return [Path(override)]
    # platformdirs is not asked: if the user has no runtime directory, it names a place that every user can
    # write to, and warns of it only once per process.
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.getuid()}"
    cache = platformdirs.user_cache_path("specdec") / "run"
    return [Path(runtime) / "specdec", cache] if os.path.isdir(runtime) else [cache]  # noqa: PTH112


def _private(directory: Path) -> Path:
    # An existing directory keeps its mode; the mode of the file in it makes the file private.
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.access(directory, os.W_OK):
        raise PermissionError(errno.EACCES, "it is not writable")
    return directory


@contextmanager
def _usable(path: Path) -> Iterator[None]:
    """Turn a failure of the file system into an error that says what to do."""
    try:
        yield
    except OSError as error:
        raise FailedPreconditionError(
            f"{path}, where `specdec up` keeps its state, cannot be used ({error.strerror}); set "
            f"{STATE_DIR_VARIABLE} to a directory that you can write to.",
            reason="STATE_DIR_UNUSABLE",
        ) from error


def write_state(state: SystemState) -> None:
    """Write the state file, mode 0600, in one step, so that no reader sees a part of it.

    Raises:
        FailedPreconditionError: the state directory cannot be written to.
    """
    directory = state_dir()
    with _usable(directory):
        descriptor, temporary = tempfile.mkstemp(dir=directory, prefix=_STATE_FILE)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(state), file, indent=2)
        Path(temporary).replace(directory / _STATE_FILE)


def read_live_state() -> SystemState | None:
    """Read the state of the running system; None if none runs. The file of a system that ended is removed.

    The directory need not be writable: a system runs on when its directory becomes read-only.

    Raises:
        FailedPreconditionError: the state file may not be read.
    """
    directories = _candidates()
    for directory in directories[:-1]:
        # A user who became another one by `su` may still have the runtime directory of the first in the
        # environment.
        with suppress(OSError):
            if state := _read_live(directory / _STATE_FILE):
                return state
    with _usable(directories[-1]):
        return _read_live(directories[-1] / _STATE_FILE)


def _read_live(path: Path) -> SystemState | None:
    try:
        state = SystemState(**json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except TypeError:  # another version wrote the file
        state = None
    if state is not None and state.is_alive:
        return state
    with suppress(OSError):
        path.unlink(missing_ok=True)
    return None


def remove_state() -> None:
    """Remove the state file. If that is not possible it stays, and names a system that is not alive."""
    with suppress(OSError, FailedPreconditionError):
        (state_dir() / _STATE_FILE).unlink(missing_ok=True)


@contextmanager
def sole_supervisor() -> Iterator[None]:
    """Hold the lock that makes this process the only supervisor; the kernel frees it if the process dies.

    Raises:
        FailedPreconditionError: another supervisor holds the lock.
    """
    with _locked(_SUPERVISOR_LOCK):
        yield


@contextmanager
def sole_starter() -> Iterator[None]:
    """Hold the lock of the process that starts a detached supervisor, until the supervisor is ready.

    Raises:
        FailedPreconditionError: another process starts a system.
    """
    with _locked(_STARTER_LOCK):
        yield


@contextmanager
def _locked(name: str) -> Iterator[None]:
    path = state_dir() / name
    with _usable(path):
        lock = path.open("a+")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _already_running(read_live_state()) from None
        lock.truncate(0)
        print(os.getpid(), file=lock, flush=True)
        yield


def held_locks() -> list[Path]:
    """Return the locks that processes hold which start or supervise a system."""
    paths = [directory / name for directory in _candidates() for name in (_STARTER_LOCK, _SUPERVISOR_LOCK)]
    return [path for path in paths if _is_held(path)]


def _is_held(path: Path) -> bool:
    try:
        with path.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def lock_owner(path: Path) -> psutil.Process | None:
    """Return the process that holds a lock; None while it has not written its pid yet."""
    with suppress(OSError, ValueError, psutil.Error):
        process = psutil.Process(int(path.read_text()))
        # The pid may still be that of the owner before, whose number another process may have now.
        if any(Path(file.path) == path.resolve() for file in process.open_files()):
            return process
    return None


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
