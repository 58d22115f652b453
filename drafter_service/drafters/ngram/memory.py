"""What the target said to earlier requests, for drafts of later ones of the same caller.

Whoever may use a drafter can learn from acceptance statistics what its drafts were. So a text is proposed
only to requests with the caller key and the cache salt of the request that it answered.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LEAST_SIZE = 2
"""Shortest n-gram that is looked up, tokens: after a single token there are too many ways to go on."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose texts these are."""

    caller_key: str
    cache_salt: str
    vocabulary_fingerprint: str = ""
    """Of the target: the tokens of another one mean something else."""


@dataclass(frozen=True, slots=True, eq=False)
class _Answer:
    owner: Owner
    token_ids: tuple[int, ...]


class AnswerMemory:
    """The answers of a bounded number of tokens, the last ones of all callers together.

    Args:
        max_tokens: tokens that are kept; 0: nothing is remembered.
        max_size: length of the longest n-gram that is looked up, tokens.
    """

    def __init__(self, max_tokens: int, max_size: int) -> None:
        self._max_tokens = max_tokens
        self._sizes = range(LEAST_SIZE, max_size + 1)
        self._answers: deque[_Answer] = deque()
        self._places: dict[tuple[Owner, tuple[int, ...]], tuple[_Answer, int]] = {}
        """For each n-gram of an owner's answers, the last one it was seen in, and the position after it."""
        self.num_tokens = 0

    def add(self, owner: Owner, token_ids: Sequence[int]) -> None:
        """Remember an answer; the oldest are forgotten where there is no room."""
        answer = _Answer(owner, tuple(token_ids[-self._max_tokens :] if self._max_tokens else ()))
        if len(answer.token_ids) <= LEAST_SIZE:
            return
        self._answers.append(answer)
        self.num_tokens += len(answer.token_ids)
        for key, position in self._ngrams(answer):
            self._places[key] = (answer, position)
        while self.num_tokens > self._max_tokens:
            self._forget(self._answers.popleft())

    def find(self, owner: Owner, token_ids: Sequence[int]) -> tuple[Sequence[int], int] | None:
        """Return the answer to this owner in which an n-gram was seen last, and the position after it."""
        found = self._places.get((owner, tuple(token_ids)))
        return (found[0].token_ids, found[1]) if found else None

    def _ngrams(self, answer: _Answer) -> Iterator[tuple[tuple[Owner, tuple[int, ...]], int]]:
        """Yield every n-gram that a token follows, and the position of that token."""
        for position in range(LEAST_SIZE, len(answer.token_ids)):
            for size in self._sizes:
                if size <= position:
                    yield (answer.owner, answer.token_ids[position - size : position]), position

    def _forget(self, answer: _Answer) -> None:
        self.num_tokens -= len(answer.token_ids)
        for key, _ in self._ngrams(answer):
            if key in self._places and self._places[key][0] is answer:
                del self._places[key]
