"""Output formats are compiled once and one at a time, whatever they are, for models that can take them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from specdec.contract.errors import FailedPreconditionError
from specdec.contract.output_format import MAX_SCHEMA_BYTES, OutputFormat
from tests.raw_streams import until
from tests.tiny_chat import save_tiny_chat_model
from tests.tiny_models import EOS, byte_tokenizer
from verifier_service.formats import Formats

JSON_OBJECT = OutputFormat(json_object=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def formats(folder: Path) -> Formats:
    return Formats(folder, 300, [EOS])


def deep_schema() -> str:
    """Return the deepest schema of those that are not too long: each part of it is within the one before."""
    parts: dict[str, Any] = {"end": {}}
    inner: dict[str, Any] = {"$ref": "#/d/end"}
    while len(json.dumps({"d": parts}, separators=(",", ":"))) < MAX_SCHEMA_BYTES - 1000:
        for _ in range(40):
            inner = {"properties": {"a": inner}}
        parts[str(len(parts))] = inner
        inner = {"$ref": f"#/d/{len(parts) - 1}"}
    return json.dumps({"d": parts, **inner}, separators=(",", ":"))


def test_a_schema_as_deep_as_can_be_is_compiled_or_refused(folder: Path, tmp_path: Path) -> None:
    # In a process of its own: a stack that overflows would end it.
    (tmp_path / "schema.json").write_text(deep_schema())
    code = f"""
import asyncio, pathlib
from specdec.contract.output_format import OutputFormat
from verifier_service.formats import Formats
schema = pathlib.Path({str(tmp_path / "schema.json")!r}).read_text()
formats = Formats(pathlib.Path({str(folder)!r}), 260, [{EOS}])
guide = asyncio.run(formats.guide(OutputFormat(json_schema=schema), [], {{{EOS}}}))
print(guide.num_words)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "9", result.stderr


async def test_without_a_tokenizer_or_an_end_there_are_no_formats(folder: Path, tmp_path: Path) -> None:
    bare = Formats(tmp_path, 260, [EOS])
    assert "has no tokenizer.json" in bare.refusal
    endless = Formats(folder, 260, [])
    assert "no end token" in endless.refusal
    for formats in (bare, endless):
        with pytest.raises(FailedPreconditionError, match="takes no output format"):
            await formats.guide(JSON_OBJECT, [], {EOS})


async def test_a_tokenizer_that_formats_do_not_know_is_said_to_be_one(tmp_path: Path) -> None:
    words = Formats(save_tiny_chat_model(tmp_path), 128, [0])
    with pytest.raises(FailedPreconditionError, match="its tokenizer is of a kind"):
        await words.guide(JSON_OBJECT, [], {EOS})


async def test_a_format_is_compiled_once(formats: Formats) -> None:
    first = await formats.compiled(JSON_OBJECT)
    assert await formats.compiled(OutputFormat(json_object=True)) is first
    for number in range(16):
        await formats.compiled(OutputFormat(choices=(f"choice {number}",)))
    assert await formats.compiled(JSON_OBJECT) is not first, "only so many are kept"


async def test_formats_compiled_side_by_side_leave_the_stacks_of_other_threads_alone(
    formats: Formats,
) -> None:
    compiled, usual = await formats.compiled(OutputFormat(regex="a|b+")), threading.stack_size()
    with ThreadPoolExecutor(8) as threads:
        matchers = list(threads.map(lambda _: compiled._compile(), range(200)))
    assert not any(matcher.is_error() for matcher in matchers)
    assert threading.stack_size() == usual


class HeldChoices(tuple[str, ...]):
    """Choices whose compilation waits until it may go on."""

    def __init__(self, _: Sequence[str]) -> None:
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[str]:
        self.has_begun.set()
        assert self.may_go_on.wait(60)
        return super().__iter__()


async def test_a_format_that_nobody_waits_for_any_more_keeps_its_turn(formats: Formats) -> None:
    threads = ThreadPoolExecutor(2)
    asyncio.get_running_loop().set_default_executor(threads)
    first, second = HeldChoices(["a"]), HeldChoices(["b"])
    second.may_go_on.set()
    try:
        asked = asyncio.create_task(formats.compiled(OutputFormat(choices=first)))
        await until(first.has_begun.is_set)
        asked.cancel()
        await asyncio.wait([asked])
        assert asked.cancelled()
        other = asyncio.create_task(formats.compiled(OutputFormat(choices=second)))
        await asyncio.sleep(0)  # here it would take the free thread, which then does what comes next
        await asyncio.to_thread(str)
        assert not second.has_begun.is_set()
    finally:
        first.may_go_on.set()
    await other
    assert second.has_begun.is_set()
