"""What is remembered of each drafter over all sessions: one that is never right is left alone for a while.

A draft is right if it offers the token that the target picks next. Unlike sizes, which are chosen by method
and cost, this is about one drafter: as a part of a merged method it would hide behind the others' drafts. It
is about one replica of it as well: weights may be broken in one place, and whole in the others.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

logger = logging.getLogger(__name__)

NEVER_RIGHT = "never_right"
"""Code of the reason that a drafter is not asked because it is never right."""
_VERDICT = (
    "its drafts are hardly ever right, so it only costs time; see that its weights are whole and were made "
    "for this target"
)
_MEMORY = 0.995
"""What a draft's weight becomes with the next one."""
_DRAFTS_TO_JUDGE = 30.0
"""Weight of the drafts that it takes to find a drafter useless; one that is right once in ten drafts, which
may still be worth its time, fails that many in a row once in 25 times."""
_DRAFTS_TO_TRY = 8.0
"""Weight of those that it takes after a pause."""
_LEAST_RIGHT = 0.01
"""Share of drafts that are right, below which a drafter is useless: what was right before counts, so that a
text which nobody can guess does not condemn a good drafter."""
_LAST_PAUSE_S = 600.0


class TrackRecord:
    """How often a replica of a drafter was right lately, and until when it is left alone because it was not.

    Args:
        drafter: name of the drafter in the log.
        uri: address of the replica in the log.
        pause_s: how long it is left alone at first; while it stays wrong the pause doubles, up to ten
            minutes.
        now_s: the clock.
    """

    def __init__(
        self,
        drafter: str = "",
        uri: str = "",
        *,
        pause_s: float = 30.0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._in_log = {"drafter": drafter, "uri": uri}
        self._first_pause_s = self._pause_s = pause_s
        self._now_s = now_s
        self._num_tried = 0.0
        self._num_right = 0.0
        self._paused_until_s = 0.0
        self.verdict = ""
        """What is wrong with the drafter; empty: it is right now and then, or nobody knows yet."""

    @property
    def is_paused(self) -> bool:
        """Whether the drafter is not worth asking now."""
        return bool(self.verdict) and self._now_s() < self._paused_until_s

    def judge(self, *, is_right: bool) -> None:
        """Take in whether a draft was right."""
        if is_right and self.verdict:
            logger.info("a drafter is right again", extra=self._in_log)
            self._num_tried, self.verdict, self._pause_s = 0.0, "", self._first_pause_s
        self._num_tried = _MEMORY * self._num_tried + 1
        self._num_right = _MEMORY * self._num_right + is_right
        is_useless = self._num_right < _LEAST_RIGHT * self._num_tried
        if is_useless and self._num_tried >= _DRAFTS_TO_JUDGE and not self.is_paused:
            self._give_up()

    def _give_up(self) -> None:
        if not self.verdict:
            logger.warning("a drafter is never right and is left alone for a while", extra=self._in_log)
        self.verdict = _VERDICT
        self._paused_until_s = self._now_s() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)
        self._num_tried, self._num_right = _DRAFTS_TO_JUDGE - _DRAFTS_TO_TRY, 0.0


class DrafterRecords:
    """The records of a drafter's replicas, as one request meets them.

    Args:
        of_replicas: returns the records of the replicas that may draft for the request now.
    """

    def __init__(self, of_replicas: Callable[[], Sequence[TrackRecord]] = lambda: ()) -> None:
        self._of_replicas = of_replicas
        self.used: TrackRecord | None = None
        """Record of the replica that drafted last for the request; None: nobody did."""

    @property
    def is_paused(self) -> bool:
        """Whether there are replicas, and none of them is worth asking now."""
        records = self._of_replicas()
        return bool(records) and all(record.is_paused for record in records)

    @property
    def verdict(self) -> str:
        """What is wrong with the drafter on all its replicas, or where it drafted last; empty: nothing is."""
        records = self._of_replicas()
        if records and all(record.verdict for record in records):
            return records[0].verdict
        return self.used.verdict if self.used else ""
