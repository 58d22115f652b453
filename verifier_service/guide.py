"""One answer in a format: which tokens may follow it, and each node of a draft.

A matcher of llguidance follows the tokens of an answer. What it allows next depends on the format and on
these tokens alone, so the target's picks stay a function of the committed tokens, and a session that is
opened anew goes on as the one before it would have.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from time import thread_time
from typing import TypeVar

import numpy
import numpy.typing
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask

from specdec.contract.draft_tree import DraftTree
from specdec.contract.errors import InvalidArgumentError

MaskRows = numpy.typing.NDArray[numpy.int32]
"""Which tokens may be picked [num_rows, num_words]: bit i of word w stands for token 32 w + i."""

_LIMITS = LLParserLimits(
    initial_lexer_fuel=300_000,  # some tenths of a second to compile
    step_lexer_fuel=100_000,  # some 10 ms per mask
    step_max_items=25_000,
    max_lexer_states=20_000,  # some 40 MB
    verbose_errors=False,
)
_COMPILER_STACK_BYTES = 2**28
"""More than the longest schema can use: schemas are compiled by recursion, some 10 KB a level, and a stack
that is too small would end the process. Memory is taken as far as it is used."""
_stack_size = threading.Lock()
"""Held while the size is another one: it is that of all threads which the process starts meanwhile."""
_DRAFT_SECONDS = 0.02
"""See `Guide`. Drafts in a usual format take a few milliseconds."""
_DEAD_END = "NoExtension"
"""What llguidance says where some text may follow, but no token of the vocabulary."""
_MAX_REASON = 300
_ALL = -1

ValueT = TypeVar("ValueT")


class CompiledFormat:
    """A format, with a matcher that has seen no token.

    Matchers of one format share what they find out about it, up to a limit. None of them is of use any more
    when the limit is reached; then the format is compiled anew.

    Raises:
        InvalidArgumentError: the format cannot be followed.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str) -> None:
        self._tokenizer, self._grammar = tokenizer, grammar
        self._matcher = self._compile()

    def matcher(self) -> LLMatcher:
        """Return a matcher that has seen no token."""
        matcher = self._matcher.deep_copy()
        matcher.compute_bitmask()
        if matcher.is_error():
            self._matcher = self._compile()
            matcher = self._matcher.deep_copy()
        return matcher

    def _compile(self) -> LLMatcher:
        matcher = _on_deep_stack(
            lambda: LLMatcher(self._tokenizer, self._grammar, log_level=0, limits=_LIMITS)
        )
        if not matcher.is_error():
            matcher.compute_bitmask()  # fails if there is no text in the format
        if matcher.is_error():
            raise cannot_be_followed(matcher.get_error())
        return matcher


class Guide:
    """Follows one answer. Used by one thread at a time.

    Args:
        num_tokens: number of tokens that masks are about.
        output_token_ids: see `formats.Formats.guide`.
        stop_token_ids: see `formats.Formats.guide`.
        draft_seconds: time of a processor after which no further node of a draft is followed in a call of
            `fill`. Fewer drafts are accepted then; the answer is the same.

    Raises:
        InvalidArgumentError: the answer does not follow the format.
    """

    def __init__(
        self,
        compiled: CompiledFormat,
        num_tokens: int,
        output_token_ids: Sequence[int],
        stop_token_ids: Collection[int],
        draft_seconds: float = _DRAFT_SECONDS,
    ) -> None:
        self._draft_seconds = draft_seconds
        self.num_words = (num_tokens + 31) // 32
        """Width of a row of a mask."""
        self._compiled = compiled
        self._stop_token_ids = stop_token_ids
        self._answer = list(output_token_ids)
        """The tokens of the answer that the matcher has seen."""
        self._path: list[int] = []
        """Nodes of the draft that it has seen after them."""
        self._follows_drafts = True
        """Whether rows of drafts are looked at; not after a draft led to where the format is too complex."""
        # The first time, other answers may have left too little of what matchers share for all of this one.
        if not (self._restart() or self._restart()):
            raise InvalidArgumentError(
                f"The answer so far does not follow the output format: {_plain(self._matcher.get_error())}.",
                field="output_format",
                reason="BAD_OUTPUT_FORMAT",
            )

    def fill(self, rows: MaskRows, output_token_ids: Sequence[int], draft: DraftTree) -> frozenset[int]:
        """Find the tokens that may follow an answer, and each node of a draft.

        Behind a draft token that may not be picked, or that ends the answer, no row is ever looked at; there
        every token is allowed.

        Args:
            rows: where the masks go: row 0 follows the answer, row i + 1 node i and those that lead to it.
            output_token_ids: all tokens of the answer so far.

        Returns:
            Nodes that may be picked, but not be accepted: what may follow them is not known.

        Raises:
            InvalidArgumentError: the format is too complex to know what may follow the answer.
        """
        rows.fill(_ALL)
        self._fill_first(rows, output_token_ids)
        is_known = [True]
        unknown: set[int] = set()
        end = thread_time() + self._draft_seconds
        for node, (parent, token_id) in enumerate(zip(draft.parents, draft.token_ids, strict=True)):
            may_follow = is_known[parent + 1] and token_id not in self._stop_token_ids
            is_possible = may_follow and _is_allowed(rows[parent + 1], token_id)
            is_known.append(is_possible and thread_time() < end and self._fill_node(rows, draft, node))
            if is_possible and not is_known[-1]:
                unknown.add(node)
        if not self._matcher.is_error():
            self._go_to(draft, [])
        return frozenset(unknown)

    def _fill_first(self, rows: MaskRows, output_token_ids: Sequence[int]) -> None:
        """Fill in what may follow the answer, with all tokens that were committed since the last call."""
        new_token_ids = list(output_token_ids[len(self._answer) :])
        self._answer += new_token_ids
        if self._matcher.consume_tokens(new_token_ids) and self._fill_row(rows, 0):
            return
        for _ in range(2):  # it may be what a draft led to, and then other answers in this format
            if self._restart() and self._fill_row(rows, 0):
                return
        error = self._matcher.get_error()
        raise cannot_be_followed(error) if error.startswith(_DEAD_END) else _too_complex(error)

    def _fill_node(self, rows: MaskRows, draft: DraftTree, node: int) -> bool:
        """Fill in what may follow a node of a draft. Return whether that is known."""
        if self._follows_drafts:
            self._go_to(draft, draft.path_to(node))
            self._follows_drafts = self._fill_row(rows, node + 1)
        return self._follows_drafts

    def _restart(self) -> bool:
        """Begin with another matcher, as one that failed stays so. Return whether it takes the answer."""
        self._matcher, self._path = self._compiled.matcher(), []
        taken: bool = self._matcher.consume_tokens(self._answer)
        return taken

    def _go_to(self, draft: DraftTree, path: list[int]) -> None:
        """Show the matcher the nodes of a path after the answer, and no others."""
        num_shared = sum(old == new for old, new in zip(self._path, path, strict=False))
        self._matcher.rollback(len(self._path) - num_shared)
        self._matcher.consume_tokens([draft.token_ids[node] for node in path[num_shared:]])
        self._path = path

    def _fill_row(self, rows: MaskRows, row: int) -> bool:
        """Fill in what may follow the tokens that the matcher has seen. Return whether that is known."""
        if not self._matcher.is_error():
            fill_next_token_bitmask(self._matcher, rows, row)
        if self._matcher.is_error():
            rows[row] = _ALL
        return not self._matcher.is_error()


def _is_allowed(mask: numpy.typing.NDArray[numpy.int32], token_id: int) -> bool:
    return bool(mask[token_id // 32] >> (token_id % 32) & 1)


def _on_deep_stack(function: Callable[[], ValueT]) -> ValueT:
    """Return what a function returns on a thread with a deep stack."""
    outcome: Future[ValueT] = Future()

    def run() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="format compiler")
    with _stack_size:
        usual = threading.stack_size(_COMPILER_STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    return outcome.result()


def cannot_be_followed(message: str) -> InvalidArgumentError:
    """Return the error for a format of which llguidance says so."""
    return InvalidArgumentError(
        f"The output format cannot be followed: {_plain(message)}.",
        field="output_format",
        reason="BAD_OUTPUT_FORMAT",
    )


def _too_complex(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"The output format is too complex: {_plain(message)}. Make it simpler.",
        field="output_format",
        reason="OUTPUT_FORMAT_TOO_COMPLEX",
    )


def _plain(message: str) -> str:
    """Return one line of a message of llguidance: of several, what is wrong rather than where."""
    if message.startswith(_DEAD_END):
        return "the model has no token with which the answer could go on in it"
    lines = re.split(r"<state>|<non-verbose", message)[0].strip().splitlines()
    found = next((line for line in lines if line.startswith("error: ")), lines[0] if lines else "unknown")
    plain = re.sub(r"^(error: |at \d+\(\d+\): )", "", found).strip().rstrip(".")
    return plain if len(plain) <= _MAX_REASON else plain[:_MAX_REASON] + "..."
