"""N-grams of what the target usually says and of the text itself. Drafts need no model pass.

A table of the target's own answers (`table`) and prompt lookup in the tokens committed so far together say
how likely each continuation is; drafts are the likeliest paths. llama.cpp's lookup decoding calls the two its
static and its dynamic cache.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from heapq import nlargest

from drafter_service.drafters.base import OpenDraft
from drafter_service.drafters.growing import MAX_CHILDREN, Candidates, GrowingTree
from drafter_service.drafters.ngram.drafter import NgramDrafter, NgramSession
from drafter_service.drafters.ngram.memory import AnswerMemory
from drafter_service.drafters.ngram_lm.table import NgramTable
from specdec.contract.draft_tree import DraftTree
from specdec.contract.token_noise import gumbel

_LEAST_PROBABILITY = 0.03
"""Least probability of a path: verifying a less likely one costs more than it gains."""
_DOUBT = 0.75
"""Probability that another token follows now than followed the same single token before; after a match of n
tokens it is an n-th of that, as fitted on answers that were not counted."""
_MAX_OCCURRENCES = 32
"""Most earlier occurrences that are considered."""
_EARLIER_WEIGHT = 0.7
"""Weight of an occurrence, relative to the weight of the next later occurrence."""
_LONGER_WEIGHT = 1.5
"""Factor of an occurrence's weight for each further token that matches."""
_MEAN_NOISE = 0.5772
"""Mean of standard Gumbel noise: Euler's constant."""


class NgramLmSession(NgramSession):
    """Committed tokens, and what may follow them or a draft of them."""

    def __init__(self, request: OpenDraft, sizes: range, memory: AnswerMemory, table: NgramTable) -> None:
        super().__init__(request, sizes, memory)
        self._table = table
        self.reach = max(self.reach, table.max_size)

    def propose(self, draft_depth: int) -> list[int]:
        """Draft the likeliest token, then the likeliest after it, until the whole path is unlikely."""
        self.index()
        least = math.log(max(_LEAST_PROBABILITY, self.min_path_confidence))
        confidence = math.log(self.min_draft_confidence) if self.min_draft_confidence else -math.inf
        draft: list[int] = []
        log_prob = 0.0
        while len(draft) < draft_depth and (candidates := self.candidates(draft)):
            own, token_id = candidates[0]
            log_prob += own
            if draft and (log_prob < least or own < confidence):
                break
            draft.append(token_id)
        return draft

    def propose_tree(self, draft_depth: int, draft_nodes: int) -> DraftTree:
        """Draft the likeliest paths of all."""
        self.index()
        tree = GrowingTree(
            max_depth=draft_depth,
            draft_nodes=draft_nodes,
            min_confidence=self.min_draft_confidence,
            min_path_confidence=max(_LEAST_PROBABILITY, self.min_path_confidence),
        )
        return tree.best_paths(self.candidates)

    def candidates(self, path: Sequence[int]) -> Candidates:
        """Return what may follow a path after the committed tokens, which must be indexed.

        Above temperature 0 the order is that of the shared noise, by which the target picks.
        """
        recent = self.recent(path)
        probabilities = self._mixed(self._table.candidates(recent), recent)
        if not self.sampling.is_greedy:
            return self._as_picked(probabilities, len(self.token_ids) + len(path))
        best = nlargest(MAX_CHILDREN, ((value, token_id) for token_id, value in probabilities.items()))
        return [(math.log(value), token_id) for value, token_id in best if value]

    def _mixed(self, usual: dict[int, float], recent: Sequence[int]) -> dict[int, float]:
        """Mix the table's probabilities with those of the longest match, by the match's length."""
        for size in reversed(self.sizes):
            matches = self.matches(recent, size, _MAX_OCCURRENCES)
            if not matches:
                continue
            # An earlier answer counts only where the text itself says nothing.
            matches = [match for match in matches if match.is_own] or matches
            longest = max(match.length for match in matches)
            doubt = _DOUBT / longest
            mixed = defaultdict(float, {token_id: doubt * value for token_id, value in usual.items()})
            weights = [
                _EARLIER_WEIGHT**age * _LONGER_WEIGHT ** (match.length - longest)
                for age, match in enumerate(matches)
            ]
            total = sum(weights)
            for match, weight in zip(matches, weights, strict=True):
                mixed[match.token_ids[match.start]] += (1 - doubt) * weight / total
            return mixed
        return usual

    def _as_picked(self, probabilities: dict[int, float], position: int) -> Candidates:
        """Order candidates by log probability / temperature + gumbel(seed, position)."""
        known = {token_id: value for token_id, value in probabilities.items() if value}
        noise = gumbel(self.sampling.noise_seed, position, list(known)).tolist()
        scores = {
            token_id: math.log(value) / self.sampling.temperature + perturbation
            for (token_id, value), perturbation in zip(known.items(), noise, strict=True)
        }
        total = _log_sum([*scores.values(), *self._others(sum(known.values()))])
        found = nlargest(MAX_CHILDREN, ((score, token_id) for token_id, score in scores.items()))
        return [(score - total, token_id) for score, token_id in found]

    def _others(self, known: float) -> list[float]:
        """Return the score of all unlisted tokens together, as of one token with their probability."""
        left = 1.0 - known
        return [math.log(left) / self.sampling.temperature + _MEAN_NOISE] if left > 0 else []


def _log_sum(scores: Sequence[float]) -> float:
    """Return the logarithm of the sum of the exponentials."""
    best = max(scores, default=0.0)
    return best + math.log(sum(math.exp(score - best) for score in scores)) if scores else best


class NgramLmDrafter(NgramDrafter):
    """Drafts from a table, and from n-grams of the text itself, of `min_size` to `max_size` tokens."""

    def __init__(
        self,
        name: str,
        table: NgramTable,
        *,
        min_size: int,
        max_size: int,
        max_draft_depth: int,
        max_draft_nodes: int = 64,
        memory_tokens: int = 0,
    ) -> None:
        super().__init__(
            name,
            min_size=min_size,
            max_size=max_size,
            max_draft_depth=max_draft_depth,
            max_draft_nodes=max_draft_nodes,
            memory_tokens=memory_tokens,
        )
        self._table = table
        self.traits = replace(
            self.traits,
            family="ngram-lm",
            model_id=table.vocabulary.model_id,
            vocabulary_fingerprint=table.vocabulary.fingerprint,
            vocab_size=table.vocabulary.size,
        )

    def open(self, request: OpenDraft) -> NgramLmSession:
        """Open a session with an empty index; the first round fills it."""
        return NgramLmSession(request, self._sizes, self.memory, self._table)
