"""The output is the target's own, whatever drafts it: greedy equals transformers, sampled depends on the seed
alone. fp32 throughout, where passes of different shapes agree."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import Drafter, DrafterTraits, DraftItem
from drafter_service.families import FAMILIES, DrafterSpec
from specdec.client import GenerateOptions
from specdec.client.generation import Speculation
from specdec.contract.sampling import SamplingParams
from tests.slow import quick_only
from tests.systems import System, running_system
from tests.tiny_models import FAMILIES as MODEL_FAMILIES
from tests.tiny_models import PUBLISHED, QUICK_FAMILIES, VOCAB_SIZE, save_tiny_model

PROMPTS = ([5, 6, 7, 5, 6, 7, 5, 6], list(range(40, 100)), [9])


class WrongDrafter(Drafter):
    """Drafts one token over and over, hardly ever the target's."""

    def __init__(self, spec: DrafterSpec, config: DrafterConfig) -> None:
        self.traits = DrafterTraits(spec.name, "wrong", config.max_draft_depth, 4)

    def propose(self, items: Sequence[DraftItem]) -> list[list[int]]:
        return [[VOCAB_SIZE - 1] * item.draft_depth for item in items]


TEST_FAMILIES = {**FAMILIES, "wrong": WrongDrafter}


def reference(model: Path, prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """Return the greedy continuation of transformers itself."""
    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    output = target.generate(
        torch.tensor([prompt]), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
    )
    ids: list[int] = output[0, len(prompt) :].tolist()
    return ids


def assert_no_fallback(speculation: Speculation) -> None:
    """Check that all drafters did their work; the wrong one may be said to be hardly ever right."""
    told = {part.drafter: part.fallback_reason for part in speculation.proposers}
    for drafter, reason in {speculation.method: speculation.fallback_reason, **told}.items():
        assert reason == "" or ("wrong" in drafter and "hardly ever right" in reason)


async def generate(system: System, prompt: Sequence[int], **options: object) -> list[int]:
    """Return the output, and check that the method asked for had its part in it."""
    options = {"draft_depth": 4, **options}
    result = await system.client.generate(prompt, GenerateOptions(**options))  # type: ignore[arg-type]
    speculation = result.speculation
    assert speculation.method == options["method"]
    assert_no_fallback(speculation)
    if speculation.num_rounds > 1 and options["method"] in ("wrong", "same", "noisy"):
        assert speculation.num_draft_tokens >= speculation.num_rounds - 1
    if speculation.num_rounds > 8 and options["method"] == "ngram":
        assert speculation.num_draft_tokens > 0
    if options["method"] == "wrong":
        assert speculation.num_accepted_tokens < speculation.num_draft_tokens / 4
    return list(result.token_ids)


@pytest.mark.parametrize("family", quick_only([*MODEL_FAMILIES, PUBLISHED], [*QUICK_FAMILIES, PUBLISHED]))
async def test_greedy_equals_transformers_for_every_drafter(family: str, tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "target", family)
    noisy = save_tiny_model(tmp_path / "noisy", family, noise=0.05)
    if family == PUBLISHED:
        assert AutoConfig.from_pretrained(model).architectures == ["Gemma4ForConditionalGeneration"]
    drafters = ("ngram", "wrong", f"same=causal-lm:{model}", f"noisy=causal-lm:{noisy}")
    async with running_system(model, *drafters, families=TEST_FAMILIES) as system:
        for prompt in PROMPTS:
            expected = reference(model, prompt, 40)
            for method in ("none", "ngram", "wrong", "same", "noisy"):
                actual = await generate(system, prompt, method=method, max_new_tokens=40)
                assert actual == expected, (family, method, prompt)


@pytest.mark.parametrize("draft_depth", quick_only([1, 3, 20], [20]))
async def test_any_draft_length_gives_the_same_text(
    tiny_llama: Path, noisy_llama: Path, draft_depth: int
) -> None:
    async with running_system(tiny_llama, f"noisy=causal-lm:{noisy_llama}") as system:
        expected = reference(tiny_llama, PROMPTS[0], 50)
        options = {"method": "noisy", "draft_depth": draft_depth, "max_new_tokens": 50}
        assert await generate(system, PROMPTS[0], **options) == expected


@pytest.mark.slow
async def test_sizes_chosen_round_by_round_give_the_same_text(tiny_llama: Path, noisy_llama: Path) -> None:
    drafters = ("ngram", "wrong", f"noisy=causal-lm:{noisy_llama}")
    options = GenerateOptions(max_new_tokens=120, ignore_eos=True)
    num_draft_tokens = 0
    async with running_system(tiny_llama, *drafters, families=TEST_FAMILIES) as system:
        for prompt in PROMPTS[:2]:
            plain = await system.client.generate(prompt, replace(options, method="none"))
            methods = ("ngram", "wrong", "noisy", "noisy+ngram", "wrong+noisy") * 2
            answers = await asyncio.gather(
                *(system.client.generate(prompt, replace(options, method=method)) for method in methods)
            )
            for method, answer in zip(methods, answers, strict=True):
                assert answer.token_ids == plain.token_ids, method
                assert_no_fallback(answer.speculation)
                num_draft_tokens += answer.speculation.num_draft_tokens
    # Once it is known that drafts of so small a model do not pay, a whole answer may have none.
    assert num_draft_tokens > 0


async def test_drafts_that_are_never_accepted_are_given_up(tiny_llama: Path) -> None:
    async with running_system(tiny_llama, "wrong", families=TEST_FAMILIES) as system:
        options = GenerateOptions(method="wrong", max_new_tokens=200, ignore_eos=True)
        first = await system.client.generate(PROMPTS[0], options)
        second = await system.client.generate(PROMPTS[0], options)
    assert 0 < first.speculation.num_draft_tokens_per_position[0] < 100
    assert second.speculation.num_draft_tokens_per_position[0] < 30, "what was learned is kept"


SAMPLINGS = [
    SamplingParams(temperature=1.0, seed=1),
    SamplingParams(temperature=0.7, top_k=40, seed=2),
    SamplingParams(temperature=1.3, top_p=0.9, seed=3),
    SamplingParams(temperature=1.0, min_p=0.05, repetition_penalty=1.3, seed=4),
    SamplingParams(temperature=0.9, presence_penalty=0.5, frequency_penalty=0.4, seed=5),
    SamplingParams(repetition_penalty=1.2, logit_bias={7: 3.0, 8: -100.0}),
    SamplingParams(temperature=1.0, allowed_token_ids=tuple(range(50)), seed=2**64 - 1),
]


@pytest.mark.parametrize("sampling", quick_only(SAMPLINGS, SAMPLINGS[3:5]), ids=str)
async def test_every_drafter_gives_the_same_sample(
    sampling: SamplingParams, tiny_llama: Path, noisy_llama: Path
) -> None:
    drafters = ("ngram", "wrong", f"same=causal-lm:{tiny_llama}", f"noisy=causal-lm:{noisy_llama}")
    async with running_system(tiny_llama, *drafters, families=TEST_FAMILIES) as system:
        for prompt in PROMPTS:
            samples = {
                method: await generate(
                    system, prompt, method=method, max_new_tokens=30, sampling=sampling, ignore_eos=True
                )
                for method in ("none", "ngram", "wrong", "same", "noisy")
            }
            assert all(sample == samples["none"] for sample in samples.values()), samples


async def test_seeds_differ_and_repeat(tiny_llama: Path) -> None:
    async with running_system(tiny_llama) as system:
        samples = [
            await generate(
                system,
                PROMPTS[0],
                method="none",
                max_new_tokens=20,
                sampling=SamplingParams(temperature=1.5, seed=seed),
            )
            for seed in (1, 2, 1)
        ]
        assert samples[0] == samples[2] != samples[1]


async def test_a_drafter_with_the_targets_weights_and_noise_is_always_accepted(tiny_llama: Path) -> None:
    async with running_system(tiny_llama, f"same=causal-lm:{tiny_llama}") as system:
        result = await system.client.generate(
            PROMPTS[0],
            GenerateOptions(
                method="same",
                max_new_tokens=41,
                draft_depth=4,
                ignore_eos=True,
                sampling=SamplingParams(temperature=1.0, seed=3),
            ),
        )
        speculation = result.speculation
        assert speculation.num_accepted_tokens == speculation.num_draft_tokens
        assert speculation.num_rounds == 8
