"""Several drafters for one request: what they propose becomes one tree."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.decode import Draft, DraftSource, Proposal, StateHandle
from specdec.draft_tree import merge


@dataclass(frozen=True, slots=True)
class NamedSource:
    """One drafter among several."""

    drafter: str
    source: DraftSource
    num_draft_tokens: int
    """Most tokens it drafts in a row."""


class MergedDrafts:
    """Asks several drafters at once and merges what they propose.

    They err in different places: what one misses another may have. Each may be late, lost or wrong on its
    own; the round's draft is what the others propose.

    Args:
        max_num_nodes: most tokens of the merged tree, where a round names no budget.
    """

    def __init__(self, sources: Sequence[NamedSource], max_num_nodes: int) -> None:
        self._sources = sources
        self._max_num_nodes = max_num_nodes

    async def propose(
        self,
        committed_token_ids: Sequence[int],
        num_draft_tokens: int,
        traceparent: str,
        target_state: StateHandle | None = None,
        num_draft_nodes: int = 0,
    ) -> Draft:
        """A tree of everyone's proposals, or an empty draft that says why there are none.

        With a budget of nodes each may propose a tree as large as the merged one, without one a chain.
        """
        started_ns = time.monotonic_ns()
        drafts = await asyncio.gather(
            *(
                one.source.propose(
                    committed_token_ids,
                    min(num_draft_tokens, one.num_draft_tokens),
                    traceparent,
                    target_state,
                    num_draft_nodes,
                )
                for one in self._sources
            )
        )
        elapsed_ns = time.monotonic_ns() - started_ns
        tree, nodes = merge([draft.tree for draft in drafts], num_draft_nodes or self._max_num_nodes)
        proposals = tuple(
            Proposal(one.drafter, frozenset(mine), draft.fallback_reason)
            for one, draft, mine in zip(self._sources, drafts, nodes, strict=True)
        )
        reasons = [f"{one.drafter}: {one.fallback_reason}" for one in proposals if one.fallback_reason]
        return Draft(
            tree.token_ids,
            # They work side by side: the slowest is what the round waits for.
            server_ns=min(elapsed_ns, max(draft.server_ns for draft in drafts)),
            elapsed_ns=elapsed_ns,
            fallback_reason="" if tree.token_ids else "; ".join(reasons),
            parent_indices=tree.parent_indices,
            proposals=proposals,
        )
