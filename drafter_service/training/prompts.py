"""Prompts to train on: made up by the target itself, or read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from transformers import AutoTokenizer

from drafter_service.training.generate import Decoder, GenerationProgress, Job, room_after
from specdec.bench.workload import load_prompts
from specdec.errors import InvalidArgumentError
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

    Raises:
        InvalidArgumentError: the folder has no tokenizer.
    """

    def __init__(self, folder: Path, eos_token_ids: Sequence[int]) -> None:
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # a missing or broken tokenizer surfaces as many types
            raise InvalidArgumentError(
                f"{folder} has no tokenizer to write prompts with ({error}); give --tokens.", field="model"
            ) from error
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
        """Prompts the target itself writes: it goes on with the user's turn of its chat template.

        At most `count`, all different: a repeated one could be trained on and held out.

        Raises:
            InvalidArgumentError: the target's context is too short for any.
        """
        stop_ids = self._eos | set(self._after[:1])
        seeds = numpy.random.SeedSequence(seed).generate_state(count).tolist()
        jobs = [self._opening(decoder, index, seeds[index], stop_ids) for index in range(count)]
        texts = progress.run("Making up prompts", decoder, jobs)
        prompts = [
            (*job.prompt, *(token for token in text if token not in stop_ids), *self._after)
            for job, text in zip(jobs, texts, strict=True)
        ]
        return [list(prompt) for prompt in dict.fromkeys(prompts)]

    def _opening(self, decoder: Decoder, index: int, seed: int, stop_ids: set[int] | frozenset[int]) -> Job:
        start = (*self._before, *self._encode(_OPENINGS[index % len(_OPENINGS)]))
        # At least as much is left for the answer.
        room = room_after(decoder.packed, (*start, *self._after)) // 2
        sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=seed)
        return Job(start, max(1, min(_MAX_TEXT_TOKENS, room)), frozenset(stop_ids), sampling)
