"""Workloads: prompts in Spec-Bench's JSONL form, an object with question_id, category and turns per line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from specdec.cli.files import read_text
from specdec.client import Message
from specdec.contract.errors import InvalidArgumentError

DEFAULT_PROMPTS = Path(__file__).with_name("prompts.jsonl")
"""The workload used when none is named: 48 prompts in six categories."""

QuestionId = int | str
"""Id of a prompt, such as 81 or "HumanEval/1"."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a workload: a turn of the user, after the turns before it."""

    question_id: QuestionId
    """Id of the prompt, unique within its file."""
    category: str
    """Group of prompts whose figures are reported together."""
    text: str
    """The user's turn; the model's chat template is applied to the conversation."""
    source: str = ""
    """Name of the prompt's file. Several files may have the same ids."""
    token_ids: tuple[int, ...] = ()
    """The prompt in the model's chat template, where engines other than the gateway answer it as well."""
    later_turns: tuple[str, ...] = ()
    """The user's turns after this one."""
    history: tuple[Message, ...] = ()
    """The conversation before this turn: turns of the user, each with the model's own answer."""
    cache_salt: str = ""
    """What services remember of the request is used for requests with the same salt only."""

    @property
    def turn(self) -> int:
        """Which turn of the user this is, counted from 1."""
        return len(self.history) // 2 + 1

    def next(self, answer: str) -> Prompt | None:
        """Return the user's next turn, once this one has an answer; None: it was the last one."""
        if not self.later_turns:
            return None
        exchange = Message("user", self.text), Message("assistant", answer)
        return replace(
            self,
            text=self.later_turns[0],
            later_turns=self.later_turns[1:],
            history=self.history + exchange,
        )

    @property
    def key(self) -> tuple[str, QuestionId]:
        """What tells the prompt from all others of a run."""
        return self.source, self.question_id


def load_prompts(*paths: Path) -> list[Prompt]:
    """Load every line of all files as its first turn with the later ones, in order; skip empty lines.

    Args:
        paths: files of the workload; none: the default workload.

    Raises:
        InvalidArgumentError: a line is not of the form, a file has no prompts, or a file is given twice.
    """
    files = paths or (DEFAULT_PROMPTS,)
    for path in files:
        if files.count(path) > 1:
            raise InvalidArgumentError(f"The prompts file {path} is given twice.", field="prompts")
    return [prompt for path in files for prompt in _load(path)]


def _load(path: Path) -> list[Prompt]:
    # Not splitlines(), which also ends lines at separators that JSON strings may contain.
    lines = read_text(path, "The prompts file").split("\n")
    prompts = [_parse(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise InvalidArgumentError(f"{path} has no prompts; it needs one JSON object per line.")
    seen: set[QuestionId] = set()
    for prompt in prompts:
        if prompt.question_id in seen:
            raise InvalidArgumentError(
                f"{path} has question_id {prompt.question_id!r} twice; ids are unique within a file."
            )
        seen.add(prompt.question_id)
    return prompts


def select_round_robin(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """Return at most `limit` prompts, one category after the other, so that a small limit covers them all.

    The order is round-robin without a limit (None) as well: then drift during a run affects every category.
    """
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    depth = max(map(len, by_category.values()), default=0)
    in_turn = [group[i] for i in range(depth) for group in by_category.values() if i < len(group)]
    return in_turn[:limit]


def name_of(path: Path) -> str:
    """Return what results call a file of prompts."""
    return "default" if path == DEFAULT_PROMPTS else str(path)


def sha256_of(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the files, one after the other, as lower-case hex."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _parse(line: str, path: Path, number: int) -> Prompt:
    place = f"{path}:{number}"
    try:
        fields = json.loads(line)
        question_id, category, turns = fields["question_id"], fields["category"], fields["turns"]
        text, later_turns = turns[0], turns[1:]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InvalidArgumentError(
            f'{place} is not of the form {{"question_id": 1, "category": "c", "turns": ["..."]}}: {error!r}'
        ) from error
    if not (_is_id(question_id) and _is_text(category) and _are_texts(turns)):
        raise InvalidArgumentError(
            f"{place}: question_id must be an integer or a non-empty string, category a non-empty string, "
            "turns a list of non-empty strings."
        )
    if category == "all":
        raise InvalidArgumentError(f'{place}: the category "all" is taken by the overall row; use another.')
    return Prompt(question_id, category, text, name_of(path), later_turns=tuple(later_turns))


def _is_id(value: object) -> bool:
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    return is_integer or (isinstance(value, str) and value != "")


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(map(_is_text, values))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""
