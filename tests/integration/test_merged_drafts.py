"""Requests with several drafters: the target's text, whoever of them is there, and who it came from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specdec.client import AsyncClient, GenerateOptions, Speculation
from specdec.contract.sampling import SamplingParams
from tests.integration.gated_drafter import Gate, eventually_offers
from tests.integration.test_lossless import PROMPTS, SAMPLINGS, TEST_FAMILIES
from tests.slow import quick_only
from tests.systems import running_drafter, running_gateway, running_system, running_verifier

QUICK = [(SamplingParams(), 2), (SAMPLINGS[3], 1)]
SIZES: tuple[dict[str, Any], ...] = (
    {"draft_depth": 4},
    {"draft_depth": 4, "draft_nodes": 6},
    {},
    {"draft_nodes": 6},
)
"""Sizes of drafts: set, or chosen round by round."""


@pytest.mark.parametrize(
    ("sampling", "num_prompts"),
    quick_only([*QUICK, *((sampling, 3) for sampling in (SamplingParams(), *SAMPLINGS[:5]))], QUICK),
    ids=str,
)
async def test_merged_drafts_give_the_same_text(
    sampling: SamplingParams, num_prompts: int, tiny_llama: Path, noisy_llama: Path
) -> None:
    drafters = ("ngram", "wrong", f"noisy=causal-lm:{noisy_llama}", f"same=causal-lm:{tiny_llama}")
    options = {"max_new_tokens": 70, "sampling": sampling, "ignore_eos": True}
    async with running_system(tiny_llama, *drafters, families=TEST_FAMILIES) as system:
        for prompt in PROMPTS[:num_prompts]:
            plain = await system.client.generate(prompt, GenerateOptions(method="none", **options))
            for method in ("ngram+noisy", "wrong+ngram+noisy", "same+wrong"):
                for size in SIZES:
                    answer = await system.client.generate(
                        prompt, GenerateOptions(method=method, **size, **options)
                    )
                    assert answer.token_ids == plain.token_ids, (method, size)
                    speculation = answer.speculation
                    assert speculation.method == method
                    proposers = [proposer.drafter for proposer in speculation.proposers]
                    is_chosen = "draft_depth" not in size
                    # Where sizes are chosen and drafts do not pay, a whole answer may go without any.
                    assert proposers == method.split("+") or (is_chosen and not proposers)
                    assert_none_was_lost(speculation, may_rest=is_chosen)


def assert_none_was_lost(speculation: Speculation, *, may_rest: bool) -> None:
    """Check that all drafters did their work; who is hardly ever right may rest where sizes are chosen."""
    for part in (speculation, *speculation.proposers):
        assert part.fallback_reason == "" or "hardly ever right" in part.fallback_reason
        assert part.num_fallback_rounds == 0 or (may_rest and part.fallback_reason)


async def test_the_merged_tree_accepts_what_the_best_drafter_does(
    tiny_llama: Path, noisy_llama: Path
) -> None:
    drafters = ("wrong", f"same=causal-lm:{tiny_llama}")
    options = {"max_new_tokens": 41, "draft_depth": 4, "ignore_eos": True}
    async with running_system(tiny_llama, *drafters, families=TEST_FAMILIES) as system:
        alone = await system.client.generate(PROMPTS[0], GenerateOptions(method="same", **options))
        merged = await system.client.generate(PROMPTS[0], GenerateOptions(method="wrong+same", **options))
    assert alone.token_ids == merged.token_ids
    wrong, same = merged.speculation.proposers
    assert alone.speculation.num_rounds == merged.speculation.num_rounds == 8
    assert same.num_accepted_tokens == merged.speculation.num_accepted_tokens == 32
    assert same.num_sole_accepted_tokens >= 31
    assert wrong.num_draft_tokens == 4 * 8
    assert merged.speculation.draft_tokens_per_token > 1.5
    assert merged.speculation.acceptance_by_depth == (1.0,) * 4
    document = merged.to_json()["speculation"]
    assert [proposer["drafter"] for proposer in document["proposers"]] == ["wrong", "same"]


async def test_a_drafter_that_is_late_is_left_out(tiny_llama: Path) -> None:
    gate = Gate()
    options = GenerateOptions(draft_depth=4, max_new_tokens=60, ignore_eos=True)
    async with (
        running_verifier(tiny_llama) as (verifier, _),
        running_drafter("gated", families=gate.families) as (gated_at, _),
        running_drafter(f"same=causal-lm:{tiny_llama}") as (same_at, _),
        running_gateway(
            tiny_llama, verifier=verifier, drafter=f"{gated_at},{same_at}", draft_timeout_s=0.3
        ) as (gateway, _),
        AsyncClient(gateway, timeout_s=60) as client,
    ):
        await eventually_offers(client, "gated", "same")
        plain = await client.generate(PROMPTS[0], replace(options, method="none"))
        answer = await client.generate(PROMPTS[0], replace(options, method="gated+same"))
        gate.open()
    assert answer.token_ids == plain.token_ids
    gated, same = answer.speculation.proposers
    assert "first draft takes longer" in gated.fallback_reason
    # The last token of all needs no draft.
    assert gated.num_fallback_rounds >= answer.speculation.num_rounds - 1
    assert (same.num_fallback_rounds, same.fallback_reason) == (0, "")
    assert same.num_draft_tokens == answer.speculation.num_draft_tokens > 0
