"""What a gateway knows of its verifiers, methods and drafters, over all sessions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol
from weakref import WeakKeyDictionary

from gateway.rounds.choice import AdaptiveChoice
from gateway.rounds.costs import MethodStats, VerifierLoad
from gateway.rounds.option import Candidate, Method
from gateway.rounds.records import TrackRecord
from gateway.rounds.vocabulary import DraftSize, Round, SizeControl


@dataclass(frozen=True, slots=True)
class FixedSize:
    """Drafts what the request asked for, in every round."""

    size: DraftSize
    first_method: str = field(default="", init=False)
    """All drafters of the request are opened at its start."""

    def follow(self, is_open: Callable[[str], bool]) -> None:
        """Whatever is open is asked."""

    def choose(self, limit: int) -> DraftSize:
        """Return the size, cut to `limit`."""
        return replace(self.size, draft_depth=min(self.size.draft_depth, limit))

    def observe(self, size: DraftSize, completed: Round) -> None:
        """Learn nothing: the size is fixed."""

    def goes_on_at(self, verifier: object) -> None:
        """The size is the same anywhere."""

    def close(self) -> None:
        """There is nothing to end."""


class Addressed(Protocol):
    """A replica; any object that lives as long as the replica does."""

    @property
    def uri(self) -> str:
        """Its address."""


class Controller:
    """Makes the control of each session."""

    def __init__(self) -> None:
        self._loads: WeakKeyDictionary[object, dict[bool, VerifierLoad]] = WeakKeyDictionary()
        """By verifier, and by whether sessions are greedy: picks that are sampled take time themselves."""
        self._methods: dict[tuple[str, bool], Method] = {}
        """By name, and likewise: sampled tokens are guessed less often."""
        self._records: WeakKeyDictionary[object, dict[str, TrackRecord]] = WeakKeyDictionary()

    def record(self, drafter: str, replica: Addressed) -> TrackRecord:
        """Return how often a drafter was right on a replica that has it, over all sessions."""
        records = self._records.setdefault(replica, {})
        return records.setdefault(drafter, TrackRecord(drafter, replica.uri))

    def session(
        self, verifier: object, candidates: Sequence[Candidate], *, is_greedy: bool = True
    ) -> SizeControl:
        """Return the control of one generation, which is to be closed at its end.

        Args:
            verifier: the replica it runs on; any object that lives as long as the replica does.
            candidates: methods to choose from round by round, all of which the gateway offers. Plain
                decoding is always another.
            is_greedy: whether its tokens are the most probable ones.
        """
        methods = []
        for candidate in candidates:
            methods.append(known := self._methods.setdefault((candidate.method, is_greedy), Method()))
            for budget in candidate.budgets:
                known.stats.setdefault(budget, MethodStats.of(budget))
        return AdaptiveChoice(partial(self._load, is_greedy), verifier, candidates, methods)

    def _load(self, is_greedy: bool, verifier: object) -> VerifierLoad:
        return self._loads.setdefault(verifier, {}).setdefault(is_greedy, VerifierLoad())
