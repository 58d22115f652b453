"""Token sequences to train on: prompts with the target's own answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import numpy.typing
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from specdec.contract.errors import InvalidArgumentError

REPLAYED_BATCHES = 256
"""Number of batches whose features are kept for another pass."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """A prompt and its answer."""

    token_ids: tuple[int, ...]
    prompt_length: int


@dataclass(frozen=True, slots=True, eq=False)
class TokenData:
    """Many sequences in one array."""

    token_ids: numpy.typing.NDArray[numpy.int64]
    """[num_tokens]"""
    offsets: numpy.typing.NDArray[numpy.int64]
    """[num_sequences + 1] where each sequence starts."""
    prompt_lengths: numpy.typing.NDArray[numpy.int64]
    """[num_sequences] number of tokens of each sequence that are its prompt."""

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> TokenData:
        """Read a safetensors file of `token_ids`, `sequence_offsets` and `prompt_lengths`.

        Raises:
            InvalidArgumentError: the file is not of that form, or has tokens the target lacks.
        """
        try:
            tensors = load_file(path)
            data = cls(
                *(
                    tensors[name].astype(numpy.int64)
                    for name in ("token_ids", "sequence_offsets", "prompt_lengths")
                )
            )
        except (OSError, SafetensorError, KeyError) as error:
            raise InvalidArgumentError(f"{path} holds no token sequences: {error}", field="tokens") from error
        data._check(path, vocab_size)
        return data

    def _check(self, path: Path, vocab_size: int) -> None:
        lengths = numpy.diff(self.offsets)
        right = (
            len(self) > 0
            and len(self.offsets) == len(self) + 1
            and self.offsets[0] == 0
            and self.offsets[-1] == len(self.token_ids)
            and bool((lengths >= self.prompt_lengths).all())
            and bool((self.prompt_lengths > 0).all())
        )
        if not right:
            raise InvalidArgumentError(
                f"{path}: sequence_offsets and prompt_lengths do not fit token_ids.", field="tokens"
            )
        if self.token_ids.min() < 0 or self.token_ids.max() >= vocab_size:
            raise InvalidArgumentError(
                f"{path} has token ids outside the target's {vocab_size}.", field="tokens"
            )

    @classmethod
    def of(cls, sequences: Sequence[TokenSequence]) -> TokenData:
        """Put sequences together."""
        lengths = [len(sequence.token_ids) for sequence in sequences]
        return cls(
            numpy.array([token for s in sequences for token in s.token_ids], numpy.int64),
            numpy.cumsum([0, *lengths]).astype(numpy.int64),
            numpy.array([s.prompt_length for s in sequences], numpy.int64),
        )

    @classmethod
    def joined(cls, parts: Sequence[TokenData]) -> TokenData:
        """Put the sequences of several files together."""
        starts = numpy.cumsum([0, *(len(part.token_ids) for part in parts)])
        offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls(
            numpy.concatenate([part.token_ids for part in parts]),
            numpy.concatenate([*offsets, starts[-1:]]),
            numpy.concatenate([part.prompt_lengths for part in parts]),
        )

    def save(self, path: Path, made_with: Mapping[str, str] | None = None) -> None:
        """Write what `load` reads.

        Args:
            made_with: options of the generation, which the file's metadata keeps.
        """
        tensors: dict[str, numpy.typing.NDArray[Any]] = {
            "token_ids": self.token_ids.astype(numpy.uint32),
            "sequence_offsets": self.offsets,
            "prompt_lengths": self.prompt_lengths.astype(numpy.int32),
        }
        save_file(tensors, path, metadata=dict(made_with or {}))

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    def __getitem__(self, index: int) -> TokenSequence:
        start, stop = self.offsets[index], self.offsets[index + 1]
        return TokenSequence(tuple(self.token_ids[start:stop].tolist()), int(self.prompt_lengths[index]))

    @property
    def num_response_tokens(self) -> int:
        """Number of answer tokens."""
        return len(self.token_ids) - int(self.prompt_lengths.sum())

    @property
    def fingerprint(self) -> str:
        """Checksum of the sequences."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (self.token_ids, self.offsets, self.prompt_lengths):
            digest.update(part.tobytes())
        return digest.hexdigest()

    def draft_vocab(self, size: int) -> numpy.typing.NDArray[numpy.int64]:
        """Return the `size` most frequent tokens of the answers, ascending, or all if there are no more."""
        is_response = numpy.ones(len(self.token_ids), bool)
        for start, length in zip(self.offsets[:-1], self.prompt_lengths, strict=True):
            is_response[start : start + length] = False
        counts = numpy.bincount(self.token_ids[is_response])
        return numpy.sort(numpy.argsort(-counts, kind="stable")[:size])


def read_made_with(path: Path) -> dict[str, str]:
    """Read the options with which a file of sequences was generated."""
    with safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})


def split(data: TokenData, num_held_out: int) -> tuple[list[int], list[int]]:
    """Return the indices to train on and those held out: prompts with the lowest checksums, one sequence
    each.

    What is held out depends on no seed, and when data is added only new prompts can join it: a run that
    starts from an earlier drafter is not measured on what that drafter has seen.
    """
    by_prompt: dict[bytes, list[int]] = {}
    for index in range(len(data)):
        by_prompt.setdefault(_checksum(data[index]), []).append(index)
    order = sorted(by_prompt)
    num_held_out = min(num_held_out, len(order) // 2)
    kept = [index for checksum in order[num_held_out:] for index in by_prompt[checksum]]
    return sorted(kept), [by_prompt[checksum][0] for checksum in order[:num_held_out]]


def _checksum(sequence: TokenSequence) -> bytes:
    """Return the checksum of a sequence's prompt."""
    prompt = numpy.array(sequence.token_ids[: sequence.prompt_length], numpy.uint32)
    return hashlib.blake2b(prompt.tobytes(), digest_size=16).digest()


class Batch(NamedTuple):
    """The sequences of one step."""

    number: int
    """The same for every pass over these sequences."""
    sequences: list[TokenSequence]
    is_last_pass: bool


def batches(
    data: TokenData,
    indices: Sequence[int],
    *,
    tokens_per_step: int,
    max_length: int,
    passes: int,
    seed: int,
    skip: int,
) -> Iterator[Batch]:
    """Yield batches of at least `tokens_per_step` answer tokens without end, in shuffled epochs.

    Args:
        max_length: length at which longer sequences are cut, tokens.
        passes: how often a batch comes; at most REPLAYED_BATCHES different batches come in between.
        skip: number of batches to leave out, with which a resumed run goes on where it was.
    """
    rng = numpy.random.default_rng(seed)
    fresh = enumerate(_fresh_batches(data, indices, tokens_per_step, max_length, rng))
    while True:
        kept = list(islice(fresh, REPLAYED_BATCHES)) if passes > 1 else [next(fresh)]
        for number_of_pass in range(1, passes + 1):
            for index in range(len(kept)) if number_of_pass == 1 else rng.permutation(len(kept)).tolist():
                if skip:
                    skip -= 1
                else:
                    yield Batch(*kept[index], is_last_pass=number_of_pass == passes)


def _fresh_batches(
    data: TokenData,
    indices: Sequence[int],
    tokens_per_step: int,
    max_length: int,
    rng: numpy.random.Generator,
) -> Iterator[list[TokenSequence]]:
    lengths = numpy.minimum(numpy.diff(data.offsets), max_length)
    fitting = [index for index in indices if lengths[index] >= data.prompt_lengths[index] + 2]
    if not fitting:
        raise InvalidArgumentError(
            f"No sequence has an answer of two tokens within its first {max_length}: raise --max-length or "
            "--max-new-tokens, or give other --tokens.",
            field="tokens",
        )
    batch: list[TokenSequence] = []
    while True:
        for position in rng.permutation(len(fitting)).tolist():
            sequence = data[fitting[position]]
            batch.append(TokenSequence(sequence.token_ids[:max_length], sequence.prompt_length))
            if sum(len(s.token_ids) - s.prompt_length for s in batch) >= tokens_per_step:
                yield batch
                batch = []
