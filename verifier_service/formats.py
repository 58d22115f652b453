"""The output formats of a model's answers: compiled once, for as many answers as ask for them."""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer, grammar_from

from specdec.contract.errors import FailedPreconditionError
from specdec.contract.output_format import OutputFormat
from specdec.models.files import load_tokenizer
from verifier_service.guide import CompiledFormat, Guide, cannot_be_followed

_MAX_COMPILED = 16
"""Number of compiled formats that are kept, those that were asked for last."""
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,32}"
"""Whitespace between the parts of a JSON text. Without an end, some models would write nothing else."""


class Formats:
    """Compiles output formats for the vocabulary of a model. Used from one event loop.

    Args:
        folder: where the model's tokenizer.json is.
        vocab_size: number of rows of the model's LM head. A row without a token is never allowed.
        eos_token_ids: the model's own end tokens, which are allowed where a text may end.
    """

    def __init__(self, folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._compiled: OrderedDict[OutputFormat, CompiledFormat] = OrderedDict()
        self._compiling = asyncio.Lock()
        self.refusal = ""
        """Why sessions can have no format; empty: they can."""
        if not (folder / "tokenizer.json").is_file():
            self.refusal = "its model has no tokenizer.json; save a fast tokenizer beside the weights"
        elif not eos_token_ids:
            self.refusal = "its model names no end token, with which an answer could end"

    async def guide(
        self, output_format: OutputFormat, output_token_ids: Sequence[int], stop_token_ids: Collection[int]
    ) -> Guide:
        """Return what follows an answer in a format.

        Args:
            output_token_ids: the beginning of the answer; empty for a new one.
            stop_token_ids: tokens behind which an answer has nothing more.

        Raises:
            FailedPreconditionError: the model takes no formats.
            InvalidArgumentError: the format cannot be followed, or the answer does not follow it.
        """
        if self.refusal:
            raise _no_formats(self.refusal)
        compiled = await self.compiled(output_format)
        # The beginning of an answer may be long.
        return await asyncio.to_thread(
            Guide, compiled, self._tokenizer.vocab_size, output_token_ids, stop_token_ids
        )

    async def compiled(self, output_format: OutputFormat) -> CompiledFormat:
        """Return a format, compiled now or for an earlier answer.

        Raises:
            InvalidArgumentError: the format cannot be followed.
        """
        # One at a time, so that formats never take all cores. A format that is being compiled keeps its turn
        # to the end, although nobody may wait for it any more.
        await self._compiling.acquire()
        compiling = asyncio.ensure_future(self._compile(output_format))
        compiling.add_done_callback(lambda _: self._compiling.release())
        return await asyncio.shield(compiling)

    async def _compile(self, output_format: OutputFormat) -> CompiledFormat:
        if output_format not in self._compiled:
            self._compiled[output_format] = await asyncio.to_thread(
                lambda: CompiledFormat(self._tokenizer, _grammar(output_format))
            )
        self._compiled.move_to_end(output_format)
        if len(self._compiled) > _MAX_COMPILED:
            self._compiled.popitem(last=False)
        return self._compiled[output_format]

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        tokenizer = load_tokenizer(self._folder)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # The tokenizer may know tokens for which the model has no row, and the model rows that are no token.
        num_tokens = 1 + max(self._vocab_size - 1, *tokenizer.get_vocab(with_added_tokens=True).values())
        try:
            return LLTokenizer(tokenizer.to_str(), n_vocab=num_tokens, eos_token=self._eos_token_ids)
        except Exception as error:  # whatever is wrong with a tokenizer surfaces as one of many types
            raise _no_formats(f"its tokenizer is of a kind that formats do not know ({error})") from error


def _grammar(output_format: OutputFormat) -> str:
    """Return a format as llguidance reads it.

    Raises:
        InvalidArgumentError: its JSON is such that llguidance does not read it.
    """
    if output_format.regex is not None:
        return LLMatcher.grammar_from_regex(output_format.regex)
    if output_format.choices is not None:
        return grammar_from("choice", json.dumps(list(output_format.choices)))
    schema = output_format.json_schema if output_format.json_schema is not None else '{"type": "object"}'
    assert isinstance(schema, str)
    try:
        return LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": _WHITESPACE})
    except ValueError as error:
        raise cannot_be_followed(str(error)) from error


def _no_formats(reason: str) -> FailedPreconditionError:
    return FailedPreconditionError(
        f"The verifier takes no output format: {reason}.", reason="NO_OUTPUT_FORMATS"
    )
