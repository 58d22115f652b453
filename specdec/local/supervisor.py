"""A supervisor that restarts the services of a group when they die, and stops on a signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from specdec.contract.errors import RequestCancelledError, UnavailableError
from specdec.local.processes import Service, ServiceGroup

WATCH_S = 0.2
"""Seconds between two checks of the processes."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a dead service is restarted."""

    first_delay_s: float = 0.5
    """Seconds before the first restart; the delay doubles with every quick death."""
    max_delay_s: float = 10.0
    """Longest delay before a restart, seconds."""
    quick_death_s: float = 60.0
    """Lifetime below which a death is quick, seconds. A longer life clears the record of quick deaths."""
    max_quick_deaths: int = 5
    """Number of quick deaths in a row after which the supervisor gives up."""


DEFAULT_POLICY = RestartPolicy()
"""The policy of `specdec up`."""


class _Record:
    """The record of one service's deaths."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.num_quick_deaths = 0
        self.restart_at: float | None = None
        """Monotonic time of the next restart, seconds; None: the service runs."""

    def note_death(self, now: float, policy: RestartPolicy) -> None:
        quick = now - self.service.started_at < policy.quick_death_s
        self.num_quick_deaths = self.num_quick_deaths + 1 if quick else 0
        delay_s = policy.first_delay_s * 2 ** max(0, self.num_quick_deaths - 1)
        self.restart_at = now + min(delay_s, policy.max_delay_s)


class Supervisor:
    """Restarts the services of a group when they die.

    Args:
        group: the services, which must run already.
        policy: when to restart a service and when to give up.
        report: receives one line of text per death.
        on_restart: called after a restart, which changes the pids.
    """

    def __init__(
        self,
        group: ServiceGroup,
        *,
        policy: RestartPolicy = RestartPolicy(),
        report: Callable[[str], None] = lambda _: None,
        on_restart: Callable[[], object] = lambda: None,
    ) -> None:
        self._group = group
        self._policy = policy
        self._report = report
        self._on_restart = on_restart
        self._records = [_Record(service) for service in group.services]

    def run(self) -> None:
        """Restart dead services until the group's `stopping` is set.

        Raises:
            UnavailableError: a service kept dying.
        """
        while not self._group.stopping.wait(WATCH_S):
            for record in self._records:
                self._tend(record, time.monotonic())

    def _tend(self, record: _Record, now: float) -> None:
        service = record.service
        if record.restart_at is None:
            if service.exit_code is None:
                return
            record.note_death(now, self._policy)
            if record.num_quick_deaths >= self._policy.max_quick_deaths:
                raise UnavailableError(
                    f"The {service.spec.name} died {record.num_quick_deaths} times in a row; giving up. "
                    f"{service.describe_exit()}",
                    reason="SERVICE_KEEPS_DYING",
                )
            self._report(f"{service.describe_exit().splitlines()[0]} Restarting it.")
        elif now >= record.restart_at:
            service.start()
            record.restart_at = None
            self._on_restart()


@contextmanager
def stop_on_signals(stopping: threading.Event) -> Iterator[None]:
    """Make SIGINT and SIGTERM set the event during the block. Only the main thread can use it."""

    def stop(_signum: int, _frame: FrameType | None) -> None:
        stopping.set()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Take SIGTERM as Ctrl-C during the block. Only the main thread can use it.

    Raises:
        RequestCancelledError: one of the two came.
    """
    # KeyboardInterrupt, for what runs in the block may catch and forget every Exception.
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise RequestCancelledError("The system was stopped while it was starting.") from None
    finally:
        signal.signal(signal.SIGTERM, previous)
