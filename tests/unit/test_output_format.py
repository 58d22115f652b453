"""What an output format may hold is checked before anybody compiles it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.output_format import MAX_REGEX_BYTES, OutputFormat


def of_patterns(size: int) -> list[dict[str, Any]]:
    """Return schemas with so many bytes of patterns."""
    short, half = {"pattern": "\u00e9a"}, "a" * (size // 2 - 3)
    return [
        {"type": "string", "pattern": "a" * size},
        {"$ref": "#/x/0/y", "x": [{"y": {"pattern": half}}, {"pattern": half}, short, short]},
        {"patternProperties": {half: {"pattern": half}, "\u00e9": short, "b": {}}},
        {"properties": {"pattern": {"pattern": "a" * size}, "const": {"const": "b" * 5000}}},
    ]


def test_all_patterns_of_a_schema_together_are_as_short_as_one_pattern() -> None:
    for schema in of_patterns(MAX_REGEX_BYTES):
        OutputFormat(json_schema=schema).validate()
    for schema in of_patterns(MAX_REGEX_BYTES + 2):
        with pytest.raises(InvalidArgumentError, match="patterns in json_schema have 4098 bytes") as caught:
            OutputFormat(json_schema=json.dumps(schema)).validate()
        assert caught.value.field == "output_format.json_schema"


@pytest.mark.parametrize("schema", ['{"x-guidance": {"lenient": true}}', '{"\\u0078-guidance": {}}'])
def test_a_schema_sets_nothing_of_its_compiler(schema: str) -> None:
    with pytest.raises(InvalidArgumentError, match="not a keyword of JSON Schema") as caught:
        OutputFormat(json_schema=schema).validate()
    assert caught.value.field == "output_format.json_schema"
