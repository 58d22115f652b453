"""Several drafters for one request: some or all draft for a round, and what they propose becomes one tree."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from gateway.rounds.estimates import Mean
from gateway.rounds.vocabulary import Draft, DraftRequest, Proposal, RequestDrafts
from specdec.contract.draft_tree import merge
from specdec.contract.methods import drafters_of

_PATIENCE = 3.0
"""How many times its usual time a draft may take, whether others have theirs ready or not."""
_LEAST_PATIENCE_S = 0.25
_ROUNDS_TO_KNOW = 3
"""Drafts after which it is known what is usual; until then only the link's own timeout ends the wait."""

_BUSY = Draft(fallback_reason="it still drafts for an earlier round", fallback_code="busy")


class JoiningSource(RequestDrafts, Protocol):
    """A source of drafts that may begin later than the generation."""

    @property
    def is_open(self) -> bool:
        """Whether a draft would not have to wait until the drafter has opened and read what was before."""

    async def join(self, request: DraftRequest) -> None:
        """Open the drafter and let it read what was before, beside the rounds, which go on without it."""


@dataclass(eq=False, slots=True)
class NamedSource:
    """One drafter among several."""

    drafter: str
    source: JoiningSource
    draft_depth: int
    """Most tokens it drafts in a row."""
    pending: asyncio.Task[Draft] | None = None
    """The draft under way; it may be of an earlier round, and nobody waits for it any more."""
    usual_s: Mean = field(default_factory=Mean)
    """Time that a draft takes, counting late drafts."""

    @property
    def patience_s(self) -> float | None:
        """How long a round waits for its draft; None: as long as it takes."""
        if self.usual_s.count < _ROUNDS_TO_KNOW:
            return None
        return max(_LEAST_PATIENCE_S, _PATIENCE * self.usual_s.value)

    @property
    def is_busy(self) -> bool:
        """Whether it still drafts for an earlier round."""
        return self.pending is not None and not self.pending.done()

    def part_of(self, request: DraftRequest) -> DraftRequest:
        """Return what the drafter is asked for in a round: it may draft less in a row than others."""
        if request.size.draft_depth <= self.draft_depth:
            return request
        return replace(request, size=replace(request.size, draft_depth=self.draft_depth))


class MergedDrafts:
    """Asks several drafters at once and merges what they propose. Use as `async with`.

    Drafters err in different places: what one misses another may have. Each may be late, lost or wrong on its
    own; the round's draft is what the others propose. A late drafter is not asked again until it is done, and
    what it drafted for an earlier round is thrown away. A round that names a method asks its drafters only.

    Args:
        draft_nodes: most tokens of the merged tree, where a round names no budget.
    """

    def __init__(self, sources: Sequence[NamedSource], draft_nodes: int) -> None:
        self._sources = {source.drafter: source for source in sources}
        self._draft_nodes = draft_nodes

    async def __aenter__(self) -> MergedDrafts:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._drop_late()

    async def _drop_late(self) -> None:
        """End the drafts that nobody waits for any more."""
        pending = [proposer.pending for proposer in self._sources.values() if proposer.pending]
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    async def let_go(self) -> None:
        """End all sessions on drafters, between two rounds."""
        await self._drop_late()
        await asyncio.gather(*(proposer.source.let_go() for proposer in self._sources.values()))

    async def open_again(self, committed_token_ids: Sequence[int]) -> None:
        """Open the sessions that were let go, beside the target's prefill."""
        for proposer in self._sources.values():
            await proposer.source.open_again(committed_token_ids)

    def is_open(self, method: str) -> bool:
        """Return whether all drafters of a method can draft without a wait for their beginning. The drafters
        of a request that names them (an empty method) are asked in any case.
        """
        return not method or all(proposer.source.is_open for proposer in self._asked(method))

    async def propose(self, request: DraftRequest) -> Draft:
        """Return a tree of all proposals, or an empty draft that says why there are none.

        With a budget of nodes each drafter may propose a tree as large as the merged one; without a budget,
        each proposes a chain. Drafters of the method that is joining begin beside it.
        """
        if request.size.joining:
            for proposer in self._asked(request.size.joining):
                await proposer.source.join(request)
        if not request.size.draft_depth:
            return Draft()
        asked = self._asked(request.size.method)
        if len(asked) == 1:
            return await _ask_alone(asked[0], request)
        started_ns = time.monotonic_ns()
        # A late drafter reads the tokens while the rounds go on.
        request = replace(request, committed_token_ids=tuple(request.committed_token_ids))
        drafts = await asyncio.gather(*(_ask(proposer, request) for proposer in asked))
        return self._merged(asked, drafts, request, time.monotonic_ns() - started_ns)

    def _asked(self, method: str) -> Sequence[NamedSource]:
        """Return the drafters of a method, in its order; all, where it is empty."""
        if not method:
            return list(self._sources.values())
        return [self._sources[name] for name in drafters_of(method)]

    def _merged(
        self,
        asked: Sequence[NamedSource],
        drafts: Sequence[Draft],
        request: DraftRequest,
        elapsed_ns: int,
    ) -> Draft:
        budget = request.size.draft_nodes or self._draft_nodes
        tree, nodes = merge([draft.tree for draft in drafts], budget)
        proposals = tuple(
            Proposal(proposer.drafter, frozenset(mine), draft.fallback_reason, draft.fallback_code)
            for proposer, draft, mine in zip(asked, drafts, nodes, strict=True)
        )
        missing = [proposal for proposal in proposals if proposal.fallback_reason]
        reason = "; ".join(f"{proposal.drafter}: {proposal.fallback_reason}" for proposal in missing)
        return Draft(
            tree.token_ids,
            # Drafters work side by side: the slowest is what the round waits for.
            server_ns=min(elapsed_ns, max(draft.server_ns for draft in drafts)),
            elapsed_ns=elapsed_ns,
            compute_ns=sum(draft.compute_ns for draft in drafts),
            fallback_reason="" if tree.token_ids else reason,
            fallback_code=missing[0].fallback_code if missing else "",
            parent_indices=tree.parent_indices,
            proposals=proposals,
            is_first=any(draft.is_first for draft in drafts),
        )


async def _ask_alone(proposer: NamedSource, request: DraftRequest) -> Draft:
    """Return the draft of the round's only drafter, for which the round waits as long as its link does."""
    if proposer.is_busy:
        return _BUSY
    draft = await proposer.source.propose(proposer.part_of(request))
    nodes = frozenset(range(len(draft.token_ids)))
    proposal = Proposal(proposer.drafter, nodes, draft.fallback_reason, draft.fallback_code)
    return replace(draft, proposals=(proposal,))


async def _ask(proposer: NamedSource, request: DraftRequest) -> Draft:
    """Ask one drafter for its draft, or give an empty draft if it is late."""
    if proposer.is_busy:
        return _BUSY
    started = time.monotonic()
    drafting = proposer.source.propose(proposer.part_of(request))
    proposer.pending = task = asyncio.ensure_future(drafting)
    task.add_done_callback(lambda _: proposer.usual_s.add(time.monotonic() - started))
    patience_s = proposer.patience_s
    await asyncio.wait({task}, timeout=patience_s)
    if task.done():
        return task.result()
    waited_ns = int((time.monotonic() - started) * 1e9)
    reason = f"no draft within {patience_s:.3g} s, three times what it usually takes"
    return Draft(
        server_ns=waited_ns,
        elapsed_ns=waited_ns,
        fallback_reason=reason,
        fallback_code="deadline_exceeded",
    )
