"""Text to token ids and back: chat template, tokenizer, incremental text with stop strings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from gateway.request.special_tokens import SpecialTokens, new_mark
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.request_limits import validate_roles
from specdec.models.files import TOKENIZER_FILES, load_tokenizer, resolve_model, vocabulary_fingerprint

_REPLACEMENT = "\ufffd"
_MAX_CHARACTER_BYTES = 4


class TextCodec:
    """A model's tokenizer and chat template."""

    def __init__(
        self, tokenizer: Tokenizer, chat_template: str, special_tokens: Mapping[str, str], fingerprint: str
    ) -> None:
        self._tokenizer = tokenizer
        self._template = _compile(chat_template) if chat_template else None
        self._named_tokens = special_tokens
        self._special_ids = {
            token.content: token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self._special_tokens = SpecialTokens(tokenizer, {*self._special_ids, *special_tokens.values()})
        self.vocabulary_fingerprint = fingerprint

    @classmethod
    def load(cls, model: str) -> TextCodec:
        """Load the codec of a model folder, hub id or "default".

        Raises:
            NotFoundError: there is no such model, or it has no tokenizer.
        """
        folder = resolve_model(model, TOKENIZER_FILES)
        config = _read_json(folder / "tokenizer_config.json")
        template_file = folder / "chat_template.jinja"
        template = template_file.read_text() if template_file.is_file() else _inline_template(config)
        special_tokens = _named_special_tokens(folder, config)
        return cls(load_tokenizer(folder), template, special_tokens, vocabulary_fingerprint(folder))

    def encode_chat(
        self, messages: Sequence[tuple[str, str]], *, allow_special_tokens: bool = False
    ) -> list[int]:
        """Encode a conversation of (role, content), up to where the assistant's answer starts.

        Args:
            allow_special_tokens: the text of a special token in a message becomes that token, as it does with
                transformers; otherwise it stays text.

        Raises:
            InvalidArgumentError: there are no messages, a role is unknown, or the template refuses.
        """
        if not messages:
            raise InvalidArgumentError("The chat has no messages.", field="chat", reason="EMPTY_PROMPT")
        validate_roles(role for role, _ in messages)
        if allow_special_tokens:
            ids: list[int] = self._tokenizer.encode(self._render(messages), add_special_tokens=False).ids
            return ids
        mark = new_mark()
        return self._special_tokens.encode(self._render_marked(messages, mark), mark)

    def _render_marked(self, messages: Sequence[tuple[str, str]], mark: str) -> str:
        """Render with marks wherever messages have, or may complete, the text of a special token."""
        marks = self._special_tokens
        marked = [(role, marks.mark_tokens(content, mark)) for role, content in messages]
        text = self._render(marked, mark)
        with_ends = [(role, marks.mark_ends(content, mark)) for role, content in marked]
        if with_ends == marked:
            return text
        # A template may look at how a message begins or ends; then these marks are not worth another text.
        with suppress(InvalidArgumentError):
            marked_text = self._render(with_ends, mark)
            if marked_text.replace(mark, "") == text.replace(mark, ""):
                return marked_text
        return text

    def _render(self, messages: Sequence[tuple[str, str]], mark: str = "") -> str:
        if self._template is None:
            raise InvalidArgumentError(
                "This model has no chat template; send raw text or token ids.", field="chat"
            )
        try:
            return self._template.render(
                messages=[{"role": role, "content": content} for role, content in messages],
                tools=None,  # defined, as transformers defines them
                documents=None,
                add_generation_prompt=True,
                **self._named_tokens,
            )
        except Exception as error:  # the template is the model's own code and fails in its own ways
            reason = str(error).replace(mark, "") if mark else str(error)
            raise InvalidArgumentError(f"The chat template refuses: {reason}", field="chat") from error

    def encode_text(self, text: str) -> list[int]:
        """Encode raw text, with the special tokens written in it and those that the tokenizer itself adds."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def special_token(self, text: str) -> int | None:
        """Return the special token with that text; None: there is none. It never appears in decoded text."""
        return self._special_ids.get(text)

    def has_text(self, token_id: int) -> bool:
        """Return whether a token is text: not a special token, nor an id that the tokenizer lacks."""
        # Twice, because a space has no text where a text begins.
        return self.decode([token_id, token_id]) != ""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode token ids to text, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


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
    """

    def __init__(self, codec: TextCodec, stop_strings: Sequence[str] = ()) -> None:
        self._codec = codec
        self._stop_strings = stop_strings
        self._num_tokens = 0
        self._text_ids: list[int] = []
        """The tokens that have text."""
        self._prefix = 0
        self._read = 0
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text())) if path.is_file() else {}
    except ValueError as error:
        raise InvalidArgumentError(f"{path} cannot be parsed: {error}", field="tokenizer") from error


def _named_special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens that a template may name ("bos_token"), found where transformers finds them."""
    if "added_tokens_decoder" not in config:  # older checkpoints keep the names in a file of their own
        config = {**config, **_read_json(folder / "special_tokens_map.json")}
    extra = config.get("extra_special_tokens")
    named = {**config, **(extra if isinstance(extra, dict) else {})}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value for name, value in named.items()
    }
    return {name: text for name, text in texts.items() if name.endswith("_token") and isinstance(text, str)}


def _inline_template(config: Mapping[str, Any]) -> str:
    """Return the template of older checkpoints, which keep it, or several, in tokenizer_config.json."""
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default", "")
    return str(template)


class _GenerationTag(Extension):
    """`{% generation %}`: marks what an assistant said, for training; here it adds nothing to the text."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[Node]:
        """Parse the statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(chat_template: str) -> Template:
    """Compile a model's chat template. It runs in a sandbox, with the functions that transformers offers."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.globals["raise_exception"] = _raise_template_error
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, **{"ensure_ascii": False} | options
    )
    try:
        return environment.from_string(chat_template)
    except TemplateError as error:
        raise InvalidArgumentError(
            f"The model's chat template cannot be compiled: {error}", field="tokenizer"
        ) from error


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)
