"""Trees of the likeliest guesses, against all the guesses there are."""

from __future__ import annotations

import math
from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafter_service.drafters.growing import MAX_STEP_NODES, Candidates, GrowingTree
from specdec.contract.draft_tree import DraftTree


def candidates(random: Random, num: int) -> Candidates:
    """Return the likeliest tokens of a random distribution, best first."""
    weights = sorted((random.random() ** 3 for _ in range(num)), reverse=True)
    total = sum(weights) * 1.3
    token_ids = random.sample(range(9), num)
    return [(math.log(weight / total), token_id) for weight, token_id in zip(weights, token_ids, strict=True)]


def worths(tree: DraftTree, places: list[Candidates]) -> list[float]:
    """Return the log probability of every node's path, in the tree's order."""
    by_token = [{token_id: log_prob for log_prob, token_id in place} for place in places]
    paths = [[tree.token_ids[node] for node in tree.path_to(index)] for index in range(len(tree))]
    return [sum(by_token[depth][token_id] for depth, token_id in enumerate(path)) for path in paths]


@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 4), st.integers(1, 40))
def test_the_best_paths_of_a_block_are_the_likeliest_of_all(
    seed: int, num_places: int, num_candidates: int, draft_nodes: int
) -> None:
    places = [candidates(Random(seed + place), num_candidates) for place in range(num_places)]
    growing = GrowingTree(max_depth=num_places, draft_nodes=draft_nodes)
    found = worths(growing.best_paths(lambda path: places[len(path)]), places)
    everything = [
        sum(log_prob for log_prob, _ in path)
        for length in range(1, num_places + 1)
        for path in product(*places[:length])
    ]
    assert found == sorted(found, reverse=True)
    assert found == pytest.approx(sorted(everything, reverse=True)[:draft_nodes])


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 40))
def test_a_grown_tree_keeps_to_its_limits_and_has_the_likeliest_it_saw(
    seed: int, max_depth: int, draft_nodes: int
) -> None:
    random = Random(seed)
    growing = GrowingTree(max_depth=max_depth, draft_nodes=draft_nodes)
    seen: dict[tuple[int, ...], float] = {(): 0.0}
    for _ in range(max_depth):
        frontier = growing.frontier()
        assert len(frontier) <= MAX_STEP_NODES
        for node in frontier:
            path = tuple(growing.path(node))
            found = candidates(random, 4)
            growing.expand(node, found)
            seen |= {(*path, token_id): seen[path] + log_prob for log_prob, token_id in found}
    tree = growing.tree()
    paths = [tuple(tree.token_ids[node] for node in tree.path_to(index)) for index in range(len(tree))]
    best = sorted((log_prob for path, log_prob in seen.items() if path), reverse=True)[:draft_nodes]
    assert [seen[path] for path in paths] == best
    assert tree.depth <= max_depth


def test_unlikely_tokens_follow_nothing_but_the_first_is_there_in_any_case() -> None:
    sure, unsure = (math.log(0.8), 1), (math.log(0.1), 2)
    growing = GrowingTree(max_depth=3, draft_nodes=9, min_confidence=0.5)
    growing.expand(-1, [sure, unsure])
    growing.expand(0, [unsure])
    assert growing.tree() == DraftTree((1,))
    places = [[unsure, unsure], [sure], []]
    by_place = GrowingTree(max_depth=3, draft_nodes=9, min_confidence=0.5)
    assert by_place.best_paths(lambda path: places[len(path)]) == DraftTree((2, 1))
    unlikely = GrowingTree(max_depth=3, draft_nodes=9, min_path_confidence=0.6)
    assert unlikely.best_paths(lambda path: [sure, unsure]) == DraftTree((1, 1))


def test_a_path_ends_where_it_is_too_unlikely_in_all() -> None:
    sure, unsure = (math.log(0.8), 1), (math.log(0.2), 2)
    growing = GrowingTree(max_depth=9, draft_nodes=9, min_path_confidence=0.5)
    while frontier := growing.frontier():
        for node in frontier:
            growing.expand(node, [sure, unsure])
    # 0.8, 0.64, 0.512: the fourth would be 0.41.
    assert growing.tree() == DraftTree((1, 1, 1))
    first = GrowingTree(max_depth=9, draft_nodes=9, min_path_confidence=0.9)
    first.expand(-1, [sure, unsure])
    assert first.tree() == DraftTree((1,)), "the first token is proposed in any case"
