"""Tables of n-grams: counted against a reference in plain dicts, kept in files, asked."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from drafter_service.drafters.ngram_lm.table import (
    MODEL_TYPE,
    NgramTable,
    TargetVocabulary,
    extended_hash,
    ngram_hash,
)
from drafter_service.training.config import CountOptions
from drafter_service.training.data import TokenData, TokenSequence
from drafter_service.training.ngram_lm import count, measure
from specdec.contract.errors import InvalidArgumentError
from tests.ngram_tables import VOCABULARY, Following, contents, table_of

DISCOUNT, LEAST_PROBABILITY, MAX_ENTRIES = 0.75, 0.02, 4
HALF_PRECISION = 1e-3
"""Relative error of what is stored as float16, at most."""
WEIGHTS = "ngrams.safetensors"

EVERYTHING = CountOptions(min_count=1, min_gain=-math.inf)
"""A context may also tell less than the shorter one: its gain is negative then."""

sequences = st.lists(
    st.tuples(
        st.lists(st.integers(0, 4), min_size=1, max_size=3),
        st.lists(st.integers(0, 4), min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=6,
).map(lambda pairs: [TokenSequence((*prompt, *answer), len(prompt)) for prompt, answer in pairs])


class Reference:
    """Interpolated absolute discounting of all answers, written out."""

    def __init__(self, sequences: Sequence[TokenSequence], max_size: int) -> None:
        self.followers: dict[tuple[int, ...], Counter[int]] = {}
        for sequence in sequences:
            for position in range(sequence.prompt_length, len(sequence.token_ids)):
                for size in range(min(max_size, position) + 1):
                    context = sequence.token_ids[position - size : position]
                    self.followers.setdefault(context, Counter())[sequence.token_ids[position]] += 1

    @property
    def contexts(self) -> list[tuple[int, ...]]:
        """All contexts but the empty one."""
        return [context for context in self.followers if context]

    def backoff(self, context: tuple[int, ...]) -> float:
        """Return the share taken from all followers, which the followers of the shorter context get."""
        followers = self.followers[context]
        return DISCOUNT * len(followers) / followers.total()

    def probability(self, context: tuple[int, ...], token_id: int) -> float:
        """Return the probability of a token after a context that occurred."""
        followers = self.followers[context]
        if not context:
            return followers[token_id] / followers.total()
        own = max(followers[token_id] - DISCOUNT, 0.0) / followers.total()
        return own + self.backoff(context) * self.probability(context[1:], token_id)

    def gain(self, context: tuple[int, ...]) -> float:
        """Return the nats that a context tells beyond the shorter one over all its occurrences."""
        return sum(
            number * math.log(self.probability(context, token_id) / self.probability(context[1:], token_id))
            for token_id, number in self.followers[context].items()
        )


def counted(sequences: Sequence[TokenSequence], options: CountOptions = EVERYTHING) -> NgramTable:
    return count(TokenData.of(sequences), range(len(sequences)), VOCABULARY, options)


def answer(*token_ids: int, after: Sequence[int]) -> TokenSequence:
    return TokenSequence((*after, *token_ids), len(after))


@given(sequences, st.integers(1, 4))
def test_counts_equal_the_definition(sequences: list[TokenSequence], max_size: int) -> None:
    reference = Reference(sequences, max_size)
    table = counted(sequences, replace(EVERYTHING, max_size=max_size))
    found = contents(table)
    assert set(found) == {ngram_hash(context) for context in reference.contexts}
    assert table.max_size == max_size
    for context in reference.contexts:
        following = found[ngram_hash(context)]
        expected = {
            token_id: reference.probability(context, token_id) for token_id in reference.followers[context]
        }
        likeliest = sorted(expected.values(), reverse=True)[:MAX_ENTRIES]
        assert list(following.probabilities.values()) == pytest.approx(
            [value for value in likeliest if value >= LEAST_PROBABILITY], rel=HALF_PRECISION
        )
        for token_id, value in following.probabilities.items():
            assert value == pytest.approx(expected[token_id], rel=HALF_PRECISION)
        assert following.backoff == pytest.approx(reference.backoff(context), rel=HALF_PRECISION)


@given(sequences, st.integers(1, 4), st.integers(1, 3), st.floats(0, 3))
def test_contexts_that_are_rare_or_tell_little_are_left_out(
    sequences: list[TokenSequence], max_size: int, min_count: int, min_gain: float
) -> None:
    reference = Reference(sequences, max_size)
    everything = contents(counted(sequences, replace(EVERYTHING, max_size=max_size)))
    found = contents(counted(sequences, CountOptions(max_size, min_count, min_gain)))
    for context in reference.contexts:
        gain = reference.gain(context)
        if len(context) > 1 and gain == pytest.approx(min_gain, abs=1e-9):
            continue
        is_common = reference.followers[context].total() >= min_count
        is_kept = len(context) == 1 or (is_common and gain > min_gain)
        assert (ngram_hash(context) in found) == is_kept, context
    # What is left is what it would be if nothing were left out.
    assert found.items() <= everything.items()


@given(sequences, st.integers(1, 4))
def test_candidates_of_a_counted_table_are_as_likely_as_the_definition_says(
    sequences: list[TokenSequence], max_size: int
) -> None:
    reference = Reference(sequences, max_size)
    table = counted(sequences, replace(EVERYTHING, max_size=max_size))
    found = contents(table)
    for context in reference.contexts:
        suffixes = [context[start:] for start in range(len(context))]
        for token_id, value in table.candidates(context).items():
            longest = next(suffix for suffix in suffixes if token_id in reference.followers[suffix])
            if token_id in found[ngram_hash(longest)].probabilities:
                # Each of several factors is rounded.
                assert value == pytest.approx(reference.probability(context, token_id), rel=5e-3)


def test_contexts_end_where_a_sequence_begins() -> None:
    found = contents(counted([answer(2, after=[1]), answer(4, 5, after=[3])]))
    assert set(found) == {ngram_hash(context) for context in ([1], [3], [4], [3, 4])}


def test_prompts_are_contexts_and_are_not_counted() -> None:
    found = contents(counted([answer(4, after=[1, 2, 3])]))
    assert set(found) == {ngram_hash(context) for context in ([3], [2, 3], [1, 2, 3])}
    assert all(following.probabilities == {4: 1.0} for following in found.values())


def test_sequences_count_as_often_as_they_are_named() -> None:
    data = TokenData.of([answer(1, after=[0]), answer(2, after=[0]), answer(3, after=[0])])
    found = contents(count(data, [0, 2, 2], VOCABULARY, EVERYTHING))[ngram_hash([0])]
    assert list(found.probabilities) == [3, 1]
    repeated = counted([data[0], data[2], data[2]])
    assert contents(repeated)[ngram_hash([0])] == found


def test_a_context_lists_its_four_likeliest_tokens_and_no_unlikely_ones() -> None:
    usual = [answer(1, after=[0])] * 60
    rare = [answer(token_id, after=[0]) for token_id in (2, 3, 3, 4, 4, 4, 5, 5, 5, 5, 6, 6, 6, 6, 6)]
    assert list(contents(counted([*usual, *rare]))[ngram_hash([0])].probabilities) == [1, 6, 5, 4]
    some = [*usual, *rare[:3]]
    assert (
        Reference(some, 1).probability((0,), 2) < LEAST_PROBABILITY < Reference(some, 1).probability((0,), 3)
    )
    assert list(contents(counted(some))[ngram_hash([0])].probabilities) == [1, 3]


def test_the_rarer_context_is_left_out() -> None:
    often, once = answer(2, after=[0, 1]), answer(3, after=[4, 1])
    kept = contents(counted([often, often, once], replace(EVERYTHING, min_count=2)))
    assert set(kept) == {ngram_hash(context) for context in ([1], [0, 1])}


def test_a_context_that_tells_nothing_new_is_left_out() -> None:
    # What follows 1 depends on the token before it; after 2 there is always 3.
    telling = [answer(5, after=[0, 1]), answer(6, after=[4, 1])] * 8
    idle = [answer(3, after=[0, 2]), answer(3, after=[4, 2])] * 8
    kept = contents(counted([*telling, *idle], CountOptions(min_count=2, min_gain=4.0)))
    assert set(kept) == {ngram_hash(context) for context in ([1], [2], [0, 1], [4, 1])}


def test_tokens_of_large_vocabularies_are_kept(tmp_path: Path) -> None:
    vocabulary = replace(VOCABULARY, size=70_000)
    data = TokenData.of([answer(69_999, after=[66_000])])
    count(data, [0], vocabulary, EVERYTHING).save(tmp_path)
    assert NgramTable.load(tmp_path).candidates([66_000]) == {69_999: 1.0}


def test_acceptance_is_measured_on_other_answers() -> None:
    learned, unknown = answer(2, 3, 4, 5, 6, after=[1]), answer(9, 10, 11, after=[8])
    data = TokenData.of([learned, unknown])
    table = count(data, [0], VOCABULARY, EVERYTHING)
    # The answer's first token is the target's own; then 2 tokens are right, and the target adds one more.
    found = measure(table, data, [0], 2)
    assert (found.num_answers, found.num_rounds, found.num_accepted) == (1, 2, 3)
    assert measure(table, data, [1], 2).num_accepted == 0
    no_answer = TokenData.of([TokenSequence((1, 2), 2)])
    assert measure(table, no_answer, [0], 2).num_answers == 0


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), min_size=3, max_size=3), min_size=1, max_size=5))
def test_hashes_of_arrays_are_those_of_ngrams(ngrams: list[list[int]]) -> None:
    token_ids = numpy.array(ngrams, numpy.uint64)
    hashes = numpy.zeros(len(ngrams), numpy.uint64)
    for size in range(1, 4):
        hashes = extended_hash(hashes, token_ids[:, size - 1])
        assert hashes.tolist() == [ngram_hash(ngram[:size]) for ngram in ngrams]


def test_ngrams_of_any_size_and_order_have_their_own_hashes() -> None:
    ngrams = [(), *((a,) for a in range(30)), *((a, b) for a in range(30) for b in range(30))]
    assert len({ngram_hash(ngram) for ngram in ngrams}) == len(ngrams)


# Asked


BACKING_OFF = {
    (1,): Following({2: 0.5, 3: 0.25}),
    (0, 1): Following({4: 0.75, 2: 0.125}, backoff=0.25),
    (5, 0, 1): Following({6: 1.0}, backoff=0.03125),
}


def test_shorter_contexts_say_the_rest() -> None:
    table = table_of(BACKING_OFF)
    assert table.candidates([1]) == {2: 0.5, 3: 0.25}
    assert table.candidates([0, 1]) == {4: 0.75, 2: 0.125, 3: 0.25 * 0.25}
    assert table.candidates([7, 7, 7, 0, 1]) == table.candidates([0, 1])


def test_unknown_longer_contexts_cost_nothing() -> None:
    assert table_of(BACKING_OFF).candidates([7, 1]) == {2: 0.5, 3: 0.25}


def test_a_shorter_context_of_hardly_any_weight_is_not_asked() -> None:
    assert table_of(BACKING_OFF).candidates([5, 0, 1]) == {6: 1.0}
    asked = table_of({**BACKING_OFF, (5, 0, 1): Following({6: 0.5}, backoff=0.25)})
    # Of the two weights, 1/4 each, the product is 1/16: more than 1/20.
    assert asked.candidates([5, 0, 1]) == {6: 0.5, 4: 0.75 / 4, 2: 0.125 / 4, 3: 0.25 / 16}


def test_unknown_contexts_and_no_context_say_nothing() -> None:
    table = table_of(BACKING_OFF)
    assert table.candidates([]) == {}
    # Wherever their hashes belong in the table: before, between and after those it has.
    assert all(table.candidates([token_id]) == {} for token_id in range(2, 200))


# In files


def test_a_folder_holds_the_table(tmp_path: Path) -> None:
    table = table_of(BACKING_OFF)
    table.save(tmp_path)
    loaded = NgramTable.load(tmp_path)
    assert loaded.vocabulary == VOCABULARY == TargetVocabulary("a-target", "its-fingerprint", 16)
    assert loaded.max_size == 3
    assert contents(loaded) == contents(table)
    assert loaded.contexts.dtype == numpy.uint64
    assert loaded.candidates([0, 1]) == table.candidates([0, 1])
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == MODEL_TYPE


@given(sequences)
def test_what_was_counted_passes_the_check(
    tmp_path_factory: pytest.TempPathFactory, sequences: list[TokenSequence]
) -> None:
    folder = tmp_path_factory.mktemp("table")
    table = counted(sequences)
    table.save(folder)
    assert contents(NgramTable.load(folder)) == contents(table)


def test_a_table_takes_the_place_of_another(tmp_path: Path) -> None:
    table_of(BACKING_OFF).save(tmp_path)
    smaller = table_of({(9,): Following({8: 1.0})})
    smaller.save(tmp_path)
    loaded = NgramTable.load(tmp_path)
    assert contents(loaded) == contents(smaller)
    assert loaded.max_size == 1


Spoil = Callable[[Path], object]


def change_config(**changes: Any) -> Spoil:
    """Write other values into the config; None removes a value."""

    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        kept = {name: value for name, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return spoil


def change_table(change: Callable[[dict[str, Any]], object]) -> Spoil:
    """Rewrite the tensors."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({name: numpy.array(value) for name, value in tensors.items()}, folder / WEIGHTS)

    return spoil


def take_nothing(tensors: dict[str, Any]) -> None:
    tensors.update({name: value[:0] for name, value in tensors.items()})


def swap_two(contexts: Any) -> Any:
    return contexts[[1, 0, *range(2, len(contexts))]]


SPOILED: dict[str, tuple[Spoil, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no table"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "holds no table"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "holds no table"),
    "no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "holds no table"),
    "no model type": (change_config(model_type=None), "holds no table"),
    "another model": (change_config(model_type="llama"), "holds a 'llama' model"),
    "no vocabulary": (change_config(specdec_vocabulary_fingerprint=None), "holds no table"),
    "no size": (change_config(max_size=None), "holds no table"),
    "contexts of no token": (change_config(max_size=0), "damaged"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "holds no table"),
    "no safetensors": (lambda f: (f / WEIGHTS).write_bytes(b"no tensors"), "holds no table"),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-1]), "holds no table"),
    "half of it": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:200]), "holds no table"),
    "a tensor missing": (change_table(lambda t: t.pop("backoffs")), "holds no table"),
    "a strange tensor": (change_table(lambda t: t.update(x=t["counts"])), "holds no table"),
    "contexts out of order": (change_table(lambda t: t.update(contexts=swap_two(t["contexts"]))), "damaged"),
    "a context twice": (change_table(lambda t: t["contexts"].put(1, t["contexts"][0])), "damaged"),
    "a token too large": (change_table(lambda t: t["token_ids"].put(0, 16)), "damaged"),
    "a smaller vocabulary": (change_config(vocab_size=6), "damaged"),
    "counts of more tokens": (change_table(lambda t: t["counts"].put(0, 9)), "damaged"),
    "counts of fewer tokens": (change_table(lambda t: t["counts"].put(0, 0)), "damaged"),
    "a count missing": (change_table(lambda t: t.update(counts=t["counts"][1:])), "damaged"),
    "a backoff missing": (change_table(lambda t: t.update(backoffs=t["backoffs"][1:])), "damaged"),
    "a probability missing": (
        change_table(lambda t: t.update(probabilities=t["probabilities"][1:])),
        "damaged",
    ),
    "nothing in it": (change_table(take_nothing), "damaged"),
    "a size in words": (change_config(max_size="5"), "damaged"),
    "a vocabulary in words": (change_config(vocab_size="260"), "damaged"),
    "contexts of another type": (
        change_table(lambda t: t.update(contexts=t["contexts"].astype(numpy.int64))),
        "damaged",
    ),
    "tokens of another type": (
        change_table(lambda t: t.update(token_ids=t["token_ids"].astype(numpy.float32))),
        "damaged",
    ),
    "a table of probabilities": (
        change_table(lambda t: t.update(probabilities=t["probabilities"][:, None])),
        "damaged",
    ),
    "a number for counts": (change_table(lambda t: t.update(counts=t["counts"][0])), "damaged"),
    "no probability": (change_table(lambda t: t["probabilities"].put(0, numpy.nan)), "damaged"),
    "less than none": (change_table(lambda t: t["probabilities"].put(0, -0.5)), "damaged"),
    "a backoff above 1": (change_table(lambda t: t["backoffs"].put(0, 2)), "damaged"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_damaged_and_other_folders_are_refused(name: str, tmp_path: Path) -> None:
    table_of(BACKING_OFF).save(tmp_path)
    spoil, message = SPOILED[name]
    spoil(tmp_path)
    with pytest.raises(InvalidArgumentError, match=message) as raised:
        NgramTable.load(tmp_path)
    assert str(tmp_path) in raised.value.message
    assert raised.value.field == "drafter"


def test_the_largest_token_of_a_vocabulary_is_no_damage(tmp_path: Path) -> None:
    table_of(BACKING_OFF).save(tmp_path)
    change_config(vocab_size=7)(tmp_path)
    assert NgramTable.load(tmp_path).vocabulary.size == 7
