"""The types of fields in requests' bodies, and the fields that are known and not supported."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from specdec.contract.request_limits import validate_length
from specdec.contract.sampling import MAX_LOGIT_BIASES

ItemT = TypeVar("ItemT")

ListOf = Annotated[list[ItemT], Field(fail_fast=True)]
"""A list of which nothing is read past the first item that is wrong: what is said of each takes memory."""


Key = Annotated[int, Field(strict=False)]
"""A number as the key of a JSON object, which is a string."""


def _short(biases: object) -> object:
    if isinstance(biases, dict):
        validate_length("logit_bias", len(biases), MAX_LOGIT_BIASES)
    return biases


Biases = Annotated[dict[Key, float], BeforeValidator(_short)]
"""A number for each token id, of which there are not too many to begin with."""
Empty = ListOf[Literal[""]]
"""A list that has to be empty; what is in it otherwise is not even read."""


class Body(BaseModel):
    """An object in a body."""

    # Fields that nobody here knows are ignored, as other servers ignore them: clients send many.
    model_config = ConfigDict(extra="ignore", strict=True)


class PlainFormat(Body):
    """Any text, or any JSON object."""

    type: Literal["text", "json_object"]


class NamedSchema(Body):
    """A JSON Schema; its name and whether it is strict change nothing: it always holds."""

    schema_: dict[str, Any] = Field(alias="schema")


class SchemaFormat(Body):
    """JSON that is valid under a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")]
"""OpenAI's way to say which texts an answer may be."""


class StructuredOutputs(Body):
    """Other servers' way to say it."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: ListOf[str] | None = None
    json_object: bool | None = None
    disable_additional_properties: Literal[False] | None = None
    disable_any_whitespace: Literal[False] | None = None
    grammar: None = None
    structural_tag: None = None
    whitespace_pattern: None = None


class Unsupported(Body):
    """Fields that would change the answer and are not supported, with the values that ask for nothing."""

    add_generation_prompt: Literal[True] | None = None
    add_special_tokens: bool | None = None
    """Which value asks for nothing depends on the path: a chat template writes special tokens itself."""
    audio: None = None
    bad_words: Empty | None = None
    chat_template: None = None
    chat_template_kwargs: None = None
    continue_final_message: Literal[False] | None = None
    documents: Empty | None = None
    echo: Literal[False] | None = None
    function_call: Literal["none", "auto"] | None = None
    functions: Empty | None = None
    guided_choice: None = None
    guided_grammar: None = None
    guided_json: None = None
    guided_regex: None = None
    include_stop_str_in_output: Literal[False] | None = None
    logits_processors: Empty | None = None
    min_tokens: Literal[0] | None = None
    modalities: ListOf[Literal["text"]] | None = None
    prompt_logprobs: None = None
    skip_special_tokens: Literal[True] | None = None
    suffix: Literal[""] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: Empty | None = None
    truncate_prompt_tokens: None = None
    use_beam_search: Literal[False] | None = None
    web_search_options: None = None
