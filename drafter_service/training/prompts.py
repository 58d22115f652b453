"""Prompts to train on: made up by the target itself, or read from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from transformers import AutoTokenizer

from drafter_service.training.generate import Decoder, GenerationProgress, Job, room_after
from specdec.bench.workload import load_prompts
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.sampling import SamplingParams

_MARK = "\u2042"
"""Placeholder of the user's text in a rendered chat template."""
_MAX_TEXT_TOKENS = 96
_MAX_CODE_TOKENS = 160
_OPENINGS = (
    *("", "", "", "Write", "Explain", "How", "What", "Why", "List", "Give", "Describe", "Compare"),
    *("Summarize", "Translate", "Create", "Can you", "Tell me", "Write a Python function", "I have", "If"),
    *("Who", "When was", "Where", "Which", "Is it true that", "Suggest", "Compose", "Pretend you are"),
    *("Write a short story about", "Write an email to", "Help me", "Solve", "Translate German to English:"),
    *("A shop sells", "What is the name of", "Fix the bug in this code:\n```python\ndef "),
)
"""First words of prompts. Without them a model asks for much the same again and again."""
_UNFINISHED = (
    "Complete this Python function:\n```python\ndef ",
    "Complete this Python function:\n```python\nfrom typing import List\n\n\ndef ",
    "Complete the following function.\n\n```python\ndef ",
)
"""Openings of prompts that begin a function and end with its docstring."""
_NUM_OPENINGS = len(_OPENINGS) + len(_UNFINISHED)
_DOCSTRING = '"""'


class PromptMaker:
    """Makes prompts in the form of the target's chat template.

    Args:
        folder: folder of the target, with its tokenizer.
        eos_token_ids: tokens that end the target's answers.

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
        self._before = self.encode(before) or [self._first_token]
        self._after = self.encode(after)

    @property
    def _first_token(self) -> int:
        start = self._tokenizer.bos_token_id
        return int(start if start is not None else next(iter(sorted(self._eos)), 0))

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special tokens around it."""
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return token_ids

    def prompt(self, text: str) -> list[int]:
        """Return the tokens that ask for an answer to `text`."""
        return [*self._before, *self.encode(text), *self._after]

    def read(self, *paths: Path) -> list[list[int]]:
        """Read prompts from workload files: JSON lines of question_id, category and turns.

        Raises:
            InvalidArgumentError: a file is not of that form.
        """
        return [self.prompt(prompt.text) for prompt in load_prompts(*paths)]

    def make_up(
        self, decoder: Decoder, count: int, seed: int, progress: GenerationProgress
    ) -> list[list[int]]:
        """Have the target write prompts: it continues the user's turn of its chat template.

        They are at most `count`, all different: a repeated prompt could be trained on and held out.

        Raises:
            InvalidArgumentError: the target's context is too short for a prompt.
        """
        seeds = numpy.random.SeedSequence(seed).generate_state(count).tolist()
        openings = [(*_OPENINGS, *_UNFINISHED)[index % _NUM_OPENINGS] for index in range(count)]
        jobs = [self._opening(decoder, *pair) for pair in zip(openings, seeds, strict=True)]
        texts = progress.run("Making up prompts", decoder, jobs)
        prompts = [
            (*self._before, *self._own_words(opening, job, text), *self._after)
            for opening, job, text in zip(openings, jobs, texts, strict=True)
        ]
        return [list(prompt) for prompt in dict.fromkeys(prompts)]

    @property
    def _stop_ids(self) -> frozenset[int]:
        return self._eos | set(self._after[:1])

    def _opening(self, decoder: Decoder, opening: str, seed: int) -> Job:
        start = (*self._before, *self.encode(opening))
        # At least as much room is left for the answer.
        room = room_after(decoder.packed, (*start, *self._after)) // 2
        max_tokens = _MAX_CODE_TOKENS if opening in _UNFINISHED else _MAX_TEXT_TOKENS
        sampling = SamplingParams(temperature=1.0, top_p=0.95, seed=seed)
        return Job(start, max(1, min(max_tokens, room)), self._stop_ids, sampling)

    def _own_words(self, opening: str, job: Job, text: Sequence[int]) -> list[int]:
        """Return the user's turn: an opening and the target's continuation."""
        token_ids = [*job.prompt[len(self._before) :], *(t for t in text if t not in self._stop_ids)]
        if opening not in _UNFINISHED:
            return token_ids
        signature, *rest = self.text(token_ids).split(_DOCSTRING)
        docstring = _DOCSTRING.join(["", rest[0], ""]) if rest else ""
        return self.encode(f"{signature}{docstring}\n```")

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True)
        return text

    def question(self, prompt: Sequence[int]) -> str:
        """Return the user's turn of a prompt."""
        stop = len(prompt) - len(self._after)
        return self.text(prompt[len(self._before) : stop]).strip()
