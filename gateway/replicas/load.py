"""How busy a replica is, as far as a gateway knows."""

from __future__ import annotations

import math
import time

from specdec.contract.load import Load


class ReplicaLoad:
    """What a replica said of its load last, and the sessions that this gateway opened and ended since.

    A replica counts the sessions of all gateways, so that each gateway sees the others'. It says so with
    every answer of a session. A session counts beside that until its first answer, which includes it: many
    requests may come between two answers, and must not all take the same replica.
    """

    def __init__(self) -> None:
        self.num_sessions = 0
        """Sessions of this gateway."""
        self._num_opening = 0
        """Those among them whose first answer is not there yet."""
        self._num_ended = 0
        """Sessions that ended since the replica last spoke."""
        self._said = Load()
        self._said_at = -math.inf

    def begin(self) -> None:
        """Count a session that is being opened."""
        self.num_sessions += 1
        self._num_opening += 1

    def opened(self) -> None:
        """Take note that the replica counts a session from now on."""
        self._num_opening -= 1

    def end(self, *, was_opened: bool) -> None:
        """Count a session no longer."""
        self.num_sessions -= 1
        if was_opened:
            self._num_ended += 1
        else:
            self._num_opening -= 1

    def told(self, load: Load) -> None:
        """Take in what the replica says."""
        self._said, self._num_ended, self._said_at = load, 0, time.monotonic()

    @property
    def age_s(self) -> float:
        """How long ago the replica last spoke, seconds; infinite before it ever did."""
        return time.monotonic() - self._said_at

    @property
    def num_taken(self) -> float:
        """The session slots that are taken, see Load; never less than this gateway's own sessions."""
        return max(self._num_said, self.num_sessions - self._num_opening) + self._num_opening

    @property
    def _num_said(self) -> float:
        """What is left of the slots that the replica said are taken. A session that ended since is taken to
        have had as much room as any other.
        """
        said = self._said
        num_left = max(0, said.num_sessions - self._num_ended)
        return said.num_taken * num_left / said.num_sessions if said.num_sessions else said.num_taken

    @property
    def is_full(self) -> bool:
        """Whether another session would find no room."""
        return 0 < self._said.max_sessions <= self.num_taken

    @property
    def busyness(self) -> float:
        """What replicas are compared by: the slots that are taken, and the work that waits for the model."""
        return self.num_taken + self._said.num_waiting
