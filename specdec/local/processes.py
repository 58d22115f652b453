"""Child processes that serve gRPC: start them, wait until they are healthy, stop them with their launcher."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from specdec.contract.errors import RequestCancelledError, UnavailableError
from specdec.local.probe import POLL_S, Probe, Spawn
from specdec.local.tied import tied

STOP_GRACE_S = 35.0
"""Seconds between SIGTERM and SIGKILL, a little more than a service gives its running answers to finish."""

KILL_GRACE_S = 10.0
"""Seconds that the kernel has to end a killed process; a launcher waits no longer."""

LOG_TAIL_LINES = 15
_STDERR = 2
_PORTS = range(20_000, 32_768)
"""Ports that the kernel leaves to services: by default, outgoing connections get those above."""


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """How to run a service."""

    name: str
    """Short name of the service, which also names its log file."""
    address: str
    """HOST:PORT that the service listens on."""
    command: tuple[str, ...]
    """The absolute path of the program, then its arguments."""
    health_service: str
    """Name of the service in its health check."""
    http: str = ""
    """URL of the service's HTTP interface. Empty: it has none."""


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Find different ports on which nothing listens."""
    sockets = [_listening(host) for _ in range(count)]
    try:
        return [listener.getsockname()[1] for listener in sockets]
    finally:
        for listener in sockets:
            listener.close()


def _listening(host: str) -> socket.socket:
    """Return a socket that listens on some port, one that outgoing connections are not given: one of them
    could have it before the service for which it was found."""
    for port in random.sample(_PORTS, 100):
        with suppress(OSError):
            return socket.create_server((host, port))
    return socket.create_server((host, 0))


class Service:
    """One service process and its log.

    Args:
        spec: what to run.
        log_dir: directory of the log file; output is appended to the file.
        env: the environment of the process.
        run_in_owner: runs a function in the thread that the process must not outlive.
    """

    def __init__(
        self, spec: ServiceSpec, log_dir: Path, env: Mapping[str, str], run_in_owner: Callable[[Spawn], Any]
    ) -> None:
        self.spec = spec
        self.log_path = log_dir / f"{spec.name}.log"
        self.started_at = 0.0
        """Monotonic time of the last start, seconds."""
        self._env = env
        self._run_in_owner = run_in_owner
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The pid of the process; 0 before the first start."""
        return self._process.pid if self._process else 0

    @property
    def exit_code(self) -> int | None:
        """The exit code of the process, negative for a signal; None while it runs and before its start."""
        return self._process.poll() if self._process else None

    def start(self) -> None:
        """Start the process, or start it again after it ended.

        A service whose log cannot be opened any more writes where its launcher does.

        Raises:
            UnavailableError: the system has no room for another process.
        """
        try:
            with self._open_log() as log:
                self._process = self._run_in_owner(lambda: self._spawn(log))
        except OSError as error:
            raise UnavailableError(
                f"The {self.spec.name} cannot be started ({error.strerror}); end other programs, or raise "
                "the limits of processes and memory.",
                reason="START_FAILED",
            ) from error
        self.started_at = time.monotonic()

    def _open_log(self) -> IO[bytes]:
        try:
            return self.log_path.open("ab")
        except OSError:
            return os.fdopen(os.dup(_STDERR), "ab")

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            tied(self.spec.command),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=self._env,
            # Ctrl-C is for the launcher, which stops the services in order.
            start_new_session=True,
        )

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Ask the process to end; kill it and its children if it still runs after the grace period."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(KILL_GRACE_S)

    def describe_exit(self) -> str:
        """Describe how the process ended, with the last lines of its log."""
        code = self.exit_code or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"stopped with exit code {code}"
        return f"The {self.spec.name} {how}. {self.describe_log()}"

    def describe_log(self) -> str:
        """Quote the last lines of the service's log."""
        return describe_log(self.log_path)


def describe_log(path: Path) -> str:
    """Quote the last lines of a log, for an error message."""
    try:
        lines = path.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    except OSError as error:
        return f"Its log {path} cannot be read ({error.strerror})."
    if not lines:
        return f"Its log {path} is empty."
    return f"Its log {path} ends:\n" + "\n".join(f"  {line}" for line in lines)


def warnings_in(path: Path) -> list[str]:
    """Return the warnings of a service's log, in order; none if it cannot be read."""
    found = []
    with suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError):  # libraries write lines of other kinds
                record = json.loads(line)
                if isinstance(record, dict) and record.get("level") == "WARNING":
                    found.append(": ".join(filter(None, (record.get("message"), record.get("reason")))))
    return found


class ServiceGroup:
    """Services that start together and stop one after the other.

    Args:
        specs: what to run, in the order in which the services stop.
        log_dir: directory of the log files.
        env: environment variables of the services, added to those of this process.
        ready_timeout_s: seconds within which the services must become healthy.
    """

    def __init__(
        self,
        specs: Sequence[ServiceSpec],
        log_dir: Path,
        *,
        env: Mapping[str, str] | None = None,
        ready_timeout_s: float = 120.0,
    ) -> None:
        self.stopping = threading.Event()
        """Event that ends a start or a supervision that is running."""
        self.ready_timeout_s = ready_timeout_s
        # One thread, which lives as long as the group, starts every process: they end when it does.
        self._owner = ThreadPoolExecutor(1, thread_name_prefix="specdec-services")
        # PYTHONSAFEPATH keeps a folder `gateway` in the current directory from hiding the installed package.
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1", **(env or {})}
        log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.services = [Service(spec, log_dir, self._env, self._spawn) for spec in specs]

    def _spawn(self, spawn: Spawn) -> subprocess.Popen[bytes]:
        return self._owner.submit(spawn).result()

    @property
    def pids(self) -> dict[str, int]:
        """The pid of each service by name."""
        return {service.spec.name: service.pid for service in self.services}

    def start(self) -> None:
        """Start all services and wait until they are healthy. If one fails, all are stopped.

        Raises:
            UnavailableError: a service ended, or was not healthy in time.
            RequestCancelledError: `stopping` was set during the start.
        """
        try:
            for service in self.services:
                service.start()
            self._wait_ready()
        except BaseException:
            self.stop(grace_s=2.0)
            raise

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + self.ready_timeout_s
        names = {service.spec.address: service.spec.health_service for service in self.services}
        with Probe(names, self._env, self._spawn) as probe:
            while True:
                for service in self.services:
                    if service.exit_code is not None:
                        raise UnavailableError(service.describe_exit(), reason="SERVICE_EXITED")
                waiting = probe.waiting_for()
                if not waiting:
                    return
                if time.monotonic() > deadline:
                    raise self._late(waiting)
                if self.stopping.wait(POLL_S):
                    raise RequestCancelledError("Stopped while the services were starting.")

    def _late(self, waiting: Set[str]) -> UnavailableError:
        late = next(service for service in self.services if service.spec.address in waiting)
        return UnavailableError(
            f"The {late.spec.name} was not ready after {self.ready_timeout_s:g} s; pass a longer --timeout. "
            f"{late.describe_log()}",
            reason="START_TIMEOUT",
        )

    def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Stop the services in order; the group cannot be started again."""
        for service in self.services:
            service.stop(grace_s)
        self._owner.shutdown()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
