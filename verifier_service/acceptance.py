"""The acceptance rule: a draft token is accepted if and only if it equals the target's own pick.

Because the pick at a position depends on (target, prompt, parameters, seed, position) and on nothing else,
the output is the same whatever the draft was, greedy or sampled (Daliri, Musco, Suresh 2024). This is not
speculative sampling's ratio test, and shared noise would be wrong under that.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum


class FinishReason(Enum):
    """Why a generation ended."""

    STOP_TOKEN = "stop_token"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """What a round commits: the first `num_accepted_tokens` of the draft, then the bonus token."""

    num_accepted_tokens: int
    """Length of the accepted prefix of the draft, bonus excluded."""
    bonus_token_id: int
    """The target's correction or continuation, or the token that ended the generation."""
    finish_reason: FinishReason | None = None


def accept(
    draft_token_ids: Sequence[int],
    target_picks: Sequence[int],
    *,
    stop_token_ids: Collection[int],
    max_tokens: int,
) -> Acceptance:
    """Walk along the draft while it equals the target's picks.

    The token that ends the walk is the bonus: the first pick the draft did not foresee, the pick after the
    whole draft, a stop token, or the last token `max_tokens` allows. A round therefore always commits
    num_accepted_tokens + 1 tokens, all of them the target's picks.

    Args:
        draft_token_ids: K >= 0 tokens.
        target_picks: K + 1 tokens; entry i is the target's pick after the first i draft tokens.
        stop_token_ids: tokens that end the generation.
        max_tokens: tokens the round may commit, at least 1.
    """
    if len(target_picks) != len(draft_token_ids) + 1 or max_tokens < 1:
        raise ValueError("one pick per draft token and one more, and room for a token, are needed")
    for index, pick in enumerate(target_picks):
        if pick in stop_token_ids:
            return Acceptance(index, pick, FinishReason.STOP_TOKEN)
        if index + 1 == max_tokens:
            return Acceptance(index, pick, FinishReason.LENGTH)
        if index == len(draft_token_ids) or draft_token_ids[index] != pick:
            return Acceptance(index, pick)
    raise AssertionError("the last pick ends the walk")
