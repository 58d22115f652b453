"""A prompt that begins like an earlier text takes up where they differ: the same tokens and drafts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from specdec.client import GenerateOptions, Generation
from specdec.runtime.kv_slots import BLOCK_TOKENS
from tests.integration.test_dflash import save_pair
from tests.systems import System, running_system
from tests.tiny_assistants import save_narrow_pair

PROMPT = [9, 65, 66, 67, 10, 68, 65, 66] * 20
"""Two full blocks and a half."""
NUM_FULL = len(PROMPT) // BLOCK_TOKENS * BLOCK_TOKENS
OPTIONS = GenerateOptions(method="none", max_new_tokens=24, ignore_eos=True)


async def answer(system: System, prompt: list[int], **fields: object) -> Generation:
    return await system.client.generate(prompt, replace(OPTIONS, **fields))  # type: ignore[arg-type]


async def test_the_same_beginning_is_computed_once(tiny_llama: Path) -> None:
    async with (
        running_system(tiny_llama) as system,
        running_system(tiny_llama, verifier_options={"no_prefix_reuse": True}) as without,
    ):
        longer = [*PROMPT[: NUM_FULL + 5], 70, 71, 72]
        for prompt, num_reused in (
            (PROMPT, 0),
            (PROMPT, NUM_FULL),
            (longer, NUM_FULL),
            (PROMPT[:-1], NUM_FULL),
        ):
            found, expected = await answer(system, prompt), await answer(without, prompt)
            assert found.token_ids == expected.token_ids
            assert found.usage.reused_input_tokens == num_reused
            assert expected.usage.reused_input_tokens == 0


async def test_a_prompt_of_full_blocks_has_a_pass_for_its_last(tiny_llama: Path) -> None:
    async with running_system(tiny_llama) as system:
        first = await answer(system, PROMPT[:NUM_FULL])
        again = await answer(system, PROMPT[:NUM_FULL])
    assert again.token_ids == first.token_ids
    assert again.usage.reused_input_tokens == NUM_FULL - BLOCK_TOKENS


async def test_a_conversation_goes_on_with_its_own_answers(tiny_llama: Path) -> None:
    async with running_system(tiny_llama) as system:
        history, reused = PROMPT, list[int]()
        for _ in range(3):
            turn = await answer(system, history, max_new_tokens=BLOCK_TOKENS)
            reused.append(turn.usage.reused_input_tokens)
            history = [*history, *turn.token_ids, 9, 10]
    # Of the last token of an answer there is no state yet.
    assert reused[0] == 0
    assert [BLOCK_TOKENS * (length // BLOCK_TOKENS) for length in (len(PROMPT) + 63, len(PROMPT) + 129)] == (
        reused[1:]
    )


async def test_what_one_owner_said_is_of_no_use_to_another(tiny_llama: Path) -> None:
    async with running_system(tiny_llama) as system:
        await answer(system, PROMPT, cache_salt="a")
        assert (await answer(system, PROMPT, cache_salt="b")).usage.reused_input_tokens == 0
        assert (await answer(system, PROMPT)).usage.reused_input_tokens == 0
        assert (await answer(system, PROMPT, cache_salt="a")).usage.reused_input_tokens == NUM_FULL


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("storage", ["auto", "stream"])
@pytest.mark.parametrize("kind", ["mtp", "dflash"])
async def test_drafts_are_the_same_with_what_is_reused(
    kind: str, storage: str, temperature: float, tmp_path: Path
) -> None:
    target, drafter = save_narrow_pair(tmp_path, "gemma4") if kind == "mtp" else save_pair(tmp_path)
    sampling = replace(OPTIONS.sampling, temperature=temperature, seed=3)
    async with running_system(
        target,
        f"{kind}:{drafter}",
        drafter_options={"target": str(target)},
        verifier_options={"target_state": storage},
    ) as system:
        first, again = [
            await answer(system, PROMPT, method=kind, draft_depth=3, sampling=sampling) for _ in range(2)
        ]
        plain = await answer(system, PROMPT, sampling=sampling)
    assert first.token_ids == again.token_ids == plain.token_ids
    assert again.usage.reused_input_tokens == NUM_FULL
    assert first.speculation.num_draft_tokens == again.speculation.num_draft_tokens > 0
    assert first.speculation.acceptance_histogram == again.speculation.acceptance_histogram
    assert not again.speculation.num_fallback_rounds


async def test_states_that_were_not_kept_are_computed(tmp_path: Path) -> None:
    target, drafter = save_pair(tmp_path)
    async with running_system(target, f"dflash:{drafter}", drafter_options={"target": str(target)}) as system:
        await answer(system, PROMPT)
        first = await answer(system, PROMPT, method="dflash", draft_depth=3)
        again = await answer(system, PROMPT, method="dflash", draft_depth=3)
        plain = await answer(system, PROMPT)
    assert (first.usage.reused_input_tokens, again.usage.reused_input_tokens) == (0, NUM_FULL)
    assert plain.usage.reused_input_tokens == NUM_FULL
    assert first.speculation.acceptance_histogram == again.speculation.acceptance_histogram


async def test_what_is_kept_is_no_reason_to_refuse(tiny_llama: Path) -> None:
    async with running_system(tiny_llama) as system:
        assert system.verifier.servicer.verifier
        pool = system.verifier.servicer.verifier.pool
        for first in range(100, 112):
            await answer(system, [first, *PROMPT])
        assert pool.full.prefixes.num_idle > 0
        assert pool.free_tokens == pool.capacity_tokens
        whole = await answer(system, PROMPT, max_new_tokens=pool.capacity_tokens - len(PROMPT))
        assert whole.finish_reason == "length"
        assert pool.free_tokens == pool.capacity_tokens
