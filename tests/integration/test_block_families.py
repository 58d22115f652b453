"""Drafters of other projects' families in service: the text is the target's, whatever they draft and read."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from specdec.client import GenerateOptions
from specdec.contract.sampling import SamplingParams
from tests.integration.test_dflash import MODES, NUM_TOKENS, PROMPT, K, generate, save_pair
from tests.systems import running_system
from tests.tiny_dflash import save_as_dflash2, save_as_dspark, save_tiny_dflash
from tests.tiny_eagle import save_tiny_eagle


def save_eagle(_: Path, folder: Path) -> Path:
    """Write an EAGLE-3 drafter; it has nothing of the drafter that others are made of."""
    return save_tiny_eagle(folder)


FAMILIES: dict[str, Callable[[Path, Path], Path]] = {
    "eagle3": save_eagle,
    "dflash2": save_as_dflash2,
    **{f"dspark, {kind}": partial(save_as_dspark, kind=kind) for kind in ("vanilla", "gated", "rnn")},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FAMILIES)
async def test_the_text_is_the_targets(name: str, mode: str, tmp_path: Path) -> None:
    target, source = save_pair(tmp_path)
    folder, family = FAMILIES[name](source, tmp_path / "other"), name.split(",", maxsplit=1)[0]
    sampled = SamplingParams(temperature=0.9, top_p=0.95, seed=5)
    async with running_system(
        target, f"{family}:{folder}", drafter_options=MODES[mode][1] | {"target": str(target)}
    ) as system:
        for sampling in (SamplingParams(), sampled):
            plain = await generate(system, method="none", draft_depth=None, sampling=sampling)
            assert await generate(system, method=family, sampling=sampling) == plain
            assert await generate(system, method=family, draft_nodes=12, sampling=sampling) == plain
        answers = (
            generate(system, PROMPT[shift:], method=family, draft_depth=K - shift) for shift in (0, 2, 3)
        )
        alone = [
            await generate(system, PROMPT[shift:], method="none", draft_depth=None) for shift in (0, 2, 3)
        ]
        assert await asyncio.gather(*answers) == alone


@pytest.mark.parametrize("name", ["dflash2", "dspark, vanilla", "eagle3"])
async def test_drafts_are_accepted_now_and_then(name: str, tmp_path: Path) -> None:
    target, source = save_pair(tmp_path)
    folder, family = FAMILIES[name](source, tmp_path / "other"), name.split(",", maxsplit=1)[0]
    async with running_system(target, f"{family}:{folder}") as system:
        options = GenerateOptions(
            method=family, max_new_tokens=60, draft_depth=K, draft_nodes=30, ignore_eos=True
        )
        result = await system.client.generate(PROMPT, options)
    assert result.speculation.num_accepted_tokens > 0


@pytest.mark.parametrize("mode", MODES)
async def test_drafters_that_read_other_layers_serve_one_request(mode: str, tmp_path: Path) -> None:
    """The verifier cannot project for all, so each projects for itself."""
    target, source = save_pair(tmp_path)
    eagle = save_tiny_eagle(tmp_path / "eagle")
    other = save_as_dflash2(save_tiny_dflash(tmp_path / "source", target_layer_ids=[1]), tmp_path / "other")
    options = MODES[mode][1] | {"target": str(target)}
    async with running_system(
        target, f"dflash:{source}", f"dflash2:{other}", f"eagle3:{eagle}", drafter_options=options
    ) as system:
        plain = await generate(system, method="none", draft_depth=None)
        merged = GenerateOptions(
            method="dflash+dflash2+eagle3",
            max_new_tokens=NUM_TOKENS,
            draft_depth=K,
            draft_nodes=40,
            ignore_eos=True,
        )
        result = await system.client.generate(PROMPT, merged)
    assert list(result.token_ids) == plain
    assert result.speculation.num_fallback_rounds == 0
    assert [part.drafter for part in result.speculation.proposers] == ["dflash", "dflash2", "eagle3"]
    for part in result.speculation.proposers:
        assert part.num_fallback_rounds == 0
        assert part.num_draft_tokens > 0
        assert part.num_accepted_tokens > 0
