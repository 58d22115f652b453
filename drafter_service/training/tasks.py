"""Prompts about texts the target wrote itself: summaries, corrections, questions, work on code.

A drafter learns to copy only from answers that copy.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from drafter_service.training.data import TokenData, TokenSequence
from drafter_service.training.prompts import PromptMaker

_TASKS = (
    "Summarize: {text}",
    "Summarize the following text in two sentences.\n\n{text}",
    "{text}\n\nSummarize the text above.",
    "Give a one-paragraph summary of this article:\n{text}",
    "Correct the spelling and grammar of this text and return the whole text.\n\n{text}",
    "Rewrite the following text in a more formal tone.\n\n{text}",
    "Rewrite this as a list of bullet points:\n\n{text}",
    "Rewrite this in simple words for a child:\n\n{text}",
    "List the main points of the following text.\n\n{text}",
    "List all names, places and numbers in this text:\n\n{text}",
    "Answer the question using the text.\n\nText: {text}\n\nQuestion: {question}",
    "{text}\n\nGiven the passage above, answer this question: {question}",
    "{other}\n\n{text}\n\nUse the documents above to answer the question: {question}",
    "Read the documents and answer.\n\n[1] {text}\n\n[2] {other}\n\n{question}",
    "Extract the most important sentence of this text:\n\n{text}",
    "Continue the following text.\n\n{text}",
)
"""Tasks about a text the target wrote; `question` is what that text answered."""
_CODE_TASKS = (
    "Explain what this code does.\n\n{text}",
    "Add a docstring and type hints to this code and return it.\n\n{text}",
    "Is there a bug in this code? If so, fix it.\n\n{text}",
    "Rewrite this code with better variable names.\n\n{text}",
    "Write a test for the following code.\n\n{text}",
)
_CODE = re.compile(r"```.*?```", re.DOTALL)
_PASSAGE_CHARACTERS = (200, 1100)
"""Lengths of the shortest and the longest passage of a task."""
_MAX_TRIES = 8
"""Number of draws for a task before it is given up: a text may be too short, or the prompt too long."""


@dataclass(frozen=True, slots=True)
class _Passage:
    text: str
    question: str
    """The question that the text answered."""


def make_tasks(
    maker: PromptMaker, data: TokenData, indices: Sequence[int], count: int, seed: int, *, max_tokens: int
) -> list[list[int]]:
    """Make at most `count` prompts, all different, that ask for something about answers.

    Args:
        indices: indices of the sequences whose answers may be quoted.
        max_tokens: length of the longest prompt, tokens.
    """
    rng = numpy.random.default_rng(seed)
    prompts: dict[tuple[int, ...], None] = {}
    for _ in range(count):
        for _ in range(_MAX_TRIES):
            text = _task(maker, [data[int(rng.choice(indices))] for _ in range(2)], rng)
            prompt = tuple(maker.prompt(text)) if text else ()
            if prompt and len(prompt) <= max_tokens and prompt not in prompts:
                prompts[prompt] = None
                break
    return [list(prompt) for prompt in prompts]


def _task(maker: PromptMaker, about: Sequence[TokenSequence], rng: numpy.random.Generator) -> str:
    """Return a task about the first of two answers, or about code in it; empty: the texts are too short."""
    passage, another = (_passage(maker, sequence) for sequence in about)
    code = _CODE.search(passage.text)
    if code and rng.random() < 0.7:
        return str(rng.choice(_CODE_TASKS)).format(text=code.group())
    text = _cut(passage.text, rng)
    other = _cut(another.text, rng)
    if not text or not other:
        return ""
    return str(rng.choice(_TASKS)).format(text=text, other=other, question=passage.question)


def _passage(maker: PromptMaker, sequence: TokenSequence) -> _Passage:
    answer = maker.text(sequence.token_ids[sequence.prompt_length :])
    return _Passage(answer.strip(), maker.question(sequence.token_ids[: sequence.prompt_length]))


def _cut(text: str, rng: numpy.random.Generator) -> str:
    """Return a random number of whole sentences from the text's start; empty: the text is too short."""
    shortest, longest = _PASSAGE_CHARACTERS
    end = text.rfind(".", shortest, int(rng.integers(shortest + 100, longest)))
    return text[: end + 1] if end > 0 else ""
