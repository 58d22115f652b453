"""Tokens to text as they come: whole characters, and nothing past a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gateway.request.text import TextCodec

_REPLACEMENT = "\ufffd"
_MAX_CHARACTER_BYTES = 4


@dataclass(frozen=True, slots=True)
class TextToken:
    """A token and the text it completes."""

    token_id: int
    text: str
    index: int
    """How many tokens came before it in the output."""


class TextStream:
    """Turns tokens into text as they come: without broken characters, and nothing past a stop string.

    A token is released once its text is final: characters are whole, and the text cannot become part of a
    stop string any more. The released texts join to the decoded whole, cut at the first stop string. (Where
    bytes that form no character are tokens of their own, as in SentencePiece's vocabularies, decoding the
    whole also makes U+FFFD of whole characters beside them; the released texts keep those.)

    Args:
        continued: tokens of the text that the tokens continue; none: they begin a text, whose first space
            some tokenizers take for their own.
    """

    def __init__(
        self, codec: TextCodec, stop_strings: Sequence[str] = (), continued: Sequence[int] = ()
    ) -> None:
        self._codec = codec
        self._stop_strings = stop_strings
        self._num_tokens = 0
        self._text_ids = _last_character(codec, continued)
        """The tokens that have text."""
        self._prefix = 0
        self._read = len(self._text_ids)
        self._held: list[TextToken] = []
        self.stopped = False

    @property
    def num_tokens(self) -> int:
        """How many tokens were pushed."""
        return self._num_tokens

    def push(self, token_id: int) -> list[TextToken]:
        """Add a token and return those it releases; sets `stopped` when a stop string is complete."""
        piece = ""
        if self._codec.has_text(token_id):
            self._text_ids.append(token_id)
            piece = self._next_piece()
        if piece and self._is_within_character:
            self._add_to_last_held(piece)
            piece = ""
        self._held.append(TextToken(token_id, piece, self._num_tokens))
        self._num_tokens += 1
        return self._release(self._num_held_characters())

    def flush(self) -> list[TextToken]:
        """Release what is held: nothing follows."""
        if not self.stopped and self._held:
            rest = self._text_from(self._prefix)[len(self._text_from(self._prefix, self._read)) :]
            self._add_to_last_held(rest)
            self._read = self._prefix = len(self._text_ids)
            self._num_held_characters()  # the rest may complete a stop string
        return self._release(0)

    def _next_piece(self) -> str:
        """Return new text, once it ends in a whole character. Decoding starts a little earlier, because the
        text of a token depends on the token before it.
        """
        before = self._text_from(self._prefix, self._read)
        now = self._text_from(self._prefix)
        if len(now) <= len(before):
            return ""
        end = self._end_of_garbage(now) if now.endswith(_REPLACEMENT) else len(self._text_ids)
        if end == self._read:
            return ""
        piece = self._text_from(self._prefix, end)[len(before) :]
        self._prefix, self._read = self._read, end
        return piece

    def _end_of_garbage(self, now: str) -> int:
        """Return up to which token the text is final although it ends in U+FFFD; `_read` if none is.

        A character has at most four bytes, so what is no character after as many tokens begins none. Its last
        three may still begin one. They are split off where that leaves the text as it is: not within bytes
        that become one U+FFFD together.
        """
        end = len(self._text_ids)
        if end - self._read < _MAX_CHARACTER_BYTES:
            return self._read
        splits = range(end - _MAX_CHARACTER_BYTES + 1, end)
        same = (at for at in splits if self._text_from(self._prefix, at) + self._text_from(at) == now)
        return next(same, self._read)

    @property
    def _is_within_character(self) -> bool:
        """Whether the text of the last tokens is not final."""
        return self._read < len(self._text_ids)

    def _add_to_last_held(self, text: str) -> None:
        last = self._held[-1]
        self._held[-1] = TextToken(last.token_id, last.text + text, last.index)

    def _text_from(self, start: int, stop: int | None = None) -> str:
        return self._codec.decode(self._text_ids[start:stop])

    def _num_held_characters(self) -> int:
        """Count how much of the held text's end could still become a stop string; cut at a complete one."""
        text = "".join(token.text for token in self._held)
        found = [at for stop in self._stop_strings if (at := text.find(stop)) >= 0]
        if found:
            self._cut(min(found))
            return 0
        longest = max((len(stop) for stop in self._stop_strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop_strings):
                return length
        return 0

    def _cut(self, length: int) -> None:
        """Keep the first `length` characters of the held text."""
        self.stopped = True
        kept = []
        for token in self._held:
            kept.append(TextToken(token.token_id, token.text[:length], token.index))
            length -= len(kept[-1].text)
        self._held = kept

    def _release(self, num_held_characters: int) -> list[TextToken]:
        keep = 0
        while keep < len(self._held) and num_held_characters > 0:
            keep += 1
            num_held_characters -= len(self._held[-keep].text)
        # Within a character one token is held as well: the flush must have one to hang the rest on.
        keep = max(keep, int(self._is_within_character))
        split = len(self._held) - keep
        released, self._held = self._held[:split], self._held[split:]
        return released


def _last_character(codec: TextCodec, token_ids: Sequence[int]) -> list[int]:
    """Return the last tokens that make whole characters; an empty list: none of them has text."""
    tail: list[int] = []
    for token_id in filter(codec.has_text, reversed(token_ids)):
        tail.insert(0, token_id)
        if len(tail) == _MAX_CHARACTER_BYTES or _REPLACEMENT not in codec.decode(tail):
            break
    return tail
