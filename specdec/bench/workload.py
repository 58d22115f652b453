"""Workloads: prompts in Spec-Bench's JSONL form, one object with question_id, category and turns per line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from specdec.contract.errors import InvalidArgumentError

DEFAULT_PROMPTS = Path(__file__).with_name("prompts.jsonl")
"""The workload used when none is named: 48 prompts in six categories."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a workload."""

    question_id: int
    """Unique within the workload."""
    category: str
    """Group whose figures are reported together."""
    text: str
    """The user's turn; the model's chat template is applied to it."""


def load_prompts(path: Path = DEFAULT_PROMPTS) -> list[Prompt]:
    """The first turn of every line of a workload, in the file's order; empty lines are skipped.

    Raises:
        InvalidArgumentError: naming the line that is not of the form, or a file without prompts.
    """
    lines = _read_text(path).splitlines()
    prompts = [_parse(line, f"{path}:{i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise InvalidArgumentError(f"{path} has no prompts; it needs one JSON object per line.")
    seen: set[int] = set()
    for prompt in prompts:
        if prompt.question_id in seen:
            raise InvalidArgumentError(f"{path} has question_id {prompt.question_id} twice; ids are unique.")
        seen.add(prompt.question_id)
    return prompts


def select_round_robin(prompts: Sequence[Prompt], limit: int | None) -> list[Prompt]:
    """At most `limit` prompts, one category after the other, so that a small limit covers them all.

    The order is round-robin without a limit (None) too: then drift during a run hits every category.
    """
    by_category: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_category.setdefault(prompt.category, []).append(prompt)
    depth = max(map(len, by_category.values()), default=0)
    in_turn = [group[i] for i in range(depth) for group in by_category.values() if i < len(group)]
    return in_turn[:limit]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, lower-case hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"The prompts file {path} cannot be read: {error}") from error


def _parse(line: str, place: str) -> Prompt:
    try:
        fields = json.loads(line)
        question_id, category, text = fields["question_id"], fields["category"], fields["turns"][0]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise InvalidArgumentError(
            f'{place} is not of the form {{"question_id": 1, "category": "c", "turns": ["..."]}}: {error!r}'
        ) from error
    valid_id = isinstance(question_id, int) and not isinstance(question_id, bool)
    if not (valid_id and isinstance(category, str) and isinstance(text, str) and text):
        raise InvalidArgumentError(
            f"{place}: question_id must be an integer, category a string, turns a list of non-empty strings."
        )
    if category == "all":
        raise InvalidArgumentError(f'{place}: the category "all" is taken by the overall row; use another.')
    return Prompt(question_id, category, text)
