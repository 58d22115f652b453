"""An n-gram language model over token ids, as a table in memory: what a target usually says.

`specdec train ngram-lm` makes it by interpolated absolute discounting (Ney, Essen, Kneser 1994): a constant
is taken from each count, and what is saved goes to what the shorter context says. Contexts that say little
more than the shorter one are left out (Seymore, Rosenfeld 1996).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy
import numpy.typing
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from specdec.contract.errors import InvalidArgumentError

MODEL_TYPE = "specdec_ngram_lm"
_WEIGHTS = "ngrams.safetensors"
_MULTIPLIER = 0x9E3779B97F4A7C15
_MASK64 = 2**64 - 1
_LEAST_WEIGHT = 0.05
"""Weight of a shorter context below which it is not looked up."""

UInt64s = numpy.typing.NDArray[numpy.uint64]


def extended_hash(hashes: UInt64s, token_ids: UInt64s) -> UInt64s:
    """Hash n-grams, from the hashes of all but their last tokens (0 for none) and these last tokens."""
    mixed = (hashes ^ (token_ids + numpy.uint64(1))) * numpy.uint64(_MULTIPLIER)
    return mixed ^ (mixed >> numpy.uint64(29))


def ngram_hash(token_ids: Sequence[int]) -> int:
    """Hash a single n-gram, as `extended_hash` does."""
    value = 0
    for token_id in token_ids:
        value = (value ^ (token_id + 1)) * _MULTIPLIER & _MASK64
        value ^= value >> 29
    return value


def _are_shares(values: numpy.typing.NDArray[numpy.float16]) -> bool:
    """Return whether all values are between 0 and 1; NaN is not."""
    return bool(((values >= 0) & (values <= 1)).all())


def is_table(folder: Path) -> bool:
    """Return whether a folder holds a table, by its config."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == MODEL_TYPE


@dataclass(frozen=True, slots=True)
class TargetVocabulary:
    """The target vocabulary whose tokens a table has."""

    model_id: str
    fingerprint: str
    size: int


@dataclass(frozen=True, eq=False)
class NgramTable:
    """The tokens that are likeliest to follow each context, contexts of all lengths together."""

    vocabulary: TargetVocabulary
    max_size: int
    """Tokens of the longest context."""
    contexts: UInt64s
    """[num_contexts] hashes of the contexts, ascending."""
    counts: numpy.typing.NDArray[numpy.uint8]
    """[num_contexts] number of tokens listed for each context."""
    backoffs: numpy.typing.NDArray[numpy.float16]
    """[num_contexts] weight of what the shorter context says of other tokens."""
    token_ids: numpy.typing.NDArray[numpy.uint16] | numpy.typing.NDArray[numpy.uint32]
    """[num_entries] tokens that follow, context after context, the likelier tokens first."""
    probabilities: numpy.typing.NDArray[numpy.float16]
    """[num_entries] probabilities of these tokens, what shorter contexts say included."""

    @cached_property
    def _stops(self) -> numpy.typing.NDArray[numpy.int64]:
        return self.counts.astype(numpy.int64).cumsum()

    def candidates(self, token_ids: Sequence[int]) -> dict[int, float]:
        """Return the probabilities of the tokens that are likeliest to follow; all others are unlikely.

        Args:
            token_ids: the tokens to follow, of which only the last `max_size` matter.
        """
        sizes = range(min(self.max_size, len(token_ids)), 0, -1)
        wanted = numpy.array([ngram_hash(token_ids[-size:]) for size in sizes], numpy.uint64)
        places = self.contexts.searchsorted(wanted)
        found: dict[int, float] = {}
        weight = 1.0
        for place, context in zip(places.tolist(), wanted, strict=True):
            if place == len(self.contexts) or self.contexts[place] != context:
                continue
            stop = int(self._stops[place])
            entries = slice(stop - int(self.counts[place]), stop)
            for token_id, probability in zip(
                self.token_ids[entries].tolist(), self.probabilities[entries].tolist(), strict=True
            ):
                found.setdefault(token_id, weight * probability)
            weight *= float(self.backoffs[place])
            if weight < _LEAST_WEIGHT:
                break
        return found

    @classmethod
    def load(cls, folder: Path) -> NgramTable:
        """Read a folder that `save` wrote.

        Raises:
            InvalidArgumentError: the folder does not hold a table, or the table is damaged.
        """
        try:
            config = json.loads((folder / "config.json").read_text())
            if config["model_type"] != MODEL_TYPE:
                raise InvalidArgumentError(
                    f"{folder} holds a {config['model_type']!r} model; the ngram-lm drafter runs what "
                    "specdec train ngram-lm writes.",
                    field="drafter",
                )
            vocabulary = TargetVocabulary(
                config["target"], config["specdec_vocabulary_fingerprint"], config["vocab_size"]
            )
            table = cls(vocabulary, config["max_size"], **load_file(folder / _WEIGHTS))
            table._check(folder)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InvalidArgumentError(f"{folder} holds no table: {error!r}", field="drafter") from error
        return table

    def _check(self, folder: Path) -> None:
        known = self.vocabulary
        right = (
            all(isinstance(number, int) and number > 0 for number in (self.max_size, known.size))
            and isinstance(known.model_id, str)
            and isinstance(known.fingerprint, str)
            and self._has_right_types()
            and len(self.contexts) == len(self.counts) == len(self.backoffs) > 0
            and int(self.counts.sum(dtype=numpy.int64)) == len(self.token_ids) == len(self.probabilities)
            and bool((self.contexts[1:] > self.contexts[:-1]).all())
            and int(self.token_ids.max(initial=0)) < known.size
            and all(_are_shares(values) for values in (self.backoffs, self.probabilities))
        )
        if not right:
            raise InvalidArgumentError(f"{folder}/{_WEIGHTS} is damaged; count it anew.", field="drafter")

    def _has_right_types(self) -> bool:
        arrays = (self.contexts, self.counts, self.backoffs, self.token_ids, self.probabilities)
        kinds = [array.dtype.name for array in arrays]
        named = kinds[:3] + kinds[4:] == ["uint64", "uint8", "float16", "float16"]
        return named and kinds[3] in ("uint16", "uint32") and all(array.ndim == 1 for array in arrays)

    def save(self, folder: Path) -> None:
        """Write config and table into a folder that exists."""
        config = {
            "model_type": MODEL_TYPE,
            "target": self.vocabulary.model_id,
            "specdec_vocabulary_fingerprint": self.vocabulary.fingerprint,
            "vocab_size": self.vocabulary.size,
            "max_size": self.max_size,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        names = ("contexts", "counts", "backoffs", "token_ids", "probabilities")
        save_file({name: getattr(self, name) for name in names}, folder / _WEIGHTS)
