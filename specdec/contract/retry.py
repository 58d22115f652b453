"""When to try again, told to those who find no room: once enough of what runs should have ended."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

SOONEST_S, LATEST_S = 1.0, 60.0
"""Bounds of the advice, seconds. Answers often end before their last possible token, and cancelled ones at
any time, so that nobody should wait for longer."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far something that takes room has come."""

    begun_at: float
    """Monotonic time of its begin, seconds."""
    num_done: int
    """Tokens it has made since."""
    num_left: int
    """Most tokens it may still make."""
    room: int = 1
    """What is free once it has ended."""

    def remaining_s(self, now: float) -> float:
        """Return the seconds until its last token at its speed so far; infinite while it has made none."""
        if not self.num_left:
            return 0.0
        return (now - self.begun_at) / self.num_done * self.num_left if self.num_done else math.inf


def retry_after_s(running: Iterable[Progress], wanted: int = 1) -> float:
    """Return after how many whole seconds there should be room, from 1 to 60; 1 while nothing is known.

    Args:
        running: all that takes room.
        wanted: how much room is missing.
    """
    now = time.monotonic()
    ends = sorted((progress.remaining_s(now), progress.room) for progress in running)
    if not any(math.isfinite(seconds) for seconds, _ in ends):
        return SOONEST_S
    for seconds, room in ends:
        wanted -= room
        if wanted <= 0:
            return advice_s(seconds)
    return LATEST_S


def advice_s(seconds: float) -> float:
    """Return a time as advice: whole seconds, within the bounds."""
    return max(SOONEST_S, float(math.ceil(min(seconds, LATEST_S))))
