"""Prompts to train on: made up by the target itself, or read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from drafter_service.training.generate import Decoder, GenerationProgress, Job
from specdec.bench.workload import load_prompts
from specdec.sampling import SamplingParams

_MARK = "\u2042"
"""Stands for the user's text in a rendered chat template."""
_MAX_TEXT_TOKENS = 96
_OPENINGS = (
    *("", "", "", "Write", "Explain", "How", "What", "Why", "List", "Give", "Describe", "Compare"),
    *("Summarize", "Translate", "Create", "Can you", "Tell me", "Write a Python function", "I have", "If"),
)
"""First words of prompts, for variety: left alone, a model asks for much the same again and again."""


class PromptMaker:
    """Prompts in the form the target is talked to.

    Args:
        folder: the target's, with its tokenizer.
        eos_token_ids: tokens that end its answers.
    """

    def __init__(self, folder: Path, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._eos = frozenset(eos_token_ids)
        text = _MARK
        if self._tokenizer.chat_template:
            turns = [{"role": "user", "content": _MARK}]
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before, _, after = text.partition(_MARK)
        self._before = self._encode(before) or [self._first_token]
        self._after = self._encode(after)

    @property
    def _first_token(self) -> int:
        start = self._tokenizer.bos_token_id
        return int(start if start is not None else next(iter(sorted(self._eos)), 0))

    def _encode(self, text: str) -> list[int]:
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return token_ids

    def prompt(self, text: str) -> list[int]:
        """The tokens that ask for an answer to `text`."""
        return [*self._before, *self._encode(text), *self._after]

    def read(self, path: Path) -> list[list[int]]:
        """Prompts of a workload file: JSON lines of question_id, category and turns.

        Raises:
            InvalidArgumentError: it is none.
        """
        return [self.prompt(prompt.text) for prompt in load_prompts(path)]

    def make_up(
        self, decoder: Decoder, count: int, seed: int, progress: GenerationProgress
    ) -> list[list[int]]:
        """Prompts the target itself writes: it goes on with the user's turn of its chat template."""
        stop_ids = self._eos | set(self._after[:1])
        jobs = [
            Job(
                (*self._before, *self._encode(_OPENINGS[index % len(_OPENINGS)])),
                _MAX_TEXT_TOKENS,
                stop_ids,
                SamplingParams(temperature=1.0, top_p=0.95, seed=seed + index),
            )
            for index in range(count)
        ]
        texts = progress.run("Making up prompts", decoder, jobs)
        return [
            [*job.prompt, *(token for token in text if token not in stop_ids), *self._after]
            for job, text in zip(jobs, texts, strict=True)
        ]
