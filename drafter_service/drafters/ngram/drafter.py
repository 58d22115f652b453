"""Prompt lookup: what followed the last occurrence of the last few tokens. Needs no model.

Sources: Saxena 2023, "Prompt Lookup Decoding"; n-gram speculation as in vLLM and transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from drafter_service.drafters.base import (
    Drafted,
    Drafter,
    DrafterTraits,
    DraftItem,
    DraftSession,
    OpenDraft,
)
from specdec.contract.draft_tree import DraftTree, from_chains

DEFAULT_NUM_DRAFT_TOKENS = 8
_AFTER_ONE_TOKEN = 2
"""Most draft tokens after a match of one token: it finds much and says little."""
_MAX_MATCHES = 64
"""Occurrences looked at for a tree; many say the same."""


class NgramSession(DraftSession):
    """Committed tokens and, per n-gram in them, the positions after its occurrences, the last one first."""

    def __init__(self, request: OpenDraft, sizes: range) -> None:
        super().__init__(request)
        self.sizes = sizes
        """Of the n-grams that are looked up, tokens."""
        self._next_position: dict[tuple[int, ...], int] = {}
        self._earlier: dict[tuple[int, int], int] = {}
        """By (size, position after an n-gram of that size), the position after its occurrence before."""
        self._num_indexed = 0

    def propose(self, draft_depth: int) -> list[int]:
        """The continuation of the longest n-gram that occurred before."""
        self.index()
        for size, start in self._matches():
            return self._continuation(start, _length(size, draft_depth))
        return []

    def propose_tree(self, draft_depth: int, draft_nodes: int) -> DraftTree:
        """What followed earlier occurrences of the last tokens, of longer n-grams first, the latest first."""
        self.index()
        chains = (self._continuation(start, _length(size, draft_depth)) for size, start in self._matches())
        return from_chains(islice(chains, _MAX_MATCHES), draft_nodes)

    def _matches(self) -> Iterator[tuple[int, int]]:
        """Sizes of earlier occurrences of the last tokens, and the positions after them."""
        for size in reversed(self.sizes):
            if size <= len(self.token_ids):
                yield from ((size, start) for start in self.occurrences(self.token_ids[-size:]))

    def occurrences(self, token_ids: Sequence[int]) -> Iterator[int]:
        """The positions after those of an n-gram of one of the sizes, the last one first."""
        start = self._next_position.get(tuple(token_ids))
        while start is not None:
            yield start
            start = self._earlier.get((len(token_ids), start))

    def index(self) -> None:
        """Enter what was committed since the last time."""
        # An n-gram is entered once a token follows it, so the current suffix never finds itself.
        for position in range(self._num_indexed, len(self.token_ids)):
            for size in self.sizes:
                if size <= position:
                    ngram = tuple(self.token_ids[position - size : position])
                    if ngram in self._next_position:
                        self._earlier[size, position] = self._next_position[ngram]
                    self._next_position[ngram] = position
        self._num_indexed = len(self.token_ids)

    def _continuation(self, start: int, draft_depth: int) -> list[int]:
        """Tokens from `start` on; a match close to the end repeats its period."""
        draft = self.token_ids[start : start + draft_depth]
        period = len(draft)
        while len(draft) < draft_depth:
            draft.append(draft[len(draft) - period])
        return draft


def _length(size: int, draft_depth: int) -> int:
    """How far a match of that size is followed."""
    return draft_depth if size > 1 else min(draft_depth, _AFTER_ONE_TOKEN)


class NgramDrafter(Drafter):
    """Drafts by looking up n-grams of `min_size` to `max_size` tokens, longest first."""

    def __init__(
        self, name: str, *, min_size: int, max_size: int, max_draft_depth: int, max_draft_nodes: int = 64
    ) -> None:
        self._sizes = range(min_size, max_size + 1)
        self.traits = DrafterTraits(
            name=name,
            family="ngram",
            max_draft_depth=max_draft_depth,
            default_draft_depth=min(DEFAULT_NUM_DRAFT_TOKENS, max_draft_depth),
            max_draft_nodes=max_draft_nodes,
        )

    def open(self, request: OpenDraft) -> NgramSession:
        """A session with an empty index; the first round fills it."""
        return NgramSession(request, self._sizes)

    def propose(self, items: Sequence[DraftItem]) -> list[Drafted]:
        """One lookup per item."""
        return [_draft(item) for item in items]


def _draft(item: DraftItem) -> Drafted:
    assert isinstance(item.session, NgramSession)
    if item.wants_tree:
        return item.session.propose_tree(item.draft_depth, item.draft_nodes)
    return item.session.propose(item.draft_depth)
