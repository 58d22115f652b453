"""The scheduler: which items wait for the model, and which of them go into its next step.

The scheduler has neither a thread nor a clock: its caller says what time it is, and calls it from one
thread at a time.

Sessions take turns with the model: each sends its next item when it has the result of the last. A session
that is a millisecond late would miss the others' step, and they would miss its step: two convoys, and twice
the steps. So a step with work at hand waits for sources that should be back soon: where that delays those who
wait by less than it saves those who come, or where a convoy that waits for them in every round is quicker
than two in turn. Two cost what a step costs whoever is in it; one costs the time that they are away.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from specdec.contract.errors import ResourceExhaustedError
from specdec.contract.retry import advice_s
from specdec.contract.step_costs import StepCosts

_LINGER_SHARE = 1 / 8
"""How much later than the last time a source may come back and is still waited for, as a share of the last
step's time."""
_LONGEST_WAIT = 1 / 2
"""The longest wait for a source to save it a single step, as a share of the last step's time."""
_MOST_STEPS = 50.0
"""How many steps the knowledge of their costs goes back."""
_PATIENCE_STEPS = 3
"""How many steps in a row may leave out all background items because urgent ones fill the budget."""


class WorkItem(Protocol):
    """A piece of work for the model."""

    @property
    def num_tokens(self) -> int:
        """Tokens the item adds to a pass."""

    @property
    def is_urgent(self) -> bool:
        """Whether the item goes before background items: a round waits for a prefill chunk under way only."""


class QueuedJob(WorkItem, Protocol):
    """A work item in the queue."""

    @property
    def source(self) -> Hashable:
        """Who sends one item after the other, each with the last one's result at hand; None: nobody does."""

    @property
    def is_cancelled(self) -> bool:
        """Whether nobody wants the result any longer."""


JobT = TypeVar("JobT", bound=QueuedJob)


class Scheduler(Generic[JobT]):
    """Jobs that wait, and the rules by which steps are made of them.

    Args:
        max_batch_tokens: token budget of a step; urgent jobs are taken first. A step takes at least one job.
        max_background_tokens: budget of the background jobs in a step that has urgent ones, which wait for
            all of it; None: the step's own budget.
        max_queued: how many jobs may wait; the next one is refused.
    """

    def __init__(
        self,
        *,
        max_batch_tokens: int = 2048,
        max_background_tokens: int | None = None,
        max_queued: int = 1024,
    ) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_background_tokens = max_background_tokens or max_batch_tokens
        self._max_queued = max_queued
        self._waiting: deque[JobT] = deque()
        self._away_ns: dict[Hashable, int] = {}  # how long each source took to come back with its last item
        self._delivered_ns: dict[Hashable, int] = {}  # of sources that are away: when they got a result
        self._last_round_ns = 0  # what the last step took that had items of sources
        self._step_costs = StepCosts(_MOST_STEPS)
        self._is_settled = False  # whether it is settled whom the next step waits for
        self._expected: set[Hashable] = set()  # those it waits for and that are not back yet
        self._linger_until_ns = 0
        self._last_step_ns = self._ended_ns = 0
        self._num_steps_without_background = 0

    @property
    def num_waiting(self) -> int:
        """Jobs that wait for a step; any thread may read this."""
        return len(self._waiting)

    def add(self, job: JobT, now_ns: int) -> bool:
        """Queue a job. Return whether `take` should be asked again before the time it last said.

        Raises:
            ResourceExhaustedError: too many jobs wait.
        """
        if len(self._waiting) >= self._max_queued:
            raise ResourceExhaustedError(
                f"{self._max_queued} work items wait already; try again later.",
                reason="QUEUE_FULL",
                retry_after_s=self._room_in_s(now_ns),
            )
        if job.source is not None:
            self._away_ns[job.source] = now_ns - self._delivered_ns.pop(job.source, now_ns)
            self._expected.discard(job.source)
        self._waiting.append(job)
        # While others are expected, `take` has no use for a further job that can wait for them.
        return len(self._waiting) == 1 or not self._expected or job.source is None

    def _room_in_s(self, now_ns: int) -> float:
        """Return when the step under way should end, after which jobs leave the queue: it began when the last
        one ended, and should take as long.
        """
        return advice_s((self._last_step_ns - (now_ns - self._ended_ns)) / 1e9)

    def forget(self, source: Hashable) -> None:
        """Expect nothing more of a source."""
        self._away_ns.pop(source, None)
        self._delivered_ns.pop(source, None)
        self._expected.discard(source)

    def take(self, now_ns: int) -> list[JobT]:
        """Remove the jobs of the next step from the queue and return them; none: no step is due yet."""
        live = [job for job in self._waiting if not job.is_cancelled]
        self._settle(live, now_ns)
        batch = self._while_lingering(live) if self._linger_ns(now_ns) else self._choose(live)
        taken = set(map(id, batch))
        self._waiting = deque(job for job in live if id(job) not in taken)
        return batch

    def wait_s(self, now_ns: int) -> float | None:
        """Return how long to wait until a step becomes due without new jobs; None: it never does."""
        return self._linger_ns(now_ns) / 1e9 if self._waiting else None

    def finish(self, batch: Sequence[JobT], started_ns: int, ended_ns: int) -> None:
        """Note that a step has ended, and who is on the way back from now on."""
        self._last_step_ns, self._ended_ns = ended_ns - started_ns, ended_ns
        if any(job.source is not None for job in batch):
            self._last_round_ns = self._last_step_ns
            self._step_costs.add(num_tokens_of(batch), self._last_round_ns)
        for job in batch:
            # A source that was forgotten during the step has no entry, and comes back no more.
            if job.source in self._away_ns and not job.is_cancelled:
                self._delivered_ns[job.source] = ended_ns

    def drain(self) -> list[JobT]:
        """Remove all that waits and return it."""
        drained = list(self._waiting)
        self._waiting.clear()
        return drained

    def _settle(self, live: Sequence[JobT], now_ns: int) -> None:
        """Settle whom the next step waits for, once there is somebody to wait."""
        num_present = sum(job.source is not None for job in live)
        if self._is_settled or not num_present:
            return
        step_ns = self._last_round_ns
        slack_ns = int(_LINGER_SHARE * step_ns)
        due_ns = {source: since + self._away_ns[source] for source, since in self._delivered_ns.items()}
        coming = sorted(
            (source for source, due in due_ns.items() if due + slack_ns > now_ns),
            key=due_ns.__getitem__,
        )
        waits_ns = [max(0, due_ns[source] - now_ns) for source in coming]
        soon_ns = [wait for wait in waits_ns if wait <= _LONGEST_WAIT * step_ns]
        fixed_ns = self._step_costs.fixed
        num_in_convoy = max(
            (place for place, each in enumerate(coming, start=1) if self._away_ns[each] < fixed_ns), default=0
        )
        num_awaited = max(num_in_convoy, _best_wait(soon_ns, num_present, step_ns))
        awaited = coming[:num_awaited]
        self._expected = set(awaited)
        self._linger_until_ns = max(map(due_ns.__getitem__, awaited), default=0) + slack_ns
        self._is_settled = True

    def _linger_ns(self, now_ns: int) -> int:
        """Return how long the next step still waits for the sources that are expected."""
        return max(0, self._linger_until_ns - now_ns) if self._expected else 0

    def _while_lingering(self, live: Sequence[JobT]) -> list[JobT]:
        """Jobs without a source wait for nobody."""
        sourceless = [job for job in live if job.source is None]
        return _fitting(sourceless, self._max_batch_tokens, at_least_one=True)

    def _choose(self, live: Sequence[JobT]) -> list[JobT]:
        """Compose the next step: urgent jobs, then background ones, each kind first come, first served."""
        self._expected.clear()
        self._is_settled = False
        urgent = [job for job in live if job.is_urgent]
        background = [job for job in live if not job.is_urgent]
        batch: list[JobT] = []
        if background and self._num_steps_without_background >= _PATIENCE_STEPS:
            batch.append(background.pop(0))
        num_left = self._max_batch_tokens - num_tokens_of(batch)
        num_left_in_background = self._max_background_tokens - num_tokens_of(batch) if urgent else num_left
        rounds = _fitting(urgent, num_left, at_least_one=not batch)
        num_left = min(num_left - num_tokens_of(rounds), num_left_in_background)
        batch += rounds
        batch += _fitting(background, num_left, at_least_one=not batch)
        starves = background and all(job.is_urgent for job in batch)
        self._num_steps_without_background = self._num_steps_without_background + 1 if starves else 0
        return batch


def _best_wait(waits_ns: Sequence[int], num_present: int, step_ns: int) -> int:
    """Return how many of those who come the step should wait for, so that all together are delayed least.

    Args:
        waits_ns: how long it is until each comes, ascending.
        num_present: how many wait already.
        step_ns: what the step will take; who misses it waits for its end.
    """

    def delay_ns(num_awaited: int) -> int:
        wait = waits_ns[num_awaited - 1] if num_awaited else 0
        waiting = num_present * wait + sum(wait - each for each in waits_ns[:num_awaited])
        return waiting + sum(max(0, wait + step_ns - each) for each in waits_ns[num_awaited:])

    return min(range(len(waits_ns) + 1), key=delay_ns)


def num_tokens_of(items: Sequence[WorkItem]) -> int:
    """Return the number of tokens of all items."""
    return sum(item.num_tokens for item in items)


def _fitting(waiting: Sequence[JobT], num_tokens: int, *, at_least_one: bool = False) -> list[JobT]:
    """Return the first jobs, as many as fit into a number of tokens."""
    batch: list[JobT] = []
    for job in waiting:
        num_tokens -= job.num_tokens
        if num_tokens < 0 and (batch or not at_least_one):
            break
        batch.append(job)
    return batch
