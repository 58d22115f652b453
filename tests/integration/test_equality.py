"""An answer is plain decoding's in all that a client sees, over methods, lengths of drafts and trees,
wherever it ends in a round, whatever changes the logits, and close to the end of the context."""

from __future__ import annotations

import asyncio
import json
import string
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import pytest_asyncio

from drafter_service.config import DrafterConfig
from drafter_service.drafters.base import Drafted, DraftItem
from drafter_service.drafters.causal_lm.drafter import CausalLmDrafter
from drafter_service.families import FAMILIES, DrafterSpec
from specdec.client import GenerateOptions, Token
from specdec.client.generation import Generation
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.sampling import SamplingParams
from specdec.runtime.loading import load_causal_lm
from tests.raw_streams import until
from tests.refusals import CONTEXT, assert_healthy, shared
from tests.slow import quick_only
from tests.systems import System, running_system
from tests.tiny_models import VOCAB_SIZE, byte_tokenizer, save_tiny_model
from tests.trees import random_tree

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
NUM_TOKENS = 40
LETTERS = tuple(byte_tokenizer().convert_tokens_to_ids(list(string.ascii_letters)))
"""Tokens of one letter each: answers of these have as many characters as tokens."""


class BranchingDrafter(CausalLmDrafter):
    """Drafts a model's own chain, hidden among wrong branches wherever a tree is wanted."""

    def __init__(self, spec: DrafterSpec, config: DrafterConfig) -> None:
        loaded = load_causal_lm(spec.model, dtype="float32", device="cpu")
        super().__init__(spec.name, loaded, kv_budget_bytes=2**22, max_draft_depth=config.max_draft_depth)
        self.traits = replace(self.traits, max_draft_nodes=32)
        self._random = Random(0)

    def propose(self, items: Sequence[DraftItem]) -> list[Drafted]:  # type: ignore[override]
        return [
            self._branched(chain, item) if item.wants_tree else chain
            for chain, item in zip(super().propose(items), items, strict=True)
        ]

    def _branched(self, chain: list[int], item: DraftItem) -> Drafted:
        num_wrong = item.draft_nodes - len(chain)
        tree = random_tree(self._random, chain, num_wrong=num_wrong, vocab_size=VOCAB_SIZE)
        kept = tree.fitting(max_depth=item.draft_depth, draft_nodes=item.draft_nodes)
        return tree.select(sorted(kept))


METHODS = {
    "chains of 1": {"method": "same", "draft_depth": 1},
    "chains of 8": {"method": "same", "draft_depth": 8},
    "chains, half wrong": {"method": "noisy", "draft_depth": 5},
    "small trees": {"method": "tree", "draft_depth": 3, "draft_nodes": 7},
    "large trees": {"method": "tree", "draft_depth": 8, "draft_nodes": 24},
    "merged chains": {"method": "noisy+ngram", "draft_depth": 4},
    "merged trees": {"method": "noisy+tree+ngram", "draft_depth": 6, "draft_nodes": 20},
    "sizes chosen": {"method": "tree+ngram"},
}
QUICK = ("chains of 8", "merged trees")
"""Between them: whole drafts accepted, right branches among wrong ones, drafters that are wrong by turns."""


@pytest.fixture(scope="module")
def ending(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny Llama as a model that ends a text of letters at the letter it has at position 20."""
    folder = save_tiny_model(tmp_path_factory.mktemp("models") / "ending")
    found = asyncio.run(_letters_of(folder))
    place = next(place for place in range(19, NUM_TOKENS) if found[place] not in found[:place])
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": found[place]}))
    return folder


async def _letters_of(model: Path) -> tuple[int, ...]:
    async with running_system(model) as system:
        return (await generate(system, method="none", ignore_eos=True)).token_ids


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def system(ending: Path, noisy_llama: Path) -> AsyncIterator[System]:
    drafters = (
        "ngram",
        f"same=causal-lm:{ending}",
        f"noisy=causal-lm:{noisy_llama}",
        f"tree=branching:{ending}",
    )
    async with running_system(
        ending,
        *drafters,
        families={**FAMILIES, "branching": BranchingDrafter},
        verifier_options={"prefill_chunk_tokens": 16},
    ) as running:
        yield running


PLAIN = {"method": "none", "draft_depth": None, "draft_nodes": 0}
GREEDY_LETTERS = SamplingParams(allowed_token_ids=LETTERS, repetition_penalty=1.5)


async def generate(system: System, prompt: Sequence[int] = PROMPT, **options: Any) -> Generation:
    defaults = {"max_new_tokens": NUM_TOKENS, "sampling": GREEDY_LETTERS}
    return await system.client.generate(prompt, GenerateOptions(**(defaults | options)))


def seen(answer: Generation) -> dict[str, Any]:
    """Return what a client sees of an answer, besides its times, statistics and what was reused for it."""
    return {
        "token_ids": answer.token_ids,
        "text": answer.text,
        "texts": [token.text for token in answer.tokens],
        "finish_reason": answer.finish_reason,
        "usage": replace(answer.usage, reused_input_tokens=0),
    }


async def assert_equal(system: System, method: str, cases: Sequence[dict[str, Any]]) -> list[Generation]:
    """Check that answers are those of plain decoding, which are returned, and that drafts were accepted."""
    gate = asyncio.Semaphore(16)

    async def answer_of(case: dict[str, Any]) -> Generation:
        async with gate:
            return await generate(system, **case)

    plain = await asyncio.gather(*(answer_of({"method": "none", **case}) for case in cases))
    drafted = await asyncio.gather(*(answer_of(METHODS[method] | case) for case in cases))
    for case, expected, answer in zip(cases, plain, drafted, strict=True):
        assert seen(answer) == seen(expected), case
    if "draft_depth" in METHODS[method]:  # sizes that are chosen may be 0 on a busy machine
        assert sum(answer.speculation.num_accepted_tokens for answer in drafted) > 0
    return list(plain)


@shared
@pytest.mark.parametrize("method", quick_only(METHODS, QUICK))
async def test_length_and_end_token_wherever_they_fall_in_a_round(method: str, system: System) -> None:
    cases: list[dict[str, Any]] = [{"max_new_tokens": n} for n in range(1, NUM_TOKENS + 1)]
    answers = await assert_equal(system, method, cases)
    whole = answers[-1]
    assert 19 < len(whole.token_ids) < NUM_TOKENS, "the end token comes within the longest"
    for n, answer in enumerate(answers, start=1):
        assert answer.token_ids == whole.token_ids[:n]
        ends = n >= len(whole.token_ids)
        assert answer.finish_reason == ("stop_token" if ends else "length")


@shared
@pytest.mark.parametrize("method", quick_only(METHODS, QUICK))
async def test_stop_strings_wherever_they_fall_in_a_round(method: str, system: System) -> None:
    whole = await generate(system, method="none", ignore_eos=True)
    assert len(whole.text) == NUM_TOKENS
    stops = [whole.text[max(0, n - 2) : n] for n in range(1, NUM_TOKENS + 1)]
    answers = await assert_equal(system, method, [{"ignore_eos": True, "stop": (stop,)} for stop in stops])
    for stop, answer in zip(stops, answers, strict=True):
        place = whole.text.index(stop)
        assert (answer.text, answer.finish_reason) == (whole.text[:place], "stop_string")
        assert answer.token_ids == whole.token_ids[: place + len(stop)]


@shared
@pytest.mark.parametrize("method", quick_only(METHODS, QUICK))
async def test_of_several_ends_in_a_round_the_first_counts(method: str, system: System) -> None:
    """A stop string, the end token and the greatest length are at most a few tokens apart."""
    free = await generate(system, method="none", ignore_eos=True)
    end = len((await generate(system, method="none")).token_ids)
    cases, ends = [], []
    for length in range(end - 4, end + 5):
        for stop_end in range(end - 2, end + 3):
            stop = free.text[stop_end - 3 : stop_end]
            cases.append({"max_new_tokens": length, "stop": (stop,)})
            ends.append({"stop_string": free.text.index(stop) + 3, "stop_token": end, "length": length})
    answers = await assert_equal(system, method, cases)
    for case, answer, places in zip(cases, answers, ends, strict=True):
        # Of those that come with the same token, the first in this order counts.
        assert answer.finish_reason == min(places, key=places.__getitem__), case
        assert len(answer.token_ids) == min(places.values()), case
    assert {answer.finish_reason for answer in answers} == {"stop_string", "stop_token", "length"}


PROCESSED = {
    "penalties": SamplingParams(repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.5),
    "penalties, sampled": SamplingParams(
        temperature=0.9, seed=5, repetition_penalty=1.2, presence_penalty=-0.5, frequency_penalty=0.8
    ),
    "min_p": SamplingParams(temperature=1.2, seed=6, min_p=0.05),
    "logit_bias": SamplingParams(logit_bias={7: 3.0, 8: -100.0, 259: 2.5}),
    "logit_bias, sampled": SamplingParams(temperature=1.0, seed=7, top_k=30, logit_bias={7: 2.0, 9: -100.0}),
    "all of them": SamplingParams(
        temperature=1.1,
        seed=8,
        top_p=0.95,
        min_p=0.01,
        repetition_penalty=1.1,
        frequency_penalty=0.3,
        logit_bias={20: 1.5},
        allowed_token_ids=tuple(range(5, 200)),
    ),
}
"""What changes a target's picks, some of it by the tokens that a branch has before."""


@shared
@pytest.mark.parametrize("method", quick_only(METHODS, QUICK))
async def test_penalties_biases_and_truncation_with_chains_and_trees(method: str, system: System) -> None:
    cases = [{"sampling": sampling, "ignore_eos": True} for sampling in PROCESSED.values()]
    answers = await assert_equal(system, method, cases)
    plain = await generate(system, method="none", sampling=SamplingParams(), ignore_eos=True)
    assert all(answer.token_ids != plain.token_ids for answer in answers), "each changes the answer"


@shared
@pytest.mark.parametrize("method", quick_only(METHODS, QUICK))
async def test_log_probabilities_are_those_of_plain_decoding(method: str, system: System) -> None:
    for sampling in (SamplingParams(), PROCESSED["penalties, sampled"], GREEDY_LETTERS):
        options = {"sampling": sampling, "ignore_eos": True, "num_top_logprobs": 3}
        plain = await generate(system, method="none", **options)
        answer = await generate(system, **(METHODS[method] | options))
        assert seen(answer) == seen(plain)
        for token, expected in zip(answer.tokens, plain.tokens, strict=True):
            assert token.logprob == pytest.approx(expected.logprob, abs=1e-4)
            ids, logprobs = zip(*token.top_logprobs, strict=True)
            expected_ids, expected_logprobs = zip(*expected.top_logprobs, strict=True)
            assert ids == expected_ids
            assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)


@shared
@pytest.mark.parametrize("method", quick_only(METHODS, QUICK))
async def test_prompts_around_the_end_of_the_context(method: str, system: System) -> None:
    options = {"sampling": SamplingParams(), "ignore_eos": True, "max_new_tokens": 100}
    for num_left in (20, 3, 2, 1):
        prompt = [at % 250 for at in range(CONTEXT - num_left)]
        plain = await generate(system, prompt, method="none", **options)
        answer = await generate(system, prompt, **(METHODS[method] | options))
        assert seen(answer) == seen(plain)
        assert (len(answer.token_ids), answer.finish_reason) == (num_left, "length")
    for num_beyond in (0, 1):
        prompt = [at % 250 for at in range(CONTEXT + num_beyond)]
        with pytest.raises(InvalidArgumentError, match=f"{len(prompt)} tokens") as raised:
            await generate(system, prompt, **(METHODS[method] | options))
        assert raised.value.reason == "PROMPT_TOO_LONG"


@shared
@pytest.mark.parametrize("method", quick_only(METHODS, QUICK))
async def test_a_request_cancelled_within_its_prefill_leaves_nothing_behind(
    method: str, system: System
) -> None:
    verifier = system.verifier.servicer.verifier
    assert verifier is not None
    pool, prompt = verifier.pool, [at % 250 for at in range(CONTEXT - 40)]
    options = {**METHODS[method], "sampling": SamplingParams(), "ignore_eos": True}
    plain = [await generate(system, given, **(options | PLAIN)) for given in (PROMPT, prompt)]
    beside = asyncio.ensure_future(generate(system, PROMPT, **options))
    received: list[Token] = []

    async def read() -> None:
        async with system.client.stream(prompt, GenerateOptions(**options)) as stream:
            async for token in stream:
                received.append(token)

    def is_prefilled() -> bool:
        return pool.capacity_tokens - pool.free_tokens >= len(prompt)

    for num_turns in (0, 5, 20):
        await until(lambda: not is_prefilled())
        reading = asyncio.ensure_future(read())
        async with asyncio.timeout(20):
            while not is_prefilled():  # noqa: ASYNC110 - it must be seen at the first turn
                await asyncio.sleep(0)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        assert not received
    answers = [await beside, await generate(system, prompt, **options)]
    assert [seen(answer) for answer in answers] == [seen(answer) for answer in plain]
    await assert_healthy(system)
