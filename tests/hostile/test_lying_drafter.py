"""A drafter that lies about all it can: the output stays the target's, in bounded time, without a leak."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from specdec.contract.sampling import SamplingParams
from tests.hostile.liar import NAME
from tests.hostile.lies import LIARS, STREAMS
from tests.hostile.scene import NUM_TOKENS, Honest, scene_of
from tests.refusals import PROMPT, shared

SAMPLED = SamplingParams(temperature=1.0, seed=7)
REQUESTS: Sequence[tuple[str, dict[str, Any]]] = (
    (NAME, {}),
    (NAME, {"sampling": SAMPLED, "draft_nodes": 12}),
    (f"{NAME}+model", {}),
)
"""What is asked of the liar: four draft tokens in a row, or a tree of twelve."""


@shared
@pytest.mark.parametrize("lie", LIARS)
async def test_the_output_is_the_targets_whatever_a_drafter_says(lie: str, honest: Honest) -> None:
    async with scene_of(LIARS[lie](), honest) as scene:
        for method, options in REQUESTS:
            expected = await scene.plain(**options)
            scene.liar.expected = [*PROMPT, *expected.token_ids]
            lied_to, beside = await asyncio.gather(
                scene.generate(method, **options), scene.generate("model", sampling=SAMPLED)
            )
            assert lied_to.token_ids == expected.token_ids
            assert lied_to.text == expected.text
            assert lied_to.finish_reason == "length"
            assert lied_to.speculation.fallback_reason.isprintable()
            assert len(lied_to.speculation.fallback_reason) < 600
            assert len(beside.token_ids) == NUM_TOKENS
        assert scene.liar.num_drafts or lie in STREAMS
        await scene.assert_clean()
