"""The Markov head of DFlash drafters: drafts that depend on each other, served as computed by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from drafter_service.drafters.dflash.checkpoint import DFlashCheckpoint
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.sampling import SamplingParams
from tests.integration.test_dflash import (
    MODES,
    NUM_TOKENS,
    PROMPT,
    ByHand,
    K,
    Recorder,
    generate,
    save_pair,
)
from tests.systems import running_system
from tests.tiny_dflash import save_as_z_lab

RANK = 8


@dataclass
class MarkovPair:
    """A target, a drafter with a Markov head, the same drafter without, and the head's weights."""

    target: Path
    drafter: Path
    plain: Path
    weights: dict[str, Tensor]

    def by_hand(self, committed: Sequence[int], num_drafts: int, models: ByHand) -> tuple[int, ...]:
        """Return the greedy draft after committed tokens."""
        state, token, out = (self.weights[f"markov.{name}.weight"] for name in ("state", "token", "out"))
        draft = [committed[-1]]
        for row in models.states(committed, num_drafts):
            before = models.target.get_input_embeddings()(torch.tensor(draft[-1]))
            between = silu(state @ rms_norm(row, row.shape) + token @ rms_norm(before, row.shape))
            draft.append(int((models.target.get_output_embeddings()(row + out @ between)).argmax()))
        return tuple(draft[1:])


def save_markov_pair(folder: Path, family: str = "llama") -> MarkovPair:
    target, source = save_pair(folder, family, layer_types=["full_attention"] * 2)
    scale = 32**0.5 if family.startswith("gemma") else 1.0
    config = {"dflash_config": {"block_size": K + 1, "mask_token_id": 259, "target_layer_ids": [0, 2]}}
    config["dflash_config"]["input_embedding_scale"] = scale
    plain = save_as_z_lab(source, folder / "plain", **config)
    drafter = save_as_z_lab(source, folder / "markov", **config)
    torch.manual_seed(5)
    shapes = {"state": (RANK, 32), "token": (RANK, 32), "out": (32, RANK)}
    weights = {f"markov.{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    with_head = load_file(drafter / "model.safetensors") | weights
    save_file(with_head, drafter / "model.safetensors", metadata={"format": "pt"})
    return MarkovPair(target, drafter, plain, weights)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gemma4"])
async def test_a_draft_depends_on_the_one_before_it(family: str, mode: str, tmp_path: Path) -> None:
    pair = save_markov_pair(tmp_path, family)
    models, recorder = ByHand(pair.target, tmp_path / "drafter"), Recorder()
    async with running_system(
        pair.target,
        f"dflash:{pair.drafter}",
        families=recorder.families,
        drafter_options=MODES[mode][1] | {"target": str(pair.target)},
    ) as system:
        assert await generate(system) == models.greedy(PROMPT, NUM_TOKENS)
    assert len(recorder.records) > 5
    for record in recorder.records:
        assert record.draft == pair.by_hand(record.committed, record.num_wanted, models)
    without = [tuple(models.logits(r.committed, r.num_wanted).argmax(-1).tolist()) for r in recorder.records]
    assert without != [record.draft for record in recorder.records]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_sessions_side_by_side_with_other_numbers_of_drafts(temperature: float, tmp_path: Path) -> None:
    pair = save_markov_pair(tmp_path)
    sampling = SamplingParams(temperature=temperature, seed=3)
    asked = [(PROMPT[shift:], num_drafts) for shift, num_drafts in ((0, 1), (3, K), (5, 3), (8, 2))]
    alone, together = Recorder(), Recorder()
    async with running_system(pair.target, f"dflash:{pair.drafter}", families=alone.families) as system:
        expected = [await generate(system, p, sampling=sampling, draft_depth=k) for p, k in asked]
        plain = [
            await generate(system, p, sampling=sampling, method="none", draft_depth=None) for p, _ in asked
        ]
    assert expected == plain
    async with running_system(pair.target, f"dflash:{pair.drafter}", families=together.families) as system:
        answers = (generate(system, p, sampling=sampling, draft_depth=k) for p, k in asked)
        assert await asyncio.gather(*answers) == expected
    assert alone.drafts == together.drafts
    assert {len(draft) for draft in alone.drafts.values()} >= {1, 2, 3, K}


async def test_a_draft_ends_where_it_is_not_sure(tmp_path: Path) -> None:
    pair = save_markov_pair(tmp_path)
    recorder = Recorder()
    async with running_system(pair.target, f"dflash:{pair.drafter}", families=recorder.families) as system:
        text = await generate(system)
        whole = recorder.drafts
        recorder.records.clear()
        assert await generate(system, min_draft_confidence=1.0) == text
    lengths = [len(draft) for draft in recorder.drafts.values()]
    assert min(lengths) == 1
    assert lengths.count(1) >= 5
    for committed, draft in recorder.drafts.items():
        assert committed not in whole or whole[committed][: len(draft)] == draft


@pytest.mark.parametrize(
    "changes",
    [
        {"markov.out.weight": None},
        {"markov.more.weight": torch.zeros(2, 2)},
        {"markov.state.weight": torch.zeros(RANK, 31)},
        {"markov.state.weight": torch.tensor(1.0)},
        {"markov.token.weight": torch.zeros(RANK + 1, 32)},
    ],
    ids=["missing", "unknown", "width", "no matrix", "rank"],
)
def test_a_damaged_head_is_refused(changes: dict[str, Tensor | None], tmp_path: Path) -> None:
    pair = save_markov_pair(tmp_path)
    weights = load_file(pair.drafter / "model.safetensors") | changes
    kept = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(kept, pair.drafter / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidArgumentError, match=r"markov\."):
        DFlashCheckpoint.load(str(pair.drafter), dtype="float32", device="cpu")
