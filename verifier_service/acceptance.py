"""The acceptance rule: a draft token is accepted if and only if it equals the target's own pick.

Because the pick at a position depends on (target, prompt, parameters, seed, position) and on nothing else,
the output is the same whatever the draft was, chain or tree, greedy or sampled (Daliri, Musco, Suresh 2024).
This rule is not the ratio test of speculative sampling, under which shared noise would be wrong.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import Enum

from specdec.contract.draft_tree import ANCHOR, DraftTree


class FinishReason(Enum):
    """The reason why a generation ended."""

    STOP_TOKEN = "stop_token"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class DraftAcceptance:
    """The tokens that a round commits: those of the accepted path, then the bonus token."""

    path: tuple[int, ...]
    """Indices of the accepted draft tokens, from a child of the anchor on; in a chain, the first indices."""
    bonus_token_id: int
    """The target's correction or continuation, or the token that ended the generation."""
    finish_reason: FinishReason | None = None

    @property
    def num_accepted_tokens(self) -> int:
        """The length of the accepted path, bonus token excluded."""
        return len(self.path)


def accept(
    draft: DraftTree,
    target_picks: Sequence[int],
    *,
    stop_token_ids: Collection[int],
    max_tokens: int,
    unknown_nodes: Collection[int] = (),
) -> DraftAcceptance:
    """Walk from the anchor to the child that equals the target's pick, until no child does.

    The pick that ends the walk is the bonus token: a pick that the draft did not foresee, the pick after a
    whole path, a stop token, or the last token that `max_tokens` allows. A round therefore always commits
    num_accepted_tokens + 1 tokens, and all of them are the target's picks.

    Args:
        draft: zero or more tokens.
        target_picks: one token more than the draft has. Entry 0 is the target's pick after the anchor, entry
            i + 1 its pick after the draft's token i.
        stop_token_ids: tokens that end the generation.
        max_tokens: number of tokens that the round may commit, at least 1.
        unknown_nodes: nodes after which the target has no pick. One of them can be the bonus token only.

    Raises:
        ValueError: the number of picks is wrong, or `max_tokens` is less than 1.
    """
    if len(target_picks) != len(draft) + 1 or max_tokens < 1:
        raise ValueError(
            f"{len(target_picks)} picks for {len(draft)} draft tokens, max_tokens {max_tokens}; "
            "pass one pick per draft token and one more, and max_tokens of at least 1"
        )
    nodes = zip(draft.parents, draft.token_ids, strict=True)
    children = {node: index for index, node in enumerate(nodes) if index not in unknown_nodes}
    path: list[int] = []
    while True:
        node = path[-1] if path else ANCHOR
        pick = target_picks[node + 1]
        if pick in stop_token_ids:
            return DraftAcceptance(tuple(path), pick, FinishReason.STOP_TOKEN)
        if len(path) + 1 == max_tokens:
            return DraftAcceptance(tuple(path), pick, FinishReason.LENGTH)
        if (node, pick) not in children:
            return DraftAcceptance(tuple(path), pick)
        path.append(children[node, pick])
