"""`specdec up`, which runs a system in the foreground or detached, and `specdec down`, which stops it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from specdec.contract.errors import (
    FailedPreconditionError,
    SpecdecError,
    UnavailableError,
)
from specdec.local.launcher import Report, SystemConfig, prepare_models, service_specs
from specdec.local.probe import POLL_S
from specdec.local.processes import ServiceGroup, describe_log
from specdec.local.state_file import (
    SystemState,
    held_locks,
    lock_owner,
    log_dir,
    read_live_state,
    refuse_if_running,
    remove_state,
    sole_starter,
    sole_supervisor,
    write_state,
)
from specdec.local.supervisor import Supervisor, interruptible, stop_on_signals
from specdec.local.tied import outlive_launcher, tied, tied_for_now

DOWN_TIMEOUT_S = 120.0
"""Seconds that `stop_running` waits for the supervisor, which gives three services a grace period each."""

_SUPERVISOR_LOG = "supervisor.log"


def run_foreground(config: SystemConfig, *, report: Report, announce: Callable[[SystemState], None]) -> None:
    """Run a system until SIGINT or SIGTERM.

    Args:
        config: what to run.
        report: receives one line of text per slow step and death.
        announce: called once, when all services are healthy.

    Raises:
        FailedPreconditionError: a system runs already.
        RequestCancelledError: SIGTERM or Ctrl-C stopped the start.
        UnavailableError: a service did not start, or kept dying.
    """
    with sole_supervisor(), interruptible():
        prepare_models(config, report)
        logs = _fresh_log_dir()
        group = ServiceGroup(service_specs(config), logs, ready_timeout_s=config.ready_timeout_s)
        supervise(group, logs, report=report, announce=announce)


def _fresh_log_dir() -> Path:
    """Return the log directory of `specdec up`, without the logs of the last system."""
    directory = log_dir()
    for path in directory.glob("*.log"):
        # A detached supervisor has its own log open already.
        if path.name != _SUPERVISOR_LOG:
            path.unlink()
    return directory


def supervise(
    group: ServiceGroup, logs: Path, *, report: Report, announce: Callable[[SystemState], None]
) -> None:
    """Start a group, write the state file, restart dead services, stop on a signal; see `run_foreground`."""
    with stop_on_signals(group.stopping), group:
        try:
            outlive_launcher()
            announce(_publish(group, logs))
            Supervisor(group, report=report, on_restart=lambda: _publish_again(group, logs, report)).run()
        finally:
            # The file goes before the services stop, so that it does not send anyone to a draining gateway.
            remove_state()
            report("Stopping.")


def _publish_again(group: ServiceGroup, logs: Path, report: Report) -> None:
    """Write the new pids. The old file still names the supervisor and the addresses, which do not change."""
    try:
        _publish(group, logs)
    except FailedPreconditionError as error:
        report(f"The state file keeps old pids: {error.message}")


def _publish(group: ServiceGroup, logs: Path) -> SystemState:
    addresses = {service.spec.name: service.spec.address for service in group.services}
    state = SystemState(
        supervisor_pid=os.getpid(),
        supervisor_started_at=psutil.Process().create_time(),
        gateway=addresses["gateway"],
        verifier=addresses["verifier"],
        drafter=addresses["drafter"],
        pids=group.pids,
        http=next((service.spec.http for service in group.services if service.spec.http), ""),
        log_dir=str(logs),
    )
    write_state(state)
    return state


def run_detached(
    command: Sequence[str], *, timeout_s: float, prepare: Callable[[], object] = lambda: None
) -> SystemState:
    """Run a supervisor in a session of its own and wait until its services are healthy.

    Args:
        command: program and arguments of a process that calls `supervise`.
        timeout_s: seconds within which that process must write the state file.
        prepare: called before the supervisor starts.

    Raises:
        FailedPreconditionError: a system runs already.
        RequestCancelledError: `specdec down`, SIGTERM or Ctrl-C stopped the start.
        UnavailableError: the supervisor failed; the error quotes the end of its log.
    """
    refuse_if_running()
    log_path = log_dir() / _SUPERVISOR_LOG
    with sole_starter(), interruptible():
        prepare()
        pid = _spawn_detached(command, log_path)
        try:
            return _await_state(pid, log_path, timeout_s)
        except BaseException:
            if psutil.pid_exists(pid):
                psutil.Process(pid).terminate()
            raise


def _spawn_detached(command: Sequence[str], log_path: Path) -> int:
    # subprocess.Popen does not fit: it warns when it is dropped while its process still runs.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    file_actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, str(log_path), flags, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    # While it starts, it ends with the process that waits for it, which may be killed.
    environment = tied_for_now({**os.environ, "PYTHONUNBUFFERED": "1"})
    program, *arguments = tied(command)
    return os.posix_spawn(program, [program, *arguments], environment, file_actions=file_actions, setsid=True)


def _await_state(pid: int, log_path: Path, timeout_s: float) -> SystemState:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        state = read_live_state()
        if state is not None and state.supervisor_pid == pid:
            return state
        if os.waitpid(pid, os.WNOHANG) != (0, 0):
            raise UnavailableError(_failure(log_path), reason="START_FAILED")
        time.sleep(POLL_S)
    raise UnavailableError(
        f"The system was not ready after {timeout_s:g} s; pass a longer --timeout. {describe_log(log_path)}",
        reason="START_TIMEOUT",
    )


def _failure(log_path: Path) -> str:
    """Find the error that the supervisor printed before it ended."""
    found = re.search(r"^error: (.*)", log_path.read_text(errors="replace"), re.DOTALL | re.MULTILINE)
    return found[1].strip() if found else f"The supervisor stopped. {describe_log(log_path)}"


def stop_running(timeout_s: float = DOWN_TIMEOUT_S) -> SystemState | None:
    """Stop the system that `specdec up` started, wait for its end, and return its last state.

    Raises:
        SpecdecError: the system did not stop in time.
    """
    state = read_live_state()
    if state is None:
        return None
    supervisor = psutil.Process(state.supervisor_pid)
    supervisor.terminate()
    try:
        supervisor.wait(timeout_s)
    except psutil.TimeoutExpired:
        raise SpecdecError(
            f"The supervisor (pid {state.supervisor_pid}) did not stop within {timeout_s:g} s; "
            f"end it and its services with `kill -9 {state.supervisor_pid}`. Logs: {state.log_dir}"
        ) from None
    return state


def stop_starting(timeout_s: float = DOWN_TIMEOUT_S) -> bool:
    """Stop a system that is still starting, and wait for its end; return whether there was one.

    Raises:
        SpecdecError: it did not stop in time.
    """
    deadline = time.monotonic() + timeout_s
    asked: set[int] = set()
    found = False
    while locks := held_locks():
        found = True
        for owner in filter(None, map(lock_owner, locks)):
            if owner.pid not in asked:
                asked.add(owner.pid)
                with suppress(psutil.NoSuchProcess):
                    owner.terminate()
        if time.monotonic() > deadline:
            raise SpecdecError(
                f"The system that is starting did not stop within {timeout_s:g} s; its processes: "
                f"{', '.join(map(str, sorted(asked)))}."
            )
        time.sleep(POLL_S)
    return found
