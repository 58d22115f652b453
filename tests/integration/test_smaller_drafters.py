"""Drafters that know fewer tokens than the target, or were made for shorter texts, draft as far as they can,
and the text is the target's own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specdec.cli.render import closing_line
from specdec.client import GenerateOptions
from specdec.client.gateway_info import DrafterServiceInfo
from specdec.client.generation import Generation
from specdec.contract.sampling import SamplingParams
from tests.raw_streams import until
from tests.systems import System, running_system
from tests.tiny_assistants import NARROW, narrow, save_tiny_assistant
from tests.tiny_dflash import save_as_speculators, save_as_z_lab, save_tiny_dflash
from tests.tiny_eagle import save_tiny_eagle
from tests.tiny_models import VOCAB_SIZE, save_tiny_model

PROMPT = [*NARROW, 9, 65, 66, 66, 10, 67, 65, 11, 66] * 2
NUM_ROWS = VOCAB_SIZE + 12
"""Tokens of the targets: the last twelve have no text, as where a vocabulary is filled up."""
CONTEXT = 64
"""Tokens of the texts that the drafters with a short context were made for; the target's are longer."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a target and its drafters: as usual, and of the context CONTEXT."""
    folder = tmp_path_factory.mktemp("smaller")
    for name, family in (("llama", "llama"), ("gemma", "gemma4")):
        narrow(save_tiny_model(folder / name, family, vocab_size=NUM_ROWS))
    narrow(save_tiny_model(folder / "model"))
    save_tiny_dflash(folder / "dflash")
    save_as_z_lab(folder / "dflash", folder / "z-lab")
    save_as_speculators(
        folder / "dflash", folder / "part", part_of_a_vocabulary(), draft_vocab_size=len(PART)
    )
    save_tiny_eagle(folder / "eagle3")
    save_tiny_assistant(folder / "mtp", "gemma4")
    for name in ("model", "z-lab", "eagle3", "mtp"):
        shorten(folder / name, folder / f"short-{name}")
    return folder


PART = (0, 3, *NARROW, 120, 255)
"""The tokens that one of the drafters drafts."""


def part_of_a_vocabulary() -> dict[str, torch.Tensor]:
    """Return the weights of a head for PART."""
    token_ids = torch.tensor(PART)
    return {
        "lm_head.weight": torch.randn(len(PART), 32, generator=torch.Generator().manual_seed(0)),
        "d2t": token_ids - torch.arange(len(PART)),
        "t2d": torch.zeros(VOCAB_SIZE, dtype=torch.bool).index_fill(0, token_ids, True),
        "embed_tokens.weight": torch.zeros(VOCAB_SIZE, 32),
    }


def shorten(source: Path, folder: Path) -> None:
    """Copy a checkpoint, made for texts of CONTEXT tokens."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    own = config.get("transformer_layer_config") or config.get("text_config") or config
    own["max_position_embeddings"] = CONTEXT
    (folder / "config.json").write_text(json.dumps(config))


FAMILY = {"model": "causal-lm", "z-lab": "dflash", "part": "dflash"}
"""The families of the checkpoints that are not named after theirs."""


@asynccontextmanager
async def system_with(checkpoints: Path, drafter: str) -> AsyncIterator[System]:
    """Run the services with that drafter and its target."""
    family = FAMILY.get(drafter.removeprefix("short-"), drafter.removeprefix("short-"))
    target = checkpoints / ("gemma" if family == "mtp" else "llama")
    async with running_system(target, "ngram", f"{drafter}={family}:{checkpoints / drafter}") as system:
        yield system


NEVER = dict.fromkeys(range(VOCAB_SIZE, NUM_ROWS), -100.0)
"""Keeps a target of random weights from picking what has no text, as no trained one would."""
SAMPLINGS = (
    SamplingParams(top_k=NUM_ROWS),
    SamplingParams(temperature=1.0, seed=1, top_k=VOCAB_SIZE + 1, logit_bias=NEVER),
    SamplingParams(logit_bias={**NEVER, 65: 1.0}),
    SamplingParams(temperature=1.0, seed=2, allowed_token_ids=(65, 66, 100, NUM_ROWS - 1), logit_bias=NEVER),
)


async def generate(system: System, method: str, **options: Any) -> Generation:
    asked = GenerateOptions(method=method, ignore_eos=True, max_new_tokens=20)
    return await system.client.generate(PROMPT, replace(asked, **options))


@pytest.mark.parametrize("drafter", ["model", "dflash", "z-lab", "part", "eagle3", "mtp"])
async def test_what_a_request_says_of_other_tokens_does_not_stop_it(drafter: str, checkpoints: Path) -> None:
    async with system_with(checkpoints, drafter) as system:
        for sampling in SAMPLINGS:
            plain = await generate(system, "none", sampling=sampling)
            for draft_nodes in (0, 0 if drafter == "model" else 12):
                drafted = await generate(
                    system, drafter, sampling=sampling, draft_depth=3, draft_nodes=draft_nodes
                )
                assert drafted.token_ids == plain.token_ids
                assert drafted.speculation.num_fallback_rounds == 0
                assert drafted.speculation.num_draft_tokens > 3


@pytest.mark.parametrize("drafter", ["short-model", "short-z-lab", "short-eagle3", "short-mtp"])
async def test_drafts_end_with_its_context_and_the_answer_says_why(drafter: str, checkpoints: Path) -> None:
    async with system_with(checkpoints, drafter) as system:
        (service,) = (await system.client.info()).drafters
        assert isinstance(service.info, DrafterServiceInfo)
        lengths = {entry.name: entry.model.max_length for entry in service.info.drafters if entry.model}
        assert lengths[drafter] == CONTEXT
        plain = await generate(system, "none", max_new_tokens=120)
        drafted = await generate(system, drafter, max_new_tokens=120, draft_depth=3)
        assert drafted.token_ids == plain.token_ids
        speculation, num_within = drafted.speculation, CONTEXT - len(PROMPT)
        assert speculation.num_draft_tokens > num_within / 4, "it drafts up to there"
        assert speculation.num_fallback_rounds >= 120 - num_within - 5, "and no further"
        reason = f"{drafter} was made for texts of {CONTEXT} tokens"
        assert reason in speculation.fallback_reason
        assert reason in closing_line(drafted).splitlines()[-1]
        host = system.drafter.servicer.host
        assert host is not None
        await until(lambda: host.num_sessions == 0)


async def test_a_prompt_beyond_its_context_is_answered_without_it(checkpoints: Path) -> None:
    prompt = PROMPT * 3
    assert len(prompt) > CONTEXT
    options = GenerateOptions(method="none", ignore_eos=True, max_new_tokens=12)
    async with system_with(checkpoints, "short-z-lab") as system:
        plain = await system.client.generate(prompt, options)
        merged = replace(options, method="short-z-lab+ngram", draft_depth=3)
        drafted = await system.client.generate(prompt, merged)
    assert drafted.token_ids == plain.token_ids
    short, ngram = drafted.speculation.proposers
    assert (short.num_draft_tokens, ngram.num_fallback_rounds) == (0, 0)
    assert f"short-z-lab was made for texts of {CONTEXT} tokens" in short.fallback_reason
