"""The acceptance rule against what it means: decode one token at a time and see what the draft foresaw."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verifier_service.acceptance import Acceptance, FinishReason, accept

tokens = st.integers(0, 3)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """A draft and the target's picks along it; often equal, so that long prefixes occur."""
    picks = draw(st.lists(tokens, min_size=1, max_size=9))
    draft = [draw(st.sampled_from([pick, pick, pick, 0])) for pick in picks[:-1]]
    return draft, picks


@given(rounds(), st.frozensets(tokens, max_size=2), st.integers(1, 10))
def test_commits_the_targets_picks_as_far_as_the_draft_foresaw_them(
    round_: tuple[list[int], list[int]], stop_token_ids: frozenset[int], max_tokens: int
) -> None:
    draft, picks = round_
    result = accept(draft, picks, stop_token_ids=stop_token_ids, max_tokens=max_tokens)
    committed = [*draft[: result.num_accepted_tokens], result.bonus_token_id]

    assert committed == picks[: len(committed)], "every committed token is the target's own pick"
    assert len(committed) <= max_tokens
    assert not stop_token_ids.intersection(committed[:-1]), "nothing follows a stop token"
    if result.finish_reason is None:
        ended_early = result.num_accepted_tokens < len(draft)
        assert not ended_early or draft[result.num_accepted_tokens] != picks[result.num_accepted_tokens]
        assert committed[-1] not in stop_token_ids
        assert len(committed) < max_tokens
    elif result.finish_reason is FinishReason.STOP_TOKEN:
        assert committed[-1] in stop_token_ids
    else:
        assert len(committed) == max_tokens


@given(rounds(), st.lists(tokens, max_size=8), st.frozensets(tokens, max_size=1), st.integers(1, 10))
def test_the_draft_changes_how_much_is_committed_never_what(
    round_: tuple[list[int], list[int]],
    other_draft: list[int],
    stop_token_ids: frozenset[int],
    max_tokens: int,
) -> None:
    draft, picks = round_
    # Past the first wrong draft token the picks belong to another text: only the common prefix counts.
    other = other_draft[: len(draft)]
    results = [
        accept(d, picks[: len(d) + 1], stop_token_ids=stop_token_ids, max_tokens=max_tokens)
        for d in (draft, other)
    ]
    texts = [
        [*d[: r.num_accepted_tokens], r.bonus_token_id] for d, r in zip((draft, other), results, strict=True)
    ]
    shorter = min(map(len, texts))
    assert texts[0][:shorter] == texts[1][:shorter]


@pytest.mark.parametrize(
    ("draft", "picks", "expected"),
    [
        ([], [7], Acceptance(0, 7)),
        ([1, 2], [1, 2, 3], Acceptance(2, 3)),
        ([1, 2], [1, 9, 3], Acceptance(1, 9)),
        ([5, 2], [1, 2, 3], Acceptance(0, 1)),
        ([0, 2], [0, 2, 3], Acceptance(0, 0, FinishReason.STOP_TOKEN)),
        ([1, 0], [1, 4, 0], Acceptance(1, 4)),
        ([1, 2, 3, 4], [1, 2, 3, 4, 5], Acceptance(3, 4, FinishReason.LENGTH)),
    ],
)
def test_examples(draft: list[int], picks: list[int], expected: Acceptance) -> None:
    assert accept(draft, picks, stop_token_ids={0}, max_tokens=4) == expected


@pytest.mark.parametrize(("num_picks", "max_tokens"), [(1, 5), (3, 5), (2, 0)])
def test_misuse_is_refused(num_picks: int, max_tokens: int) -> None:
    with pytest.raises(ValueError, match="one pick per draft token"):
        accept([1], [1] * num_picks, stop_token_ids=(), max_tokens=max_tokens)
