"""How many drafts of held-out answers a greedy target accepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeldOutAcceptance:
    """Greedy acceptance over answers, round by round as they would be generated."""

    num_answers: int
    num_rounds: int
    num_accepted: int
    per_position: tuple[float, ...]
    """Share of the rounds in which the draft's first, second... token was accepted."""

    @property
    def draft_depth(self) -> int:
        """K of the rounds."""
        return len(self.per_position)

    @property
    def length(self) -> float:
        """Tokens that a round emits on average, the target's own included."""
        return 1.0 + self.num_accepted / max(self.num_rounds, 1)

    @classmethod
    def of(cls, accepted: Sequence[Sequence[int]], draft_depth: int) -> HeldOutAcceptance:
        """Walk the anchors of each answer: a round ends `accepted` + 1 tokens further on.

        Args:
            accepted: for each answer, the number of accepted drafts from each of its tokens but the last.
        """
        rounds = [count for counts in accepted for count in _walk(counts)]
        shares = [
            sum(count > index for count in rounds) / max(len(rounds), 1) for index in range(draft_depth)
        ]
        return cls(len(accepted), len(rounds), sum(rounds), tuple(shares))


def _walk(counts: Sequence[int]) -> list[int]:
    rounds, anchor = [], 0
    while anchor < len(counts):
        rounds.append(counts[anchor])
        anchor += counts[anchor] + 1
    return rounds
