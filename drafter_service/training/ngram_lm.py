"""Counts n-gram language models: tables of what follows what in the target's answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy
import numpy.typing

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import OpenDraft
from drafter_service.drafters.ngram_lm.drafter import NgramLmDrafter, NgramLmSession
from drafter_service.drafters.ngram_lm.table import NgramTable, TargetVocabulary, UInt64s, extended_hash
from drafter_service.training.acceptance import HeldOutAcceptance
from drafter_service.training.config import CountOptions
from drafter_service.training.data import TokenData
from specdec.contract.errors import InvalidArgumentError

_DISCOUNT = 0.75
"""Constant that is taken from each count."""
_MAX_ENTRIES = 4
"""Most tokens listed for a context: more than a small tree has room for."""
_LEAST_PROBABILITY = 0.02
"""Least probability of a listed token."""

Floats = numpy.typing.NDArray[numpy.float64]
Ints = numpy.typing.NDArray[numpy.int64]


class _Occurrences(NamedTuple):
    """All answer tokens, with what comes before them."""

    tokens: UInt64s
    """[num_tokens] all tokens of all sequences."""
    places: Ints
    """[num_occurrences] where the answer tokens are among them."""
    reach: Ints
    """[num_occurrences] number of tokens before each answer token in its sequence."""


class _Level(NamedTuple):
    """The contexts of one size that are kept, in ascending order of their hashes; fields as in NgramTable."""

    contexts: UInt64s
    counts: Ints
    backoffs: Floats
    token_ids: Ints
    probabilities: Floats


def count(
    data: TokenData, indices: Sequence[int], vocabulary: TargetVocabulary, options: CountOptions
) -> NgramTable:
    """Make the table of some sequences.

    Args:
        indices: indices of the sequences to count; a sequence that is named twice counts twice.

    Raises:
        InvalidArgumentError: the sequences have no answers, or no token is likely after another.
    """
    levels = list(_levels(_occurrences(data, indices), vocabulary.size, options))
    if not any(len(level.contexts) for level in levels):
        raise InvalidArgumentError(
            "No token is likely after any other in these answers; a table of them would be empty.",
            field="tokens",
        )
    contexts = numpy.concatenate([level.contexts for level in levels])
    counts = numpy.concatenate([level.counts for level in levels])
    firsts = numpy.cumsum(counts) - counts
    order = numpy.argsort(contexts)
    sizes = counts[order]
    # Where each entry of the sorted table is in the unsorted one.
    entries = numpy.repeat(firsts[order] - (numpy.cumsum(sizes) - sizes), sizes) + numpy.arange(sizes.sum())
    token_type = numpy.uint16 if vocabulary.size <= 2**16 else numpy.uint32
    return NgramTable(
        vocabulary,
        options.max_size,
        contexts=contexts[order],
        counts=sizes.astype(numpy.uint8),
        backoffs=numpy.concatenate([level.backoffs for level in levels])[order].astype(numpy.float16),
        token_ids=numpy.concatenate([level.token_ids for level in levels])[entries].astype(token_type),
        probabilities=numpy.concatenate([level.probabilities for level in levels])[entries].astype(
            numpy.float16
        ),
    )


def _occurrences(data: TokenData, indices: Sequence[int]) -> _Occurrences:
    parts = [numpy.asarray(data[index].token_ids, numpy.uint64) for index in indices]
    lengths = numpy.array([len(part) for part in parts])
    starts = numpy.repeat(numpy.cumsum(lengths) - lengths, lengths)
    tokens = numpy.concatenate(parts)
    within = numpy.arange(len(tokens)) - starts
    is_answer = within >= numpy.repeat(data.prompt_lengths[list(indices)], lengths)
    places = is_answer.nonzero()[0]
    if not len(places):
        raise InvalidArgumentError("The sequences have no answer tokens to count.", field="tokens")
    return _Occurrences(tokens, places, within[places])


def _levels(seen: _Occurrences, vocab_size: int, options: CountOptions) -> Iterator[_Level]:
    """Yield the contexts of one token, those of two, and so on."""
    tokens, places, reach = seen
    following = tokens[places]
    shares = numpy.bincount(following.astype(numpy.int64), minlength=vocab_size) / len(following)
    # For each occurrence, the probability of its token after the next shorter context.
    shorter: Floats = shares[following.astype(numpy.int64)]
    for size in range(1, options.max_size + 1):
        is_long = reach >= size
        if not is_long.any():
            return
        hashes = numpy.zeros(int(is_long.sum()), numpy.uint64)
        for distance in range(size, 0, -1):
            hashes = extended_hash(hashes, tokens[places[is_long] - distance])
        level, probabilities = _level(hashes, following[is_long], shorter[is_long], options, size)
        shorter = shorter.copy()
        shorter[is_long] = probabilities
        yield level


def _level(
    hashes: UInt64s, following: UInt64s, shorter: Floats, options: CountOptions, size: int
) -> tuple[_Level, Floats]:
    """Return the contexts of one size, and the probability of every occurrence's token.

    Args:
        hashes: hashes of the contexts [num_occurrences].
        following: tokens after the contexts [num_occurrences].
        shorter: probabilities of these tokens after the next shorter contexts [num_occurrences].
    """
    ngrams, first, which, counts = numpy.unique(
        extended_hash(hashes, following), return_index=True, return_inverse=True, return_counts=True
    )
    contexts, context = numpy.unique(hashes[first], return_inverse=True)  # of each n-gram
    totals = numpy.bincount(context, counts)
    backoffs = _DISCOUNT * numpy.bincount(context) / totals
    probabilities = (counts - _DISCOUNT) / totals[context] + backoffs[context] * shorter[first]
    gains = numpy.bincount(context, counts * (numpy.log(probabilities) - numpy.log(shorter[first])))
    # All other contexts fall back to the shortest ones, which are kept.
    is_kept = (totals >= options.min_count) & (gains >= options.min_gain) if size > 1 else totals > 0
    order = numpy.lexsort((-probabilities, context))
    ranks = numpy.arange(len(ngrams)) - numpy.searchsorted(context[order], context[order])
    listed = order[
        is_kept[context[order]] & (ranks < _MAX_ENTRIES) & (probabilities[order] >= _LEAST_PROBABILITY)
    ]
    kept, num_listed = numpy.unique(context[listed], return_counts=True)
    level = _Level(
        contexts[kept],
        num_listed,
        backoffs[kept],
        following[first[listed]].astype(numpy.int64),
        probabilities[listed],
    )
    return level, probabilities[which]


def measure(
    table: NgramTable, data: TokenData, indices: Sequence[int], draft_depth: int
) -> HeldOutAcceptance:
    """Measure the acceptance of chains, with n-grams of the text itself, on answers that were not counted."""
    # The sizes that a drafter service looks up by default.
    sizes = DrafterConfig()
    drafter = NgramLmDrafter(
        "ngram-lm",
        table,
        min_size=sizes.ngram_min,
        max_size=sizes.ngram_max,
        max_draft_depth=draft_depth,
    )
    accepted = [_accepted(drafter, data, index, draft_depth) for index in indices]
    return HeldOutAcceptance.of([counts for counts in accepted if counts], draft_depth)


def _accepted(drafter: NgramLmDrafter, data: TokenData, index: int, draft_depth: int) -> list[int]:
    """Count the drafts that would be accepted after each answer token but the last."""
    token_ids, prompt_length = data[index].token_ids, data[index].prompt_length
    session: NgramLmSession = drafter.open(
        OpenDraft(token_ids[:prompt_length], prompt_length, max_length=len(token_ids))
    )
    accepted = []
    for position in range(prompt_length, len(token_ids) - 1):
        session.commit([token_ids[position]], position + 1)
        draft = session.propose(draft_depth)
        right = [drafted == token for drafted, token in zip(draft, token_ids[position + 1 :], strict=False)]
        accepted.append(right.index(False) if False in right else len(right))
    return accepted
