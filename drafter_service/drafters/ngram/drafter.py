"""Prompt lookup: a draft is what followed the longest match of the last tokens. It needs no model.

Occurrences are in the text itself and, where that is switched on, in earlier answers to the same caller.

Sources: Saxena 2023, "Prompt Lookup Decoding"; n-gram speculation as in vLLM and transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from drafter_service.drafters.base import (
    Drafted,
    Drafter,
    DrafterTraits,
    DraftItem,
    DraftSession,
    OpenDraft,
)
from drafter_service.drafters.ngram.memory import AnswerMemory, Owner
from specdec.contract.draft_tree import DraftTree, from_chains

DEFAULT_DRAFT_DEPTH = 8
_AFTER_ONE_TOKEN = 2
"""Most draft tokens after a match of one token: such matches are frequent and say little."""
_MAX_MATCHES = 64
"""Most occurrences considered for a tree; many have the same continuation."""
REACH = 24
"""Most committed tokens of a match that are counted, or the largest size: the longer, the surer."""


@dataclass(frozen=True, slots=True)
class Match:
    """An earlier place where the last tokens stood as well."""

    token_ids: Sequence[int]
    """The text."""
    start: int
    """Position after the match in it."""
    length: int
    """How many tokens before it are the same."""
    is_own: bool = True
    """Whether it is the request's own text, and not an earlier answer."""


class NgramSession(DraftSession):
    """Committed tokens and, for each n-gram in them, the positions after its occurrences, the last first."""

    def __init__(self, request: OpenDraft, sizes: range, memory: AnswerMemory | None = None) -> None:
        super().__init__(request)
        self.memory = memory or AnswerMemory(0, sizes[-1])
        self.owner = Owner(request.caller_key, request.cache_salt, request.vocabulary_fingerprint)
        self.sizes = sizes
        """Sizes of the n-grams that are looked up, tokens."""
        self.reach = max(REACH, sizes[-1])
        """How many of the committed tokens are compared with earlier places."""
        self._next_position: dict[tuple[int, ...], int] = {}
        self._earlier: dict[tuple[int, int], int] = {}
        """The position after an n-gram's previous occurrence, by (size, position after this occurrence)."""
        self._num_indexed = 0

    def propose(self, draft_depth: int) -> list[int]:
        """Draft the continuation of the longest n-gram that occurred before."""
        return next(self._chains(draft_depth), [])

    def propose_tree(self, draft_depth: int, draft_nodes: int) -> DraftTree:
        """Draft what followed earlier occurrences of the last tokens, of longer n-grams first."""
        return from_chains(islice(self._chains(draft_depth), _MAX_MATCHES), draft_nodes)

    def _chains(self, draft_depth: int) -> Iterator[list[int]]:
        """Yield what followed each earlier occurrence of the last tokens, of the longest matches first.

        Of n-grams of a size those in the text come first, then the last one in an earlier answer.
        """
        self.index()
        for size in reversed(self.sizes):
            if size > len(self.token_ids):
                continue
            length = _length(size, draft_depth)
            matches = self.matches(self.recent(()), size, _MAX_MATCHES)
            for match in sorted(matches, key=lambda match: -match.length):
                yield _continuation(match, length)

    def recent(self, path: Sequence[int]) -> list[int]:
        """Return the tokens that matches are counted in: the last ones committed, then a path of drafts."""
        return [*self.token_ids[-self.reach :], *path]

    def matches(self, recent: Sequence[int], size: int, most: int) -> list[Match]:
        """Return where the last `size` tokens stood before, the last occurrence first, and how many more
        tokens before them are the same; an earlier answer comes last."""
        if size > len(recent):
            return []
        starts = islice(self.occurrences(recent[-size:]), most)
        found = [Match(self.token_ids, start, _common(self.token_ids, start, recent)) for start in starts]
        if remembered := self.memory.find(self.owner, recent[-size:]):
            answer, start = remembered
            found.append(Match(answer, start, _common(answer, start, recent), is_own=False))
        return found

    def occurrences(self, token_ids: Sequence[int]) -> Iterator[int]:
        """Yield the position after each occurrence of an n-gram, the last first; its size must be in
        `sizes`."""
        start = self._next_position.get(tuple(token_ids))
        while start is not None:
            yield start
            start = self._earlier.get((len(token_ids), start))

    def index(self) -> None:
        """Enter the tokens that were committed since the last call."""
        # An n-gram is entered when a token follows it, so the current suffix never finds itself.
        for position in range(self._num_indexed, len(self.token_ids)):
            for size in self.sizes:
                if size <= position:
                    ngram = tuple(self.token_ids[position - size : position])
                    if ngram in self._next_position:
                        self._earlier[size, position] = self._next_position[ngram]
                    self._next_position[ngram] = position
        self._num_indexed = len(self.token_ids)


def _common(token_ids: Sequence[int], start: int, recent: Sequence[int]) -> int:
    """Return how many tokens before a position are the same as the last ones."""
    length, most = 0, min(start, len(recent))
    while length < most and token_ids[start - 1 - length] == recent[-1 - length]:
        length += 1
    return length


def _continuation(match: Match, draft_depth: int) -> list[int]:
    """Return the tokens after a match; one close to the end of the text itself repeats its period."""
    draft = list(match.token_ids[match.start : match.start + draft_depth])
    period = len(draft)
    while match.is_own and len(draft) < draft_depth:
        draft.append(draft[len(draft) - period])
    return draft


def _length(size: int, draft_depth: int) -> int:
    """Return how many tokens are drafted after a match of a size."""
    return draft_depth if size > 1 else min(draft_depth, _AFTER_ONE_TOKEN)


class NgramDrafter(Drafter):
    """Drafts by looking up n-grams of `min_size` to `max_size` tokens, longest first.

    Args:
        memory_tokens: tokens of earlier answers that are looked up as well, see AnswerMemory.
    """

    def __init__(
        self,
        name: str,
        *,
        min_size: int,
        max_size: int,
        max_draft_depth: int,
        max_draft_nodes: int = 64,
        memory_tokens: int = 0,
    ) -> None:
        self._sizes = range(min_size, max_size + 1)
        self.memory = AnswerMemory(memory_tokens, max_size)
        self.traits = DrafterTraits(
            name=name,
            family="ngram",
            max_draft_depth=max_draft_depth,
            default_draft_depth=min(DEFAULT_DRAFT_DEPTH, max_draft_depth),
            max_draft_nodes=max_draft_nodes,
        )

    def open(self, request: OpenDraft) -> NgramSession:
        """Open a session with an empty index; the first round fills it."""
        return NgramSession(request, self._sizes, self.memory)

    def close(self, session: DraftSession) -> None:
        """Remember what the target said, where that is switched on."""
        assert isinstance(session, NgramSession)
        self.memory.add(session.owner, session.token_ids[session.prompt_length :])

    def propose(self, items: Sequence[DraftItem]) -> list[Drafted]:
        """Look up the last tokens of each item."""
        return [_draft(item) for item in items]


def _draft(item: DraftItem) -> Drafted:
    assert isinstance(item.session, NgramSession)
    if item.wants_tree:
        return item.session.propose_tree(item.draft_depth, item.draft_nodes)
    return item.session.propose(item.draft_depth)
