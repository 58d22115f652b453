"""Several drafters for one round: asked at once, merged within a budget, not missed when one fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import pytest

from gateway.rounds import merging
from gateway.rounds.merging import MergedDrafts, NamedSource
from gateway.rounds.vocabulary import Draft, DraftRequest, DraftSize, Proposal

PROMPT = [1, 2, 3]


def ask(draft_depth: int, draft_nodes: int = 0) -> DraftRequest:
    """Return what a round asks for."""
    return DraftRequest(PROMPT, DraftSize(draft_depth, draft_nodes), "trace")


class Source:
    """Proposes the same every round, after a while, once it may."""

    def __init__(self, draft: Draft, *, delay_s: float = 0.0) -> None:
        self.draft = draft
        self.delay_s = delay_s
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()
        self.asked: list[tuple[int, int]] = []
        self.is_open = True
        self.num_asking = 0
        self.opened_with: list[int] = []

    async def join(self, request: DraftRequest) -> None:
        self.is_open = True

    async def let_go(self) -> None:
        assert not self.num_asking, "nobody drafts meanwhile"
        self.is_open = False

    async def open_again(self, committed_token_ids: Sequence[int]) -> None:
        self.opened_with = list(committed_token_ids)

    async def propose(self, request: DraftRequest) -> Draft:
        assert (list(request.committed_token_ids), request.traceparent) == (PROMPT, "trace")
        self.asked.append((request.size.draft_depth, request.size.draft_nodes))
        self.num_asking += 1
        try:
            await asyncio.sleep(self.delay_s)
            await self.may_go_on.wait()
        finally:
            self.num_asking -= 1
        return self.draft


def merged(*sources: Source, draft_nodes: int = 8) -> MergedDrafts:
    """Merge sources named a, b, ..., which draft at most 2, 3, ... tokens."""
    named = [
        NamedSource(name, source, 2 + at)
        for at, (name, source) in enumerate(zip("abc", sources, strict=False))
    ]
    return MergedDrafts(named, draft_nodes)


async def test_proposals_become_one_tree() -> None:
    left, right = Source(Draft((7, 8))), Source(Draft((7, 9, 5), parent_indices=(-1, 0, -1)))
    draft = await merged(left, right).propose(ask(4, 8))
    assert (draft.token_ids, draft.parent_indices) == ((7, 8, 9, 5), (-1, 0, 0, -1))
    assert draft.proposals == (Proposal("a", frozenset({0, 1})), Proposal("b", frozenset({0, 2, 3})))
    assert draft.fallback_reason == ""


async def test_a_round_asks_the_drafters_of_its_method_and_lets_those_join_that_a_later_one_wants() -> None:
    sources = left, right = Source(Draft((7, 8))), Source(Draft((7, 9)))
    right.is_open = False
    drafts = merged(*sources)
    size = DraftSize(2, method="a", joining="b+a")
    assert [drafts.is_open(method) for method in ("a", "b", "b+a", "")] == [True, False, False, True]
    draft = await drafts.propose(DraftRequest(PROMPT, size, "trace"))
    assert (draft.token_ids, draft.proposals) == ((7, 8), (Proposal("a", frozenset({0, 1})),))
    assert drafts.is_open("b+a")
    assert (left.asked, right.asked) == ([(2, 0)], [])
    both = await drafts.propose(DraftRequest(PROMPT, DraftSize(2, method="b+a"), "trace"))
    assert [proposal.drafter for proposal in both.proposals] == ["b", "a"]
    assert await drafts.propose(DraftRequest(PROMPT, DraftSize(0, joining="b"), "trace")) == Draft()


async def test_equal_proposals_are_a_chain() -> None:
    draft = await merged(Source(Draft((7, 8))), Source(Draft((7, 8, 9)))).propose(ask(4, 8))
    assert (draft.token_ids, draft.parent_indices) == ((7, 8, 9), ())


async def test_each_is_asked_for_what_it_can_and_trees_only_where_they_are_wanted() -> None:
    left, right = Source(Draft()), Source(Draft())
    await merged(left, right).propose(ask(4))
    await merged(left, right).propose(ask(1, 6))
    assert (left.asked, right.asked) == ([(2, 0), (1, 6)], [(3, 0), (1, 6)])


async def test_all_let_go_and_open_again_and_what_is_late_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_LEAST_PATIENCE_S", 0.05)
    sources = _, slow = Source(Draft((7,))), Source(Draft((8,)))
    async with merged(*sources) as drafts:
        for _ in range(3):
            await drafts.propose(ask(4))
        slow.may_go_on.clear()
        assert (await drafts.propose(ask(4))).token_ids == (7,)
        assert slow.num_asking == 1
        await drafts.let_go()
        assert not any(source.is_open or source.num_asking for source in sources)
        await drafts.open_again(PROMPT)
        assert [source.opened_with for source in sources] == [PROMPT, PROMPT]
        slow.may_go_on.set()
        assert (await drafts.propose(ask(4))).token_ids == (7, 8), "it is not taken for busy"


async def test_the_budget_is_shared() -> None:
    sources = Source(Draft((1, 2, 3))), Source(Draft((4, 5, 6)))
    draft = await merged(*sources, draft_nodes=4).propose(ask(4))
    assert (draft.token_ids, draft.parent_indices) == ((1, 4, 2, 5), (-1, -1, 0, 1))
    draft = await merged(*sources).propose(ask(4, 3))
    assert (draft.token_ids, draft.parent_indices) == ((1, 4, 2), (-1, -1, 0))


async def test_they_are_asked_at_once() -> None:
    started = time.monotonic()
    slow = [Source(Draft((at,), server_ns=10**7), delay_s=0.2) for at in (7, 8, 9)]
    draft = await merged(*slow).propose(ask(4, 8))
    assert time.monotonic() - started < 0.4
    assert draft.token_ids == (7, 8, 9)
    assert draft.server_ns == 10**7 < 2 * 10**8 <= draft.elapsed_ns


async def test_one_that_stalls_is_left_out_until_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_LEAST_PATIENCE_S", 0.05)
    quick, slow = Source(Draft((7,))), Source(Draft((8,)))
    async with merged(quick, slow) as drafts:
        for _ in range(3):
            assert (await drafts.propose(ask(4))).token_ids == (7, 8)
        slow.may_go_on.clear()
        late = await drafts.propose(ask(4))
        assert late.token_ids == (7,)
        assert "no draft within 0.05 s" in late.proposals[1].fallback_reason
        assert late.proposals[1].fallback_code == "deadline_exceeded"
        assert late.elapsed_ns >= 5 * 10**7
        num_asked = len(slow.asked)
        busy = await drafts.propose(ask(4))
        assert busy.proposals[1].fallback_reason == "it still drafts for an earlier round"
        assert busy.proposals[1].fallback_code == "busy"
        assert (busy.token_ids, len(slow.asked)) == ((7,), num_asked)
        slow.may_go_on.set()
        async with asyncio.timeout(20):
            while not (joined := await drafts.propose(ask(4))).is_complete:
                pass
        assert joined.token_ids == (7, 8)
        slow.may_go_on.clear()
        await drafts.propose(ask(4))
    assert asyncio.all_tasks() == {asyncio.current_task()}, "what was under way ends with the block"


async def test_whoever_has_nothing_is_left_out_and_its_reason_kept() -> None:
    draft = await merged(Source(Draft(fallback_reason="late")), Source(Draft((7,)))).propose(ask(4, 8))
    assert draft.token_ids == (7,)
    assert draft.fallback_reason == ""
    assert draft.proposals == (Proposal("a", fallback_reason="late"), Proposal("b", frozenset({0})))


async def test_a_merged_draft_is_complete_where_everyone_answered() -> None:
    there, nothing, late = Source(Draft((7,))), Source(Draft()), Source(Draft(fallback_reason="late"))
    assert (await merged(there, nothing).propose(ask(4, 8))).is_complete
    assert not (await merged(there, late).propose(ask(4, 8))).is_complete
    assert not (await merged(late, late).propose(ask(4, 8))).is_complete


async def test_the_time_of_a_merged_draft_is_the_usual_where_none_is_a_first() -> None:
    usual, first = Source(Draft((7,))), Source(Draft((8,), is_first=True))
    assert not (await merged(usual, usual).propose(ask(4, 8))).is_first
    assert (await merged(usual, first).propose(ask(4, 8))).is_first
    assert (await merged(first, usual).propose(ask(4, 8))).is_first


async def test_without_any_proposal_all_reasons_are_given() -> None:
    lost = [Source(Draft(fallback_reason=reason)) for reason in ("late", "gone")]
    draft = await merged(*lost).propose(ask(4, 8))
    assert (draft.token_ids, draft.fallback_reason) == ((), "a: late; b: gone")
    draft = await merged(Source(Draft()), Source(Draft())).propose(ask(4, 8))
    assert (draft.token_ids, draft.fallback_reason) == ((), "")
