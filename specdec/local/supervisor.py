"""Keeps a group of services running: restarts what dies, stops in order on a signal."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from specdec.contract.errors import UnavailableError
from specdec.local.processes import Service, ServiceGroup

WATCH_S = 0.2
"""Seconds between two looks at the processes."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """When a service that died is started again."""

    first_delay_s: float = 0.5
    """Wait before the first restart; doubles with every quick death."""
    max_delay_s: float = 10.0
    """Longest wait."""
    quick_death_s: float = 60.0
    """A service that lived shorter died quickly; one that lived longer starts with a clean record."""
    max_quick_deaths: int = 5
    """Quick deaths in a row after which the supervisor gives up."""


DEFAULT_POLICY = RestartPolicy()
"""What `specdec up` does."""


class _Record:
    """The deaths of one service."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.num_quick_deaths = 0
        self.restart_at: float | None = None
        """Monotonic time of the next start, seconds; None: the service runs."""

    def note_death(self, now: float, policy: RestartPolicy) -> None:
        quick = now - self.service.started_at < policy.quick_death_s
        self.num_quick_deaths = self.num_quick_deaths + 1 if quick else 0
        delay_s = policy.first_delay_s * 2 ** max(0, self.num_quick_deaths - 1)
        self.restart_at = now + min(delay_s, policy.max_delay_s)


class Supervisor:
    """Restarts the services of a group as they die.

    Args:
        group: the services, started.
        policy: when to restart and when to give up.
        report: called with one line per death and restart.
        on_restart: called after a restart, when the pids have changed.
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
        """Watch until the group's `stopping` is set.

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
    """Within the block SIGINT and SIGTERM set the event; works in the main thread only."""

    def stop(_signum: int, _frame: FrameType | None) -> None:
        stopping.set()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
