"""Drafts from a table and from the text itself: the likeliest paths, as probabilities of both say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import DraftItem, OpenDraft
from drafter_service.drafters.ngram.drafter import NgramSession
from drafter_service.drafters.ngram_lm.drafter import NgramLmDrafter, NgramLmSession
from drafter_service.drafters.ngram_lm.table import NgramTable
from drafter_service.families import load_drafters
from specdec.contract.draft_tree import DraftTree
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.sampling import SamplingParams
from specdec.runtime.noise import GumbelNoise
from tests.ngram_tables import VOCABULARY, Following, table_of

LEAST_PROBABILITY = 0.03
"""Of a path."""
GREEDY = SamplingParams()
SAMPLED = SamplingParams(temperature=0.8, seed=2**40 + 7)

KNOWN = table_of(
    {
        (1,): Following({2: 0.875, 3: 0.0625}),
        (2,): Following({4: 0.5, 5: 0.375}),
        (1, 2): Following({5: 0.75, 6: 0.125}, backoff=0.125),
        (5,): Following({6: 0.75}),
        (3,): Following({7: 0.5}),
    }
)
NOTHING_KNOWN = table_of({(15,): Following({15: 1.0})})


def make_drafter(
    table: NgramTable, *, min_size: int = 1, max_size: int = 4, max_draft_depth: int = 16
) -> NgramLmDrafter:
    return NgramLmDrafter(
        "ngram-lm",
        table,
        min_size=min_size,
        max_size=max_size,
        max_draft_depth=max_draft_depth,
    )


def open_session(
    drafter: NgramLmDrafter,
    token_ids: Sequence[int],
    *,
    sampling: SamplingParams = GREEDY,
    min_draft_confidence: float = 0.0,
) -> NgramLmSession:
    request = OpenDraft(
        tuple(token_ids),
        prompt_length=len(token_ids),
        max_length=1000,
        sampling=sampling,
        min_draft_confidence=min_draft_confidence,
    )
    return drafter.open(request)


def indexed(
    table: NgramTable,
    token_ids: Sequence[int],
    *,
    sampling: SamplingParams = GREEDY,
    min_draft_confidence: float = 0.0,
) -> NgramLmSession:
    """Return a session that has looked at its tokens."""
    session = open_session(
        make_drafter(table), token_ids, sampling=sampling, min_draft_confidence=min_draft_confidence
    )
    session.index()
    return session


def chain(session: NgramLmSession, draft_depth: int) -> list[int]:
    drafter = make_drafter(NOTHING_KNOWN)  # a session has its own table
    (draft,) = drafter.propose([DraftItem(drafter, session, draft_depth, 1)])
    assert isinstance(draft, list)
    return draft


def tree(session: NgramLmSession, draft_depth: int, draft_nodes: int) -> DraftTree:
    drafter = make_drafter(NOTHING_KNOWN)  # a session has its own table
    (draft,) = drafter.propose([DraftItem(drafter, session, draft_depth, 1, draft_nodes)])
    assert isinstance(draft, DraftTree)
    return draft


def paths(found: DraftTree) -> list[tuple[int, ...]]:
    return [tuple(found.token_ids[node] for node in found.path_to(index)) for index in range(len(found))]


def random_table(random: Random, num_tokens: int = 6) -> NgramTable:
    """Return a random table of what may follow some contexts of one and of two tokens."""

    def following() -> Following:
        weights = sorted((random.random() ** 3 + 0.01 for _ in range(random.randint(1, 4))), reverse=True)
        token_ids = random.sample(range(num_tokens), len(weights))
        total = sum(weights) * 1.2
        values = {token_id: weight / total for token_id, weight in zip(token_ids, weights, strict=True)}
        return Following(values, backoff=random.uniform(0.05, 0.9))

    contexts = [(token_id,) for token_id in range(num_tokens)]
    pairs = [(first, second) for first in range(num_tokens) for second in range(num_tokens)]
    kept = [*random.sample(contexts, 4), *random.sample(pairs, 8)]
    return table_of({context: following() for context in kept})


# Chains


def test_a_chain_is_the_likeliest_token_after_the_likeliest() -> None:
    session = open_session(make_drafter(KNOWN), [9, 1])
    # After [1, 2] the table knows better than after [2] alone.
    assert chain(session, 8) == [2, 5, 6]
    assert chain(session, 2) == [2, 5]
    assert chain(session, 1) == [2]


def test_a_chain_goes_on_from_what_was_committed() -> None:
    session = open_session(make_drafter(KNOWN), [9, 1])
    session.commit([10, 3], 4)
    assert chain(session, 8) == [7]
    session.commit([1], 5)
    assert chain(session, 1) == [2]


def test_nothing_known_no_guess() -> None:
    session = open_session(make_drafter(NOTHING_KNOWN), [1, 2, 3])
    assert chain(session, 4) == []
    assert tree(session, 4, 8) == DraftTree()
    assert chain(open_session(make_drafter(KNOWN), [9, 1]), 0) == []


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@given(
    seed=st.integers(0, 2**32),
    token_ids=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    draft_depth=st.integers(1, 8),
)
def test_each_token_of_a_chain_is_the_best_candidate(
    sampling: SamplingParams, seed: int, token_ids: list[int], draft_depth: int
) -> None:
    session = indexed(random_table(Random(seed)), token_ids, sampling=sampling)
    draft = chain(session, draft_depth)
    assert len(draft) <= draft_depth
    log_prob = 0.0
    for length, token_id in enumerate(draft):
        own, best = session.candidates(draft[:length])[0]
        assert token_id == best
        log_prob += own
        assert length == 0 or log_prob >= math.log(LEAST_PROBABILITY)
    if len(draft) < draft_depth and (left_out := session.candidates(draft)):
        assert log_prob + left_out[0][0] < math.log(LEAST_PROBABILITY)


# The text itself


def test_a_text_that_repeats_itself_is_followed_though_the_table_knows_nothing_of_it() -> None:
    session = open_session(make_drafter(NOTHING_KNOWN), [5, 6, 7, 5, 6, 7, 5, 6])
    assert chain(session, 7) == [7, 5, 6, 7, 5, 6, 7]
    session.commit([8, 9, 10], 11)
    assert chain(session, 4) == []
    session.commit([5, 6, 8], 14)
    assert chain(session, 2) == [9, 10]


def test_a_longer_match_says_more_than_the_table_a_short_one_less() -> None:
    # The table: after 1 comes 2. The text: 3 did.
    short = indexed(KNOWN, [1, 11, 9, 1])
    assert [token_id for _, token_id in short.candidates([])] == [2, 11, 3]
    long = indexed(KNOWN, [8, 9, 1, 11, 8, 9, 1])
    assert [token_id for _, token_id in long.candidates([])] == [11, 2, 3]


def test_of_earlier_occurrences_the_later_say_more() -> None:
    session = indexed(NOTHING_KNOWN, [1, 2, 1, 3, 1, 4, 1])
    assert [token_id for _, token_id in session.candidates([])] == [4, 3, 2]
    often = indexed(NOTHING_KNOWN, [1, 2, 1, 2, 1, 2, 1, 4, 1])
    assert [token_id for _, token_id in often.candidates([1])] == [2, 4]


def expected_mix(
    table: NgramTable, token_ids: Sequence[int], path: Sequence[int], sizes: range
) -> dict[int, float]:
    """Compute the definition by search: the last occurrences of the longest n-gram, how far back each is the
    same, and the table's probabilities.
    """
    both = [*token_ids, *path]
    usual = table.candidates(both)
    for size in reversed(sizes):
        starts = [
            start
            for start in range(len(token_ids) - 1, size - 1, -1)
            if list(token_ids[start - size : start]) == both[-size:]
        ][:32]
        if starts:
            recent = [*token_ids[-24:], *path]
            lengths = [
                max(
                    n
                    for n in range(min(start, len(recent)) + 1)
                    if token_ids[start - n : start] == recent[-n:] or not n
                )
                for start in starts
            ]
            weights = [0.7**age * 1.5**length for age, length in enumerate(lengths)]
            doubt = 0.75 / max(lengths)
            mixed = {token_id: doubt * value for token_id, value in usual.items()}
            for start, weight in zip(starts, weights, strict=True):
                said = (1 - doubt) * weight / sum(weights)
                mixed[token_ids[start]] = mixed.get(token_ids[start], 0.0) + said
            return mixed
    return usual


@given(
    seed=st.integers(0, 2**32),
    pieces=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=12), min_size=1, max_size=4),
    path=st.lists(st.integers(0, 3), max_size=5),
    min_size=st.integers(1, 2),
    more=st.integers(0, 3),
)
def test_candidates_are_as_likely_as_table_and_text_say_together(
    seed: int, pieces: list[list[int]], path: list[int], min_size: int, more: int
) -> None:
    table = random_table(Random(seed))
    drafter = make_drafter(table, min_size=min_size, max_size=min_size + more)
    session = open_session(drafter, pieces[0])
    committed = list(pieces[0])
    for piece in pieces[1:]:
        session.index()
        committed += piece
        session.commit(piece, len(committed))
    session.index()
    expected = expected_mix(table, committed, path, range(min_size, min_size + more + 1))
    found = session.candidates(path)
    assert {token_id: math.exp(value) for value, token_id in found} == pytest.approx(expected)
    assert list(found) == sorted(found, reverse=True)


def test_what_followed_the_longest_match_comes_first() -> None:
    """The last occurrence of "1 2 3 4" went on with 8; the one before "0" as well stood there with 9."""
    text = [0, 1, 2, 3, 4, 9, 5, 1, 2, 3, 4, 8, 0, 1, 2, 3, 4]
    session = indexed(NOTHING_KNOWN, text)
    assert [token_id for _, token_id in session.candidates([])] == [9, 8]
    ngram = NgramSession(OpenDraft(tuple(text), len(text), 60), range(1, 5))
    assert ngram.propose(3) == [9, 5, 1]
    assert paths(ngram.propose_tree(2, 4)) == [(9,), (9, 5), (8,), (8, 0)]


# Trees


def test_a_tree_has_the_likeliest_paths() -> None:
    session = open_session(make_drafter(KNOWN), [9, 1])
    found = tree(session, 3, 5)
    assert paths(found) == [(2,), (2, 5), (2, 5, 6), (2, 6), (3,)]
    assert paths(tree(session, 2, 5)) == [(2,), (2, 5), (2, 6), (3,), (2, 4)]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@given(
    seed=st.integers(0, 2**32),
    token_ids=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    max_depth=st.integers(1, 3),
    more=st.integers(1, 10),
    min_draft_confidence=st.sampled_from([0.0, 0.2]),
)
def test_a_tree_keeps_to_its_limits_and_has_the_likeliest_of_all_paths(
    sampling: SamplingParams,
    seed: int,
    token_ids: list[int],
    max_depth: int,
    more: int,
    min_draft_confidence: float,
) -> None:
    session = indexed(
        random_table(Random(seed)), token_ids, sampling=sampling, min_draft_confidence=min_draft_confidence
    )
    found = tree(session, max_depth, max_depth + more)
    assert len(found) <= max_depth + more
    assert found.depth <= max_depth

    worths: dict[tuple[int, ...], float] = {(): 0.0}
    best = [token_id for _, token_id in session.candidates([])[:1]]
    ends: list[tuple[int, ...]] = [()]
    for _ in range(max_depth):
        children = {
            (*path, token_id): (own, worths[path] + own)
            for path in ends
            for own, token_id in session.candidates(path)
        }
        ends = [
            path
            for path, (own, whole) in children.items()
            if path == tuple(best)
            or (math.exp(own) >= min_draft_confidence and whole >= math.log(LEAST_PROBABILITY))
        ]
        worths |= {path: children[path][1] for path in ends}
    expected = sorted((worth for path, worth in worths.items() if path), reverse=True)
    assert [worths[path] for path in paths(found)] == pytest.approx(expected[: max_depth + more])
    assert list(found.token_ids[:1]) == best


# Confidence


@pytest.mark.parametrize(
    ("confidence", "best", "whole_tree"),
    [
        (0.05, [2, 5, 6], [(2,), (2, 5), (2, 5, 6), (2, 6), (3,), (2, 4), (3, 7)]),
        (0.1, [2, 5, 6], [(2,), (2, 5), (2, 5, 6), (2, 6)]),
        (0.7, [2, 5, 6], [(2,), (2, 5), (2, 5, 6)]),
        (0.8, [2], [(2,)]),
        # The first token is drafted in any case.
        (0.9, [2], [(2,)]),
    ],
)
def test_what_is_less_likely_than_asked_follows_nothing(
    confidence: float, best: list[int], whole_tree: list[tuple[int, ...]]
) -> None:
    session = open_session(make_drafter(KNOWN), [9, 1], min_draft_confidence=confidence)
    assert chain(session, 8) == best
    assert paths(tree(session, 8, 9)) == whole_tree


# Above temperature 0


@pytest.mark.parametrize("temperature", [0.3, 0.8, 1.5])
@given(
    seed=st.integers(0, 2**32),
    noise_seed=st.integers(0, 2**64 - 1),
    token_ids=st.lists(st.integers(0, 5), min_size=1, max_size=12),
)
def test_sampled_candidates_come_in_the_order_of_the_shared_noise(
    temperature: float, seed: int, noise_seed: int, token_ids: list[int]
) -> None:
    table = random_table(Random(seed))
    sampling = SamplingParams(temperature=temperature, seed=noise_seed)
    session, plain = indexed(table, token_ids, sampling=sampling), indexed(table, token_ids)
    noise = GumbelNoise(torch.arange(VOCABULARY.size))
    for path in ([], [0], [3, 1]):
        row = noise(noise_seed, [len(token_ids) + len(path)])[0].tolist()
        scores = {
            token_id: log_prob / temperature + row[token_id] for log_prob, token_id in plain.candidates(path)
        }
        found = session.candidates(path)
        assert [token_id for _, token_id in found] == sorted(scores, key=scores.__getitem__, reverse=True)
        left = 1 - sum(math.exp(log_prob) for log_prob, _ in plain.candidates(path))
        others = left ** (1 / temperature) * math.exp(0.5772) if left > 0 else 0.0
        total = others + sum(math.exp(score) for score in scores.values())
        assert [math.exp(value) for value, _ in found] == pytest.approx(
            [math.exp(scores[token_id]) / total for _, token_id in found]
        )


def test_a_sampled_token_is_no_likelier_for_being_the_only_one_known() -> None:
    table = table_of({(1,): Following({2: 0.9}), (2,): Following({3: 0.2})})
    drafts = []
    for seed in range(200):
        sampling = SamplingParams(temperature=1.0, seed=seed)
        session = open_session(make_drafter(table), [9, 1], sampling=sampling, min_draft_confidence=0.5)
        drafts.append(chain(session, 8))
    # The noise makes some of them likely, and most of them not.
    assert all(draft[:1] == [2] for draft in drafts)
    assert 0 < sum(len(draft) > 1 for draft in drafts) < 60


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_no_more_than_the_best_eight_are_looked_at(sampling: SamplingParams) -> None:
    few = {token_id: 0.1 - token_id / 1000 for token_id in range(10)}
    session = indexed(table_of({(12,): Following(few)}), [12], sampling=sampling)
    plain = {token_id: math.log(value) for token_id, value in few.items()}
    noise = [0.0] * 16
    if not sampling.is_greedy:
        noise = GumbelNoise(torch.arange(16))(sampling.seed, [1])[0].tolist()
    scores = {
        token_id: value / (sampling.temperature or 1) + noise[token_id] for token_id, value in plain.items()
    }
    best = sorted(scores, key=scores.__getitem__, reverse=True)[:8]
    assert [token_id for _, token_id in session.candidates([])] == best


# As a drafter


def test_sessions_are_drafted_for_side_by_side() -> None:
    drafter = make_drafter(KNOWN)
    first, second = open_session(drafter, [9, 1]), open_session(drafter, [8, 3, 11, 3])
    items = [
        DraftItem(drafter, first, 2, 1),
        DraftItem(drafter, second, 1, 1),
        DraftItem(drafter, first, 1, 1, 2),
    ]
    assert drafter.propose(items) == [[2, 5], [7], DraftTree((2, 3), (-1, -1))]


def test_a_folder_becomes_a_drafter(tmp_path: Path) -> None:
    KNOWN.save(tmp_path)
    config = DrafterConfig(
        drafter=(f"usual=ngram-lm:{tmp_path}",), max_draft_depth=5, max_draft_nodes=9, ngram_min=2
    )
    (drafter,) = load_drafters(config).values()
    assert isinstance(drafter, NgramLmDrafter)
    traits = drafter.traits
    assert (traits.name, traits.family) == ("usual", "ngram-lm")
    assert (traits.model_id, traits.vocabulary_fingerprint, traits.vocab_size) == (
        "a-target",
        "its-fingerprint",
        16,
    )
    assert (traits.max_draft_depth, traits.default_draft_depth, traits.max_draft_nodes) == (5, 5, 9)
    assert chain(open_session(drafter, [9, 1]), 8) == [2, 5, 6]
    # Matches of one token are not looked for.
    assert chain(open_session(drafter, [13, 14, 13]), 4) == []
    assert chain(open_session(drafter, [12, 13, 14, 12, 13]), 1) == [14]


def test_without_a_folder_it_is_the_table_of_the_embedded_target() -> None:
    (drafter,) = load_drafters(DrafterConfig(drafter=("ngram-lm",))).values()
    assert drafter.traits.model_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert drafter.traits.vocab_size == 49152


def test_a_folder_without_a_table_is_no_drafter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InvalidArgumentError, match="holds a 'llama' model"):
        load_drafters(DrafterConfig(drafter=(f"ngram-lm:{tmp_path}",)))
