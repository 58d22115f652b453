"""Output formats: which texts an answer may be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.sampling import SamplingParams
from specdec.v1 import common_pb2, gateway_pb2, verifier_pb2

MAX_SCHEMA_BYTES = 2**16
MAX_REGEX_BYTES = 2**12
"""Most bytes of a regular expression, and of all those in a schema together. What a long one costs to follow
grows with the square of its length."""
MAX_CHOICES = 1024
MAX_CHOICES_BYTES = 2**16
"""Most bytes of all choices together."""
_SETTINGS_OF_COMPILER = "x-guidance"
"""With it, a schema could tell llguidance to let keywords be, and to allow whitespace without an end."""


_HasOutputFormat = gateway_pb2.GenerateRequest | verifier_pb2.VerifyOpen


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFormat:
    """The texts that an answer may be. Exactly one of the fields is set; see specdec.v1.OutputFormat."""

    json_schema: str | Mapping[str, Any] | None = None
    """The answer is a JSON value that is valid under this JSON Schema: a dict, or JSON as text."""
    regex: str | None = None
    """The answer as a whole matches this regular expression, in the syntax of Rust's regex crate."""
    choices: Sequence[str] | None = None
    """The answer is one of these texts."""
    json_object: bool = False
    """The answer is a JSON object, whatever is in it."""

    def validate(self) -> None:
        """Refuse a format that is none, or too large. Whether it can be followed is for a verifier to say.

        Raises:
            InvalidArgumentError: a value is wrong; the error names its field.
        """
        names = [field.name for field in fields(self)]
        if sum(getattr(self, name) not in (None, False) for name in names) != 1:
            _refuse("", f"An output format is one of {', '.join(names)}; set exactly one of them.")
        if self.json_schema is not None:
            _validate_schema(self.json_schema)
        elif self.regex is not None:
            _validate_text("regex", self.regex, MAX_REGEX_BYTES)
        elif self.choices is not None:
            _validate_choices(self.choices)
        elif self.json_object is not True:
            _refuse("json_object", f"json_object is {self.json_object!r:.80}; it must be True or False.")

    def validate_beside(self, sampling: SamplingParams, *, ignore_eos: bool) -> None:
        """Refuse what contradicts every format.

        Raises:
            InvalidArgumentError: the error names the field that goes with no format.
        """
        for field, is_set in (("ignore_eos", ignore_eos), ("allowed_token_ids", sampling.allowed_token_ids)):
            if is_set:
                raise InvalidArgumentError(
                    f"{field} does not go with an output format, which says itself what may follow; leave "
                    "one of them out.",
                    field=field,
                )

    def to_proto(self) -> common_pb2.OutputFormat:
        """Return the message that carries the format, once validated.

        Raises:
            ValueError: a text is not valid Unicode.
        """
        if self.json_schema is not None:
            return common_pb2.OutputFormat(json_schema=_schema_text(self.json_schema))
        if self.regex is not None:
            return common_pb2.OutputFormat(regex=self.regex)
        if self.choices is not None:
            return common_pb2.OutputFormat(choices=common_pb2.Choices(texts=self.choices))
        return common_pb2.OutputFormat(json_object=common_pb2.JsonObject())

    @classmethod
    def of_request(cls, message: _HasOutputFormat) -> OutputFormat | None:
        """Read and validate the format of a message; None: it has none.

        Raises:
            InvalidArgumentError: see `validate`.
        """
        return cls.from_proto(message.output_format) if message.HasField("output_format") else None

    @classmethod
    def from_proto(cls, message: common_pb2.OutputFormat) -> OutputFormat:
        """Read a format, which has a hash, from a message, and validate it.

        Raises:
            InvalidArgumentError: see `validate`.
        """
        kind = message.WhichOneof("format")
        output_format = cls(
            json_schema=message.json_schema if kind == "json_schema" else None,
            regex=message.regex if kind == "regex" else None,
            choices=tuple(message.choices.texts[: MAX_CHOICES + 1]) if kind == "choices" else None,
            json_object=kind == "json_object",
        )
        output_format.validate()
        return output_format


def _schema_text(schema: str | Mapping[str, Any]) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False, allow_nan=False)


def _validate_schema(schema: str | Mapping[str, Any]) -> None:
    if not isinstance(schema, str | dict):
        _refuse("json_schema", f"json_schema is {schema!r:.80}; it must be a dict, or JSON as text.")
    try:
        text = _schema_text(schema)
        _validate_text("json_schema", text, MAX_SCHEMA_BYTES)
        parsed = json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        _refuse("json_schema", f"json_schema is not JSON: {error}.")
    if not isinstance(parsed, dict):
        _refuse("json_schema", "json_schema must be a JSON object, such as {}.")
    if _SETTINGS_OF_COMPILER in parsed:
        _refuse("json_schema", f"{_SETTINGS_OF_COMPILER} is not a keyword of JSON Schema; leave it out.")
    size = sum(len(pattern.encode(errors="replace")) for pattern in _patterns(parsed))
    if size > MAX_REGEX_BYTES:
        _refuse(
            "json_schema",
            f"The patterns in json_schema have {size} bytes; at most {MAX_REGEX_BYTES} are taken.",
        )


def _patterns(schema: dict[str, Any]) -> Iterator[str]:
    """Yield each regular expression of a schema, however deep it lies."""
    values: list[Any] = [schema]
    while values:
        value = values.pop()
        if isinstance(value, list):
            values += value
        elif isinstance(value, dict):
            values += value.values()
            if isinstance(pattern := value.get("pattern"), str):
                yield pattern
            if isinstance(by_pattern := value.get("patternProperties"), dict):
                yield from by_pattern


def _validate_choices(choices: Sequence[str]) -> None:
    if isinstance(choices, str) or not isinstance(choices, Sequence):
        _refuse("choices", f"choices is {choices!r:.80}; it must be a sequence of strings.")
    if not 0 < len(choices) <= MAX_CHOICES:
        _refuse("choices", f"There are {len(choices)} choices; there must be 1 to {MAX_CHOICES}.")
    for index, choice in enumerate(choices):
        _validate_text(f"choices[{index}]", choice, MAX_CHOICES_BYTES)
    _validate_text("choices", "".join(choices), MAX_CHOICES_BYTES)


def _validate_text(name: str, text: str, most: int) -> None:
    if not isinstance(text, str) or not text:
        _refuse(name, f"{name} is {text!r:.80}; it must be text that is not empty.")
    if (size := len(text.encode(errors="replace"))) > most:
        _refuse(name, f"{name} has {size} bytes; at most {most} are taken.")


def _refuse(name: str, message: str) -> NoReturn:
    raise InvalidArgumentError(message, field=f"output_format.{name}".rstrip("."))
