"""Output formats: the two ways to ask for one, and errors in the words of the way that was taken."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.http.fields import ResponseFormat, SchemaFormat, StructuredOutputs
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.output_format import OutputFormat

_FIELDS = {"json_schema": "json", "choices": "choice"}
"""Fields of a format that have another name in structured_outputs."""
_NAMED = re.compile(r"\bjson_schema\b|\bchoices(?!;)\b")
"""Those names in a message; "There are 2000 choices;" is English."""


def output_format_of(
    asked: ResponseFormat | None, structured: StructuredOutputs | None
) -> OutputFormat | None:
    """Return which texts an answer may be; None: any.

    Raises:
        InvalidArgumentError: there are two formats.
    """
    if structured is not None:
        if asked is not None and asked.type != "text":
            raise InvalidArgumentError(
                "structured_outputs does not go with a response_format; leave one of them out.",
                field="structured_outputs",
            )
        return OutputFormat(
            json_schema=structured.json_,
            regex=structured.regex,
            choices=None if structured.choice is None else tuple(structured.choice),
            json_object=bool(structured.json_object),
        )
    if isinstance(asked, SchemaFormat):
        return OutputFormat(json_schema=asked.json_schema.schema_)
    return OutputFormat(json_object=True) if asked and asked.type == "json_object" else None


@contextmanager
def refusing_as_asked(structured: StructuredOutputs | None) -> Iterator[None]:
    """Name the fields of a format, in errors that are raised within, as the client named them."""
    try:
        yield
    except InvalidArgumentError as error:
        if structured is not None and error.field.partition(".")[0] == "output_format":
            error.field = "structured_outputs"
            error.message = _NAMED.sub(lambda found: _FIELDS[found[0]], error.message)
        raise
