"""N-gram tables written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy

from drafter_service.drafters.ngram_lm.table import NgramTable, TargetVocabulary, ngram_hash

VOCABULARY = TargetVocabulary("a-target", "its-fingerprint", 16)


class Following(NamedTuple):
    """What a table says of one context."""

    probabilities: Mapping[int, float]
    """By token, the likelier ones first."""
    backoff: float = 0.5


def table_of(
    contexts: Mapping[tuple[int, ...], Following], vocabulary: TargetVocabulary = VOCABULARY
) -> NgramTable:
    """Return a table of these contexts and no others."""
    ordered = [contexts[context] for context in sorted(contexts, key=ngram_hash)]
    return NgramTable(
        vocabulary,
        max_size=max(map(len, contexts)),
        contexts=numpy.array(sorted(map(ngram_hash, contexts)), numpy.uint64),
        counts=numpy.array([len(following.probabilities) for following in ordered], numpy.uint8),
        backoffs=numpy.array([following.backoff for following in ordered], numpy.float16),
        token_ids=numpy.array(
            [token for following in ordered for token in following.probabilities], numpy.uint16
        ),
        probabilities=numpy.array(
            [value for following in ordered for value in following.probabilities.values()], numpy.float16
        ),
    )


def contents(table: NgramTable) -> dict[int, Following]:
    """Return what a table says, by the contexts' hashes."""
    found, start = {}, 0
    for context, count, backoff in zip(table.contexts, table.counts, table.backoffs, strict=True):
        entries = slice(start, start + int(count))
        token_ids, values = table.token_ids[entries].tolist(), table.probabilities[entries].tolist()
        found[int(context)] = Following(dict(zip(token_ids, values, strict=True)), float(backoff))
        start = entries.stop
    return found
