"""A drafter that is never right, for want of weights or of sense, is found out and left alone, by itself and
as a part of a merged method; the text stays the same."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from safetensors.torch import load_file, save_file

from specdec.cli.render import closing_line
from specdec.client import AsyncClient, GenerateOptions
from specdec.client.generation import Generation
from specdec.service.exporters import make_telemetry
from tests.integration.gated_drafter import eventually
from tests.integration.test_lossless import TEST_FAMILIES
from tests.integration.test_replicas import all_ready, num_rounds
from tests.refusals import shared
from tests.systems import System, running_drafter, running_gateway, running_system, running_verifier
from tests.tiny_dflash import save_tiny_dflash
from tests.tiny_models import save_tiny_model

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


async def test_a_wrong_replica_is_left_alone_and_the_others_go_on(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of one drafter there are two replicas; the weights of one are broken."""
    broken = save_tiny_model(tmp_path / "broken", seed=1)
    asked = GenerateOptions(method="small", max_new_tokens=NUM_TOKENS, ignore_eos=True)
    async with AsyncExitStack() as stack:
        verifier_at, _ = await stack.enter_async_context(running_verifier(tiny_llama))
        counts, drafters = [InMemoryMetricReader() for _ in range(2)], []
        for weights, count in zip((broken, tiny_llama), counts, strict=True):
            telemetry = make_telemetry("drafter", metric_reader=count)
            server = running_drafter(f"small=causal-lm:{weights}", telemetry=telemetry)
            drafters.append((await stack.enter_async_context(server))[0])
        gateway = running_gateway(tiny_llama, verifier=verifier_at, drafter=",".join(drafters))
        gateway_at, _ = await stack.enter_async_context(gateway)
        client = await stack.enter_async_context(AsyncClient(gateway_at, timeout_s=60))
        await eventually(lambda: all_ready(client))
        plain = await client.generate(PROMPT, replace(asked, method="none"))
        found: list[Generation] = []

        async def is_found_out() -> bool:
            found.append(await client.generate(PROMPT, replace(asked, draft_depth=1)))
            assert found[-1].token_ids == plain.token_ids
            return num_warnings(caplog) == 1

        await eventually(is_found_out)
        assert VERDICT in found[-1].speculation.fallback_reason, "who was drafted for by it is told"
        (warning,) = (entry for entry in caplog.records if "never right" in entry.message)
        assert (vars(warning)["drafter"], vars(warning)["uri"]) == ("small", drafters[0])
        before = num_rounds(counts[0], "specdec.drafter.rounds")
        for options in (asked, replace(asked, draft_depth=1)) * 3:
            answer = await client.generate(PROMPT, options)
            assert answer.token_ids == plain.token_ids
            assert answer.speculation.fallback_reason == ""
            assert answer.speculation.num_accepted_tokens == answer.speculation.num_draft_tokens
        assert answer.speculation.num_accepted_tokens > 0
        assert num_rounds(counts[0], "specdec.drafter.rounds") == before


@shared
async def test_a_drafter_that_is_right_is_never_accused(system: System) -> None:
    answer = await generate(system, "same")
    assert answer.speculation.fallback_reason == ""
    assert answer.speculation.num_accepted_tokens > 0
