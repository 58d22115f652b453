"""A drafter that is never right, for want of weights or of sense, is found out and left alone, by itself and
as a part of a merged method; the text stays the same."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file

from specdec.cli.render import closing_line
from specdec.client import GenerateOptions
from specdec.client.generation import Generation
from tests.integration.test_lossless import TEST_FAMILIES
from tests.refusals import shared
from tests.systems import System, running_system
from tests.tiny_dflash import save_tiny_dflash

PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]
NUM_TOKENS = 64
VERDICT = "hardly ever right"


def zeroed(folder: Path) -> Path:
    """Make all weights of a checkpoint zero."""
    path = folder / "model.safetensors"
    weights = {name: weight.zero_() for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    return folder


@pytest_asyncio.fixture(loop_scope="module")
async def system(tiny_llama: Path, tmp_path: Path) -> AsyncIterator[System]:
    dead = zeroed(save_tiny_dflash(tmp_path / "dead"))
    drafters = ("wrong", f"dead=dflash:{dead}", f"same=causal-lm:{tiny_llama}")
    async with running_system(tiny_llama, *drafters, families=TEST_FAMILIES) as running:
        yield running


async def generate(system: System, method: str, **options: int) -> Generation:
    asked = GenerateOptions(method=method, max_new_tokens=NUM_TOKENS, ignore_eos=True, **options)  # type: ignore[arg-type]
    return await system.client.generate(PROMPT, asked)


def num_warnings(caplog: pytest.LogCaptureFixture) -> int:
    return sum(
        record.levelno == logging.WARNING and "never right" in record.message for record in caplog.records
    )


@shared
@pytest.mark.parametrize("drafter", ["wrong", "dead"])
async def test_a_merged_method_goes_on_without_it(
    drafter: str, system: System, caplog: pytest.LogCaptureFixture
) -> None:
    plain = await generate(system, "none")
    for _ in range(2):  # sizes that are chosen may be 0 on a busy machine, and then nobody finds out
        found = await generate(system, f"{drafter}+same", draft_depth=1)
        assert found.token_ids == plain.token_ids
    assert num_warnings(caplog) == 1
    merged = await generate(system, f"{drafter}+same")
    assert merged.token_ids == plain.token_ids
    wrong, same = merged.speculation.proposers
    assert (wrong.num_draft_tokens, same.num_accepted_tokens > 0) == (0, True)
    assert VERDICT in wrong.fallback_reason
    assert same.fallback_reason == ""
    assert f"without {drafter}: its drafts are {VERDICT}" in closing_line(merged)
    assert num_warnings(caplog) == 1
    alone = await generate(system, drafter)
    assert alone.token_ids == plain.token_ids
    assert alone.speculation.num_draft_tokens == 0, "what is known of it holds for each of its methods"
    assert VERDICT in alone.speculation.fallback_reason
    assert VERDICT in closing_line(alone)


@shared
async def test_who_sets_a_size_gets_it_and_is_told(system: System, caplog: pytest.LogCaptureFixture) -> None:
    plain = await generate(system, "none")
    for _ in range(2):
        alone = await generate(system, "wrong", draft_depth=3)
        assert alone.token_ids == plain.token_ids
        assert alone.speculation.num_draft_tokens > 3 * (NUM_TOKENS // 2), "it is asked in every round"
        assert alone.speculation.num_fallback_rounds == 0
        assert VERDICT in alone.speculation.fallback_reason
        assert VERDICT in closing_line(alone)
    merged = await generate(system, "wrong+same", draft_depth=3)
    assert merged.token_ids == plain.token_ids
    wrong, same = merged.speculation.proposers
    assert (wrong.num_draft_tokens > 0, wrong.num_fallback_rounds) == (True, 0)
    assert VERDICT in wrong.fallback_reason
    assert same.fallback_reason == ""
    assert num_warnings(caplog) == 1


@shared
async def test_a_drafter_that_is_right_is_never_accused(system: System) -> None:
    answer = await generate(system, "same")
    assert answer.speculation.fallback_reason == ""
    assert answer.speculation.num_accepted_tokens > 0
