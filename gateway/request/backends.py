"""What a gateway works with, and which methods that gives it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from gateway.config import GatewayConfig
from gateway.metrics import OTHER, GatewayMetrics
from gateway.replicas.services import DrafterSet, VerifierSet
from gateway.request.answer_times import AnswerTimes
from gateway.request.text import TextCodec
from gateway.rounds.controller import Controller
from specdec.contract.methods import AUTO, LOOKUP_FAMILIES, PLAIN, drafters_of, method_of
from specdec.v1 import drafter_pb2


@dataclass(frozen=True, slots=True)
class Backends:
    """What a gateway works with."""

    config: GatewayConfig
    codec: TextCodec
    verifiers: VerifierSet
    drafters: DrafterSet
    metrics: GatewayMetrics
    controller: Controller = field(default_factory=Controller)
    answer_times: AnswerTimes = field(default_factory=AnswerTimes)
    long_texts: asyncio.Lock = field(default_factory=asyncio.Lock)
    """A lock held while a long text is tokenised: one text at a time, for the memory it takes."""

    @property
    def known_drafters(self) -> dict[str, drafter_pb2.DrafterInfo]:
        """Drafters by name, in the order of their services."""
        return {drafter.name: drafter for info in self.drafters.known_infos for drafter in info.drafters}

    @property
    def methods(self) -> list[str]:
        """What a request's `method` may be."""
        drafters = sorted(self.known_drafters)
        return [PLAIN, *([AUTO] if drafters else []), *drafters]

    @property
    def default_method(self) -> str:
        """Method of requests that do not name a method."""
        method = self.config.default_method
        return method if self.offers(method) or not self.drafters.is_known else PLAIN

    @property
    def best_guess(self) -> str:
        """The method that should guess best, as far as families tell: what AUTO is where sizes are fixed."""
        # What knows most of the target guesses best; what only looks up errs elsewhere and costs nothing.
        computing, looking_up = self._fitting_drafters()
        return method_of([*computing[:1], *looking_up[:1]])

    @property
    def candidates(self) -> list[str]:
        """The methods that AUTO chooses from, those first that are to be tried first."""
        computing, looking_up = self._fitting_drafters()
        merged = [method_of([drafter, looking_up[0]]) for drafter in computing if looking_up]
        return [*looking_up, *computing, *merged]

    def _fitting_drafters(self) -> tuple[list[str], list[str]]:
        """Return the drafters that have the target's vocabulary: those that compute, and those that look up,
        the better guessers first.
        """
        drafters = [drafter for drafter in self.known_drafters.values() if self._speaks_its_tokens(drafter)]
        computing = [drafter for drafter in drafters if drafter.family not in LOOKUP_FAMILIES]
        looking_up = [
            drafter for family in LOOKUP_FAMILIES for drafter in drafters if drafter.family == family
        ]
        return [each.name for each in sorted(computing, key=_ignorance)], [each.name for each in looking_up]

    def _speaks_its_tokens(self, drafter: drafter_pb2.DrafterInfo) -> bool:
        """Return whether a drafter has the target's vocabulary or does not have a vocabulary of its own."""
        own = drafter.model.vocabulary_fingerprint
        return not own or own == self.codec.vocabulary_fingerprint

    def offers(self, method: str) -> bool:
        """Return whether a request may name that method, which may be of several drafters."""
        return method == AUTO or set(drafters_of(method)) <= self.known_drafters.keys()

    def label(self, method: str) -> str:
        """Return a method as a label of metrics. The order of a merged method's drafters does not matter. A
        method that a client may have invented, as no drafter service was reached yet, is OTHER.
        """
        if method != self.default_method and not self.offers(method):
            return OTHER
        return method_of(sorted(drafters_of(method)))


def _ignorance(drafter: drafter_pb2.DrafterInfo) -> int:
    """Rank of a drafter by what it drafts from: the target's state, a model of its own, the text alone."""
    if drafter.HasField("target_state_spec"):
        return 0
    return 1 if drafter.model.model_id else 2
