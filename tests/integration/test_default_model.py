"""The embedded SmolLM2-135M-Instruct in fp32: the same text as transformers, whatever drafts it."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import jsonschema
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from specdec.client import GenerateOptions, Generation, OutputFormat
from specdec.contract.methods import PLAIN
from specdec.contract.sampling import SamplingParams
from specdec.models.embedded import prepare_default_model
from tests.systems import System, running_system

pytestmark = [
    pytest.mark.default_model,
    pytest.mark.timeout(900),
    pytest.mark.asyncio(loop_scope="module"),
]

PROMPTS = (
    "Write the numbers from one to twelve as words, separated by commas.",
    "Repeat this sentence three times: The river bends twice before it meets the sea.",
)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95, seed=11)
# The same weights rounded to bf16: a noisy copy of the target as an independent draft model.
ROUNDED = "rounded=causal-lm:default"
DRAFTERS = ("ngram", "ngram-lm", "mtp", "dflash", ROUNDED)
TREE = {"draft_nodes": 15}
METHODS: list[tuple[str, dict[str, int]]] = [
    *((method, {}) for method in ("ngram", "ngram-lm", "mtp", "dflash", "rounded")),
    *((method, TREE) for method in ("ngram-lm", "mtp", "dflash", "mtp+ngram", "dflash+ngram-lm")),
]
"""What drafts, as chains and as trees, alone and merged."""
RIVERS = {
    "type": "object",
    "properties": {
        "rivers": {
            "type": "array",
            "items": {"type": "string", "maxLength": 12},
            "minItems": 2,
            "maxItems": 3,
        },
        "longest": {"enum": ["Nile", "Amazon"]},
    },
    "required": ["rivers", "longest"],
    "additionalProperties": False,
}
FORMATS = (
    ("Name two rivers and the longest river, as JSON.", OutputFormat(json_schema=RIVERS)),
    ("When did it end? Give the date.", OutputFormat(regex=r"It ended on \d{4}-\d{2}-\d{2}\.")),
    ("Is the Nile longer than the Thames?", OutputFormat(choices=("Yes, it is.", "No, it is not."))),
)
"""Prompts, and the formats of their answers."""


@dataclass(frozen=True)
class Target:
    """The target served, and as transformers runs it."""

    system: System
    model: PreTrainedModel
    folder: Path

    def reference(self, prompt: str, max_new_tokens: int) -> list[int]:
        """Return the greedy answer of transformers itself."""
        chat = [{"role": "user", "content": prompt}]
        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
        output = self.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answer: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return answer

    async def answer(self, prompt: str, method: str, max_new_tokens: int, **options: object) -> Generation:
        """Return an answer of the system, and check that the method drafted for it."""
        fields = {"draft_depth": None if method == PLAIN else 4, "max_new_tokens": max_new_tokens, **options}
        result = await self.system.client.generate(prompt, GenerateOptions(method=method, **fields))  # type: ignore[arg-type]
        if method != PLAIN:
            assert result.speculation.num_draft_tokens > 0, "drafts were made"
            assert result.speculation.fallback_reason == ""
            assert not any(part.fallback_reason for part in result.speculation.proposers)
        return result


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target(threads: None) -> AsyncIterator[Target]:
    folder = prepare_default_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    async with running_system(
        folder,
        *DRAFTERS,
        verifier_options={"kv_cache_mib": 64.0},
        drafter_options={"dtype": "bfloat16", "kv_cache_mib": 32.0},
    ) as system:
        yield Target(system, model, folder)


async def test_a_greedy_answer_is_that_of_transformers(target: Target) -> None:
    expected = target.reference(PROMPTS[0], 16)
    answer = await target.answer(PROMPTS[0], "dflash+ngram-lm", 16, **TREE)
    assert list(answer.token_ids) == expected
    assert answer.text == AutoTokenizer.from_pretrained(target.folder).decode(
        expected, skip_special_tokens=True
    )
    assert answer.speculation.num_accepted_tokens > 4, "the drafters were of use"


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
async def test_every_method_gives_the_greedy_answer_of_transformers(prompt: str, target: Target) -> None:
    expected = target.reference(prompt, 40)
    assert list((await target.answer(prompt, PLAIN, 40)).token_ids) == expected
    for method, options in METHODS:
        answer = await target.answer(prompt, method, 40, **options)
        assert list(answer.token_ids) == expected, (method, options)


@pytest.mark.slow
async def test_every_method_gives_the_same_sample(target: Target) -> None:
    plain = await target.answer(PROMPTS[1], PLAIN, 40, sampling=SAMPLED)
    for method, options in METHODS:
        answer = await target.answer(PROMPTS[1], method, 40, sampling=SAMPLED, **options)
        assert answer.token_ids == plain.token_ids, (method, options)


async def answer_in_format(target: Target, prompt: str, asked: OutputFormat, **options: object) -> Generation:
    """Return an answer that is of the format."""
    fields = {"max_new_tokens": 100, "output_format": asked, **options}
    answer = await target.system.client.generate(prompt, GenerateOptions(**fields))  # type: ignore[arg-type]
    assert answer.finish_reason == "stop_token"
    if asked.regex is not None:
        assert re.fullmatch(asked.regex, answer.text)
    elif asked.choices is not None:
        assert answer.text in asked.choices
    else:
        jsonschema.validate(json.loads(answer.text), RIVERS)
    return answer


async def test_an_answer_in_a_format_is_the_same_with_drafts(target: Target) -> None:
    plain = await answer_in_format(target, *FORMATS[0], method=PLAIN)
    drafted = await answer_in_format(target, *FORMATS[0], method="dflash+ngram-lm", draft_depth=4, **TREE)
    assert drafted.token_ids == plain.token_ids
    assert drafted.speculation.num_accepted_tokens > 0, "the drafters were of use"


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [SamplingParams(), SAMPLED], ids=["greedy", "sampled"])
async def test_every_method_gives_the_same_answer_in_a_format(
    sampling: SamplingParams, target: Target
) -> None:
    for prompt, asked in FORMATS:
        plain = await answer_in_format(target, prompt, asked, method=PLAIN, sampling=sampling)
        for method, size in METHODS:
            answer = await answer_in_format(
                target, prompt, asked, method=method, sampling=sampling, draft_depth=4, **size
            )
            assert answer.token_ids == plain.token_ids, (method, size)
