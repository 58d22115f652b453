"""Text to token ids and back: chat template, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
        """Encode raw text, with the special tokens written in it and those that the tokenizer itself adds.

        A text that begins with the token that the tokenizer puts first gets no other.
        """
        encoding = self._tokenizer.encode(text)
        ids: list[int] = encoding.ids
        # The mask tells what the tokenizer added from what the text itself says.
        is_twice = encoding.special_tokens_mask[:2] == [1, 0] and ids[0] == ids[1]
        return ids[1:] if is_twice else ids

    def special_token(self, text: str) -> int | None:
        """Return the special token with that text; None: there is none. It never appears in decoded text."""
        return self._special_ids.get(text)

    def piece(self, token_id: int) -> str:
        """Return the text of a token inside a text. Of a special token that is its name, and of a part of a
        character U+FFFD."""
        alone = self.decode([token_id])
        # Some tokenizers take the space before the first word for their own.
        inside = self.decode([token_id, token_id])[len(alone) :]
        return inside or alone or self._tokenizer.id_to_token(token_id) or ""

    def has_text(self, token_id: int) -> bool:
        """Return whether a token is text: not a special token, nor an id that the tokenizer lacks."""
        # Twice, because a space has no text where a text begins.
        return self.decode([token_id, token_id]) != ""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Decode token ids to text, special tokens left out."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text


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
