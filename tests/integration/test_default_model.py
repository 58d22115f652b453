"""The embedded SmolLM2-135M-Instruct in fp32: the same text as transformers, whatever drafts it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specdec.client import GenerateOptions
from specdec.contract.sampling import SamplingParams
from specdec.models.embedded import prepare_default_model
from tests.systems import running_system

pytestmark = [pytest.mark.default_model, pytest.mark.timeout(600)]

PROMPTS = (
    "Write the numbers from one to twelve as words, separated by commas.",
    "Repeat this sentence three times: The river bends twice before it meets the sea.",
)
MAX_NEW_TOKENS = 40
# The same weights rounded to bf16: a noisy copy of the target as an independent draft model.
ROUNDED = "rounded=causal-lm:default"


async def test_greedy_equals_transformers_and_samples_depend_on_the_seed_alone() -> None:
    folder = prepare_default_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.set_num_threads(2)
    options = {"kv_cache_mib": 64.0}
    drafter_options = {"dtype": "bfloat16", "kv_cache_mib": 32.0}
    async with running_system(
        folder, "ngram", "mtp", ROUNDED, verifier_options=options, drafter_options=drafter_options
    ) as system:
        num_accepted = Counter[str]()
        for prompt in PROMPTS:
            chat = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
            input_ids = inputs["input_ids"]
            output = target.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
            expected = output[0, input_ids.shape[1] :].tolist()
            samples = []
            for method in ("none", "ngram", "mtp", "rounded"):
                greedy = await system.client.generate(
                    prompt, GenerateOptions(method=method, draft_depth=4, max_new_tokens=MAX_NEW_TOKENS)
                )
                assert list(greedy.token_ids) == expected, (method, prompt)
                assert greedy.usage.input_tokens == input_ids.shape[1]
                assert greedy.text == tokenizer.decode(expected, skip_special_tokens=True)
                num_accepted[method] += greedy.speculation.num_accepted_tokens
                sampled = await system.client.generate(
                    prompt,
                    GenerateOptions(
                        method=method,
                        max_new_tokens=MAX_NEW_TOKENS,
                        sampling=SamplingParams(temperature=0.8, top_p=0.95, seed=11),
                    ),
                )
                samples.append(sampled.token_ids)
            assert all(sample == samples[0] for sample in samples)
        assert num_accepted["ngram"] + num_accepted["rounded"] > 3 * MAX_NEW_TOKENS // 4
        assert num_accepted["mtp"] > MAX_NEW_TOKENS // 4, "the drafters must have been of use"
    torch.set_num_threads(1)
