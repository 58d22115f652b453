"""The acceptance rule against what it means: decode one token at a time and see what the draft foresaw."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.contract.draft_tree import ANCHOR, DraftTree
from tests.trees import random_tree
from verifier_service.acceptance import DraftAcceptance, FinishReason, accept

tokens = st.integers(0, 3)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Draw a draft and the target's picks along it; they are often equal, so that long prefixes occur."""
    picks = draw(st.lists(tokens, min_size=1, max_size=9))
    draft = [draw(st.sampled_from([pick, pick, pick, 0])) for pick in picks[:-1]]
    return draft, picks


@given(rounds(), st.frozensets(tokens, max_size=2), st.integers(1, 10))
def test_commits_the_targets_picks_as_far_as_the_draft_foresaw_them(
    round_: tuple[list[int], list[int]], stop_token_ids: frozenset[int], max_tokens: int
) -> None:
    draft, picks = round_
    result = accept(DraftTree.of(draft), picks, stop_token_ids=stop_token_ids, max_tokens=max_tokens)
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
        accept(DraftTree.of(d), picks[: len(d) + 1], stop_token_ids=stop_token_ids, max_tokens=max_tokens)
        for d in (draft, other)
    ]
    texts = [
        [*d[: r.num_accepted_tokens], r.bonus_token_id] for d, r in zip((draft, other), results, strict=True)
    ]
    shorter = min(map(len, texts))
    assert texts[0][:shorter] == texts[1][:shorter]


@given(
    st.integers(0, 2**32),
    st.lists(tokens, min_size=1, max_size=9),
    st.integers(0, 8),
    st.integers(0, 20),
    st.frozensets(tokens, max_size=1),
    st.integers(1, 10),
)
def test_a_tree_commits_what_the_chain_of_its_right_path_commits(
    seed: int,
    text: list[int],
    num_right: int,
    num_wrong: int,
    stop_token_ids: frozenset[int],
    max_tokens: int,
) -> None:
    """The target picks along `text`, and another token after every node that `text` does not contain."""
    random = Random(seed)
    tree = random_tree(random, text[:num_right], num_wrong=num_wrong, vocab_size=4)
    paths = [[tree.token_ids[node] for node in tree.path_to(index)] for index in range(len(tree))]
    goes_on = [*text, 3, 3, 3]
    picks = [
        goes_on[len(path)] if path == goes_on[: len(path)] else random.randrange(4) for path in [[], *paths]
    ]
    result = accept(tree, picks, stop_token_ids=stop_token_ids, max_tokens=max_tokens)

    right = max((path for path in paths if path == goes_on[: len(path)]), key=len, default=[])
    chain = accept(
        DraftTree.of(right), goes_on[: len(right) + 1], stop_token_ids=stop_token_ids, max_tokens=max_tokens
    )
    accepted = [tree.token_ids[node] for node in result.path]
    assert accepted == right[: chain.num_accepted_tokens]
    assert (result.bonus_token_id, result.finish_reason) == (chain.bonus_token_id, chain.finish_reason)
    assert [tree.parents[node] for node in result.path] == [ANCHOR, *result.path][: len(result.path)]


@pytest.mark.parametrize(
    ("draft", "picks", "expected"),
    [
        ([], [7], DraftAcceptance((), 7)),
        ([1, 2], [1, 2, 3], DraftAcceptance((0, 1), 3)),
        ([1, 2], [1, 9, 3], DraftAcceptance((0,), 9)),
        ([5, 2], [1, 2, 3], DraftAcceptance((), 1)),
        ([0, 2], [0, 2, 3], DraftAcceptance((), 0, FinishReason.STOP_TOKEN)),
        ([1, 0], [1, 4, 0], DraftAcceptance((0,), 4)),
        ([1, 2, 3, 4], [1, 2, 3, 4, 5], DraftAcceptance((0, 1, 2), 4, FinishReason.LENGTH)),
    ],
)
def test_examples(draft: list[int], picks: list[int], expected: DraftAcceptance) -> None:
    assert accept(DraftTree.of(draft), picks, stop_token_ids={0}, max_tokens=4) == expected


@pytest.mark.parametrize(("num_picks", "max_tokens"), [(1, 5), (3, 5), (2, 0)])
def test_misuse_is_refused(num_picks: int, max_tokens: int) -> None:
    with pytest.raises(ValueError, match="one pick per draft token"):
        accept(DraftTree.of([1]), [1] * num_picks, stop_token_ids=(), max_tokens=max_tokens)


def test_a_node_after_which_no_pick_is_known_is_the_last_token_of_its_round() -> None:
    draft = DraftTree((1, 2, 3, 2), (-1, 0, 1, -1))
    picks = [1, 2, 3, 0, 0]
    whole = accept(draft, picks, stop_token_ids=(), max_tokens=9)
    assert (whole.path, whole.bonus_token_id) == ((0, 1, 2), 0)
    cut = accept(draft, picks, stop_token_ids=(), max_tokens=9, unknown_nodes={1, 3})
    assert (cut.path, cut.bonus_token_id, cut.finish_reason) == ((0,), 2, None)
