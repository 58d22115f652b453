"""Special tokens of a chat template, told from their text in a message, which stays text."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

_UNKNOWN = "\U0010fffd"
"""A character that no vocabulary has."""


def new_mark() -> str:
    """Return a text that nobody can guess. Digits stay as they are, whatever a template does to a text."""
    return f"{secrets.randbits(128):039d}"


class SpecialTokens:
    """Encodes rendered chats. Marks in the messages break the text of special tokens before the template is
    rendered, so that what is found afterwards is the template's own.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Collection[str]) -> None:
        """Prepare for a tokenizer.

        Args:
            texts: what its special tokens are written as.
        """
        added = tokenizer.get_added_tokens_decoder()
        self._tokenizer = tokenizer
        self._ids = {token.content: token_id for token_id, token in added.items() if token.content in texts}
        self._finder = _finder(tokenizer, added.values())
        self._longest = max(map(len, self._ids), default=0)
        cuts = [(text[:at], text[at:]) for text in self._ids for at in range(1, len(text))]
        self._beginnings = frozenset(beginning for beginning, _ in cuts)
        self._ends = frozenset(end for _, end in cuts)
        # Knows what the tokenizer knows but special tokens: one token stands for all that the template wrote.
        self._boundary = f"\ue000{new_mark()}"
        self._plain = _like(tokenizer, tokenizer.model)
        self._plain.pre_tokenizer = tokenizer.pre_tokenizer
        self._plain.add_special_tokens([AddedToken(self._boundary, normalized=False)])
        others = {token_id: token for token_id, token in added.items() if token.content not in texts}
        self._plain.add_tokens(list(others.values()))
        self._other_ids = {
            self._plain.token_to_id(token.content): token_id for token_id, token in others.items()
        }
        self._not_text = frozenset(self._ids.values()) - _unknown_ids(tokenizer.model)

    def mark_tokens(self, content: str, mark: str) -> str:
        """Break the text of each special token behind its first character."""
        broken, at = [], 0
        for start, end, _ in self._find(content):
            text = content[start:end]
            behind = end - len(text.lstrip()) + 1  # such tokens may take the spaces before them along
            if len(text.strip()) > 1:
                broken.append(content[at:behind])
                at = behind
        if not broken:
            return content
        # A token's text may have another token's text in it.
        return self.mark_tokens(mark.join([*broken, content[at:]]), mark)

    def mark_ends(self, content: str, mark: str) -> str:
        """Mark a content that may be part of a special token together with the text around it."""
        text = content.strip()
        lengths = range(1, min(self._longest, len(text) + 1))
        is_part = any(
            text[:length] in self._ends or text[-length:] in self._beginnings for length in lengths
        ) or (0 < len(text) < self._longest and any(text in token for token in self._ids))
        if not is_part:
            return content
        first, last = content.index(text) + 1, content.index(text) + len(text)
        return mark.join([content[:first], content[first:last], content[last:]])

    def encode(self, text: str, mark: str) -> list[int]:
        """Encode a rendered chat, its marks removed. What they broke is encoded as plain text."""
        own = list(self._find(text))
        own_ids = [token_id for _, _, token_id in own]
        ids: list[int] = self._tokenizer.encode(text.replace(mark, ""), add_special_tokens=False).ids
        if self._special_in(ids) == self._special_in(own_ids):
            return ids
        parts, at = [], 0
        for start, end, _ in own:
            parts.append(text[at:start])
            at = end
        segmented = self._boundary.join(part.replace(mark, "") for part in [*parts, text[at:]])
        return list(self._ids_of(segmented, iter(own_ids)))

    def _special_in(self, token_ids: Iterable[int]) -> list[int]:
        return [token_id for token_id in token_ids if token_id in self._not_text]

    def _find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """Yield start, end and id of each special token in a text."""
        found = self._finder.encode(text, add_special_tokens=False)
        for finder_id, (start, end) in zip(found.ids, found.offsets, strict=True):
            token_id = self._ids.get(self._finder.id_to_token(finder_id) or "")
            if token_id is not None:
                yield start, end, token_id

    def _ids_of(self, segmented: str, own_ids: Iterator[int]) -> Iterator[int]:
        encoding = self._plain.encode(segmented, add_special_tokens=False)
        boundary = self._plain.token_to_id(self._boundary)
        for token_id, piece in zip(encoding.ids, encoding.tokens, strict=True):
            if token_id == boundary:
                yield next(own_ids)
            elif token_id in self._other_ids:
                yield self._other_ids[token_id]
            else:
                yield from self._as_text(token_id, piece)

    def _as_text(self, token_id: int, piece: str) -> Iterator[int]:
        """Yield a token, or, where the vocabulary has a special token among its pieces, smaller pieces."""
        if token_id not in self._not_text:
            yield token_id
        elif len(piece) > 1:
            for part in (piece[:1], piece[1:]):
                for token in self._tokenizer.model.tokenize(part):
                    yield from self._as_text(token.id, token.value)


def _like(tokenizer: Tokenizer, model: models.Model) -> Tokenizer:
    """Return a tokenizer with another model, which normalises text as `tokenizer` does."""
    like = Tokenizer(model)
    like.normalizer = tokenizer.normalizer
    return like


def _finder(tokenizer: Tokenizer, added: Iterable[AddedToken]) -> Tokenizer:
    """Return a tokenizer that finds added tokens where `tokenizer` does, and takes all else as one token."""
    finder = _like(tokenizer, models.WordLevel({"": 0}, unk_token=""))
    finder.add_tokens(list(added))
    return finder


def _unknown_ids(model: Any) -> frozenset[int]:
    """Return the ids that a model gives to what it does not know."""
    try:
        return frozenset(token.id for token in model.tokenize(_UNKNOWN))
    except Exception:  # a plain one, from a vocabulary of words without a token for unknown ones
        return frozenset()
