"""Prompt lookup against a reference that searches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafter_service.drafters.base import DraftItem, DraftSession, OpenDraft
from drafter_service.drafters.ngram.drafter import NgramDrafter
from specdec.contract.draft_tree import DraftTree, from_chains
from specdec.contract.errors import FailedPreconditionError


def make_drafter(min_size: int = 2, max_size: int = 4) -> NgramDrafter:
    return NgramDrafter("ngram", min_size=min_size, max_size=max_size, max_draft_depth=64)


def open_session(drafter: NgramDrafter, token_ids: Sequence[int]) -> DraftSession:
    return drafter.open(OpenDraft(tuple(token_ids), prompt_length=len(token_ids), max_length=1000))


def draft(drafter: NgramDrafter, session: DraftSession, draft_depth: int) -> list[int]:
    (tokens,) = drafter.propose([DraftItem(drafter, session, draft_depth, 1)])
    assert isinstance(tokens, list)
    return tokens


def draft_after(token_ids: Sequence[int], draft_depth: int, *, min_size: int = 2) -> list[int]:
    drafter = make_drafter(min_size)
    return draft(drafter, open_session(drafter, token_ids), draft_depth)


def search(token_ids: Sequence[int], draft_depth: int, min_size: int, max_size: int) -> list[int]:
    """Return the definition's draft: what followed the longest match of the last tokens, of several the most
    recent.
    """
    tokens = list(token_ids)
    matches = [
        (size, stop)
        for stop in range(1, len(tokens))
        for size in range(min_size, stop + 1)
        if tokens[stop - size : stop] == tokens[-size:]
    ]
    if not matches:
        return []
    size, stop = max(matches)
    return continuation(tokens[stop:], min(size, max_size), draft_depth)


def continuation(following: Sequence[int], size: int, draft_depth: int) -> list[int]:
    """Return what follows a match, over and over; after a match of one token, at most two tokens."""
    length = min(2, draft_depth) if size == 1 else draft_depth
    return [following[index % len(following)] for index in range(length)]


@given(
    pieces=st.lists(st.lists(st.integers(0, 3), max_size=6), min_size=1, max_size=6),
    draft_depth=st.integers(1, 10),
    min_size=st.integers(1, 3),
    more=st.integers(0, 3),
)
def test_equals_a_search_after_every_commit(
    pieces: list[list[int]], draft_depth: int, min_size: int, more: int
) -> None:
    drafter = make_drafter(min_size, min_size + more)
    committed = [0, *pieces[0]]
    session = open_session(drafter, committed)
    for piece in pieces[1:]:
        expected = search(committed, draft_depth, min_size, min_size + more)
        assert draft(drafter, session, draft_depth) == expected
        committed += piece
        session.commit(piece, len(committed))
    expected = search(committed, draft_depth, min_size, min_size + more)
    assert draft(drafter, session, draft_depth) == expected


def test_the_longest_ngram_wins_over_a_more_recent_one() -> None:
    #            long match, then 10; short match, then 20
    assert draft_after([1, 2, 3, 10, 8, 2, 3, 20, 1, 2, 3], 1) == [10]


def test_of_equal_ngrams_the_most_recent_wins() -> None:
    assert draft_after([1, 2, 10, 1, 2, 20, 1, 2], 1) == [20]


def test_a_match_near_the_end_repeats_its_period() -> None:
    assert draft_after([5, 6, 7, 5, 6, 7, 5, 6], 7) == [7, 5, 6, 7, 5, 6, 7]
    assert draft_after([4, 4, 4], 3) == [4, 4, 4]


@pytest.mark.parametrize("token_ids", [[1], [1, 2, 3, 4, 5], [1, 1], [1, 2, 3, 1]])
def test_no_match_no_guess(token_ids: list[int]) -> None:
    assert draft_after(token_ids, 8) == []


def test_a_shorter_minimum_finds_more_and_trusts_it_less() -> None:
    assert draft_after([1, 2, 3, 4, 1], 1, min_size=1) == [2]
    assert draft_after([1, 2, 3, 4, 1], 8, min_size=1) == [2, 3]
    assert draft_after([1, 2, 3, 4, 1, 2], 3, min_size=1) == [3, 4, 1]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.integers(1, 5),
    st.integers(1, 20),
    st.integers(1, 2),
    st.data(),
)
def test_a_tree_has_what_followed_earlier_occurrences_the_best_match_whole(
    token_ids: list[int], draft_depth: int, draft_nodes: int, min_size: int, data: st.DataObject
) -> None:
    drafter = make_drafter(min_size)
    cut = data.draw(st.integers(1, len(token_ids)))
    session = open_session(drafter, token_ids[:cut])
    draft(drafter, session, draft_depth)
    session.commit(token_ids[cut:], len(token_ids))
    (found,) = drafter.propose([DraftItem(drafter, session, draft_depth, 1, draft_nodes)])
    if draft_nodes <= draft_depth:
        assert found == search(token_ids, draft_depth, min_size, 4)
        return
    chains = [
        continuation(token_ids[start + size :], size, draft_depth)
        for size in range(4, min_size - 1, -1)
        for start in range(len(token_ids) - size - 1, -1, -1)
        if token_ids[start : start + size] == token_ids[-size:]
    ]
    assert found == from_chains(chains, draft_nodes)
    assert isinstance(found, DraftTree)
    assert len(found) <= draft_nodes
    best = search(token_ids, draft_depth, min_size, 4)
    assert list(found.token_ids[: len(best)]) == best


def test_a_missed_commit_is_refused_and_changes_nothing() -> None:
    drafter = make_drafter()
    session = open_session(drafter, [1, 2, 10, 1, 2])
    with pytest.raises(FailedPreconditionError) as caught:
        session.commit([9], 5)
    assert caught.value.reason == "STALE_BASE"
    assert draft(drafter, session, 1) == [10]


def test_sessions_do_not_share_an_index() -> None:
    drafter = make_drafter()
    first, second = open_session(drafter, [1, 2, 10, 1, 2]), open_session(drafter, [1, 2, 20, 1, 2])
    items = [DraftItem(drafter, session, 1, 1) for session in (first, second)]
    assert drafter.propose(items) == [[10], [20]]


def test_info() -> None:
    traits = make_drafter().traits
    assert (traits.name, traits.family, traits.max_draft_depth) == ("ngram", "ngram", 64)
    assert traits.model_id == traits.vocabulary_fingerprint == ""
