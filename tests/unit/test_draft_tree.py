"""Draft trees: what is one, what is left of it near the end, and several made one."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.contract.draft_tree import ANCHOR, DraftTree, from_chains, merge
from specdec.contract.errors import InvalidArgumentError
from tests.trees import one_path, random_tree

trees = st.builds(
    lambda seed, num_right, num_wrong: random_tree(
        Random(seed), [Random(seed).randrange(4) for _ in range(num_right)], num_wrong=num_wrong, vocab_size=4
    ),
    st.integers(0, 2**32),
    st.integers(0, 6),
    st.integers(0, 20),
)


def texts(tree: DraftTree) -> set[tuple[int, ...]]:
    """Return what the tree guesses: the tokens of every path from the anchor."""
    return {tuple(tree.token_ids[node] for node in tree.path_to(index)) for index in range(len(tree))}


@pytest.mark.parametrize(
    ("token_ids", "parent_indices", "fragment"),
    [
        ([1, 2], [-1], "2 tokens"),
        ([1], [-1, 0], "1 tokens"),
        ([], [-1], "0 tokens"),
        ([1, 2], [-1, 1], r"parent_indices\[1\] is 1"),
        ([1, 2], [1, -1], r"parent_indices\[0\] is 1"),
        ([1, 2], [-1, -2], r"parent_indices\[1\] is -2"),
        ([1, 1], [-1, -1], "same token"),
        ([1, 2, 3, 2], [-1, 0, -1, 0], "same token"),
    ],
)
def test_what_is_no_tree_is_refused(token_ids: list[int], parent_indices: list[int], fragment: str) -> None:
    with pytest.raises(InvalidArgumentError, match=fragment) as raised:
        DraftTree.of(token_ids, parent_indices)
    assert raised.value.reason == "NO_DRAFT_TREE"


def test_a_tree_with_one_path_is_the_chain() -> None:
    chain = DraftTree.of([5, 5, 5])
    assert chain == DraftTree.of([5, 5, 5], one_path([5, 5, 5]))
    assert chain.is_chain
    assert (list(chain.parents), list(chain.depths), chain.depth) == ([-1, 0, 1], [1, 2, 3], 3)
    assert DraftTree.of([]).depth == 0


@given(trees)
def test_every_node_is_one_deeper_than_its_parent(tree: DraftTree) -> None:
    for index, (parent, depth) in enumerate(zip(tree.parents, tree.depths, strict=True)):
        assert depth == (1 if parent == ANCHOR else tree.depths[parent] + 1) == len(tree.path_to(index))
    assert len(texts(tree)) == len(tree), "no guess is made twice"


@given(trees, st.integers(0, 8), st.integers(0, 30))
def test_what_fits_is_a_tree_of_the_same_guesses_depth_first(
    tree: DraftTree, max_depth: int, draft_nodes: int
) -> None:
    kept = tree.fitting(max_depth=max_depth, draft_nodes=draft_nodes)
    fitting = tree.select(kept)
    shallow = {text for text in texts(tree) if len(text) <= max_depth}
    assert len(fitting) == min(len(shallow), draft_nodes)
    assert texts(fitting) <= shallow
    assert fitting.depth <= max_depth
    if len(shallow) <= draft_nodes:
        assert texts(fitting) == shallow
    leaves = set(range(len(fitting))) - set(fitting.parents)
    runs = sum(
        parent != index - 1 for index, parent in enumerate(fitting.parents) if parent != ANCHOR or index
    )
    assert runs + 1 == max(len(leaves), 1), "a path's new nodes follow one another"


@given(st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=6), st.integers(0, 12))
def test_chains_make_a_tree_the_first_ones_whole(chains: list[list[int]], draft_nodes: int) -> None:
    tree = from_chains(chains, draft_nodes)
    beginnings = [tuple(chain[: stop + 1]) for chain in chains for stop in range(len(chain))]
    assert texts(tree) == set(list(dict.fromkeys(beginnings))[:draft_nodes])


@given(st.lists(trees, max_size=4))
def test_a_merged_tree_has_every_guess_once_and_no_other(proposals: list[DraftTree]) -> None:
    merged, nodes = merge(proposals, 1000)
    assert texts(merged) == set().union(*map(texts, proposals))
    for proposal, mine in zip(proposals, nodes, strict=True):
        assert texts(proposal) == {tuple(merged.token_ids[n] for n in merged.path_to(node)) for node in mine}


@given(st.lists(trees, max_size=4), st.integers(0, 12))
def test_a_merged_tree_keeps_to_its_budget_and_gives_every_proposer_its_share(
    proposals: list[DraftTree], draft_nodes: int
) -> None:
    merged, nodes = merge(proposals, draft_nodes)
    everything, _ = merge(proposals, 1000)
    assert len(merged) == min(draft_nodes, len(everything))
    assert texts(merged) <= texts(everything)
    for proposal, mine in zip(proposals, nodes, strict=True):
        assert len(mine) == len(set(mine)) <= len(proposal)
        share = min(draft_nodes // max(len(proposals), 1), len(proposal))
        assert len(mine) >= share
        assert [merged.token_ids[node] for node in mine[:share]] == list(proposal.token_ids[:share])


def test_proposers_take_turns_and_share_what_they_have_in_common() -> None:
    left, right = DraftTree.of([1, 2, 3, 4]), DraftTree.of([1, 7, 8, 9])
    merged, nodes = merge([left, right], 5)
    assert merged == DraftTree((1, 2, 7, 3, 8), (-1, 0, 0, 1, 2))
    assert nodes == [[0, 1, 3], [0, 2, 4]]
    assert merge([DraftTree(), left], 9) == (left, [[], [0, 1, 2, 3]])
    assert merge([], 9) == (DraftTree(), [])
