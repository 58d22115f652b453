"""A small discrete-event simulation: a clock, processors that share their time, and engines with the queue
that the services' own engines have.

A task is a generator that yields what it waits for, as in

    yield clock.wait(3.0)
    yield engine.run(job)

so that it reads like the code that it stands for.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field

from specdec.runtime.scheduler import Scheduler

Resume = Callable[[], None]
Wait = Callable[[Resume], None]
"""Something that a task waits for: it gets what to call once that has happened."""
Task = Generator[Wait, None, None]

_NS_PER_MS = 1e6
_LEAST_MS = 1e-6
"""How much later than due an engine looks at its queue again, milliseconds: the queue counts nanoseconds."""


class Clock:
    """Simulated time, which moves from one event to the next."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self._events: list[tuple[float, int, Resume]] = []
        self._num_events = 0

    def at(self, time_ms: float, call: Resume) -> None:
        """Call something at a time; calls of the same time come in the order in which they were asked for."""
        self._num_events += 1
        heapq.heappush(self._events, (time_ms, self._num_events, call))

    def wait(self, duration_ms: float) -> Wait:
        """Return the wait of a duration."""
        return lambda resume: self.at(self.now_ms + duration_ms, resume)

    def start(self, task: Task) -> Event:
        """Start a task. Return the event of its end."""
        ended = Event()

        def step() -> None:
            wait = next(task, None)
            if wait is None:
                ended.happen()
            else:
                wait(step)

        step()
        return ended

    def run(self) -> None:
        """Run until nothing more happens."""
        while self._events:
            self.now_ms, _, call = heapq.heappop(self._events)
            call()


class Event:
    """Something that happens once, before or after a task waits for it."""

    def __init__(self) -> None:
        self._has_happened = False
        self._waiting: list[Resume] = []

    def wait(self, resume: Resume) -> None:
        """Go on when it has happened."""
        if self._has_happened:
            resume()
        else:
            self._waiting.append(resume)

    def happen(self) -> None:
        """Let those go on who wait."""
        self._has_happened = True
        for resume in self._waiting:
            resume()


class Processor:
    """Something whose time is shared in equal parts by what runs on it: cores, a device, a network link."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._running: list[_Work] = []
        self._since_ms = 0.0
        self._plan = 0
        self.busy_ms = 0.0
        """Time in which something ran."""

    def run(self, alone_ms: float) -> Wait:
        """Return the wait for work that takes so long where nothing else runs."""
        return lambda resume: self._add(_Work(alone_ms, resume))

    def _add(self, work: _Work) -> None:
        self._progress()
        self._running.append(work)
        self._replan()

    def _progress(self) -> None:
        """Take off what was done since the last time that something began or ended."""
        elapsed_ms = self._clock.now_ms - self._since_ms
        self._since_ms = self._clock.now_ms
        for work in self._running:
            work.left_ms -= elapsed_ms / len(self._running)
        self.busy_ms += elapsed_ms if self._running else 0.0

    def _replan(self) -> None:
        self._plan += 1
        plan = self._plan
        if self._running:
            first = min(self._running, key=lambda work: work.left_ms)
            due_ms = self._clock.now_ms + max(0.0, first.left_ms) * len(self._running)
            self._clock.at(due_ms, lambda: self._end(first, plan))

    def _end(self, work: _Work, plan: int) -> None:
        if plan != self._plan:
            return  # something else began meanwhile, and this ends later
        self._progress()
        self._running.remove(work)
        self._replan()
        work.resume()


@dataclass(slots=True, eq=False)
class _Work:
    left_ms: float
    resume: Resume


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """An item of work for an engine."""

    num_tokens: int
    """Tokens that it adds to a step."""
    source: Hashable
    """Who sends one job after the other."""
    is_urgent: bool = True
    """Whether it goes before jobs that are not."""
    done: Event = field(default_factory=Event)
    """The end of its step."""

    @property
    def is_cancelled(self) -> bool:
        """Nobody cancels anything here."""
        return False


class Engine:
    """A service's engine: jobs go together into steps as the services' own scheduler has it.

    Args:
        step_ms: what a step with these jobs takes where nothing else runs on the processor.
    """

    def __init__(
        self,
        clock: Clock,
        processor: Processor,
        step_ms: Callable[[Sequence[Job]], float],
        max_background_tokens: int | None = None,
    ) -> None:
        self._clock = clock
        self._processor = processor
        self._step_ms = step_ms
        self._scheduler: Scheduler[Job] = Scheduler(
            max_background_tokens=max_background_tokens, max_queued=1_000_000
        )
        self._is_busy = False
        self.busy_ms = 0.0
        """Time in which a step ran."""

    def run(self, job: Job) -> Wait:
        """Return the wait until a job's step has ended."""

        def submit(resume: Resume) -> None:
            job.done.wait(resume)
            self._scheduler.add(job, self._now_ns)
            self._look()

        return submit

    def forget(self, source: Hashable) -> None:
        """Expect nothing more of a source."""
        self._scheduler.forget(source)

    @property
    def _now_ns(self) -> int:
        return round(self._clock.now_ms * _NS_PER_MS)

    def _look(self) -> None:
        """Begin a step if one is due."""
        if self._is_busy:
            return
        batch = self._scheduler.take(self._now_ns)
        if batch:
            self._is_busy = True
            self._clock.start(self._step(batch))
        elif wait_s := self._scheduler.wait_s(self._now_ns):
            self._clock.at(self._clock.now_ms + wait_s * 1000 + _LEAST_MS, self._look)

    def _step(self, batch: Sequence[Job]) -> Task:
        started_ns, started_ms = self._now_ns, self._clock.now_ms
        yield self._processor.run(self._step_ms(batch))
        self.busy_ms += self._clock.now_ms - started_ms
        self._scheduler.finish(batch, started_ns, self._now_ns)
        for job in batch:
            job.done.happen()
        self._is_busy = False
        self._look()
