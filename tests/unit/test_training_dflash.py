"""Training of DFlash drafters on a tiny target."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from rich.console import Console
from torch import Tensor

from drafter_service.training.acceptance import HeldOutAcceptance
from drafter_service.training.architecture import context_layers, mask_token
from drafter_service.training.batch import PackedBatch
from drafter_service.training.config import LoopConfig
from drafter_service.training.data import TokenData, TokenSequence
from drafter_service.training.dflash import DFlashTrainee, make_trainee
from drafter_service.training.loop import CHECKPOINT, Training
from drafter_service.training.warm_start import BlockScales
from specdec.client import GenerateOptions
from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.loading import load_causal_lm
from tests.slow import quick_only
from tests.systems import running_system
from tests.tiny_models import VOCAB_SIZE

BLOCK_SIZE = 5


def training(
    calm: Path,
    data: TokenData,
    out: Path,
    *,
    steps: int,
    block_size: int = BLOCK_SIZE,
    markov_rank: int = 16,
) -> Training:
    torch.manual_seed(0)
    loaded = load_causal_lm(str(calm), dtype="float32", device="cpu")
    out.mkdir(exist_ok=True)
    config = LoopConfig(
        out, steps=steps, warmup_steps=10, learning_rate=3e-3, tokens_per_step=256, num_held_out=32
    )
    trainee, source = make_trainee(
        loaded,
        data,
        num_layers=2,
        num_context_layers=2,
        block_size=block_size,
        num_anchors=96,
        draft_vocab_size=256,
        pool_tokens=config.pool_tokens,
        markov_rank=markov_rank,
    )
    return Training(trainee, source, data, config, Console(quiet=True))


def trainee_of(run: Training) -> DFlashTrainee:
    assert isinstance(run.trainee, DFlashTrainee)
    return run.trainee


@dataclass(frozen=True)
class Trained:
    """A run that is over, and what was accepted before and after it."""

    run: Training
    before: HeldOutAcceptance
    after: HeldOutAcceptance


@pytest.fixture(scope="module")
def trained(calm: Path, data: TokenData, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run whose drafter no test changes."""
    run = training(calm, data, tmp_path_factory.mktemp("trained"), steps=80)
    before = run.evaluate()
    return Trained(run, before, run.run())


def test_held_out_acceptance_rises(trained: Trained) -> None:
    before, after, losses = trained.before, trained.after, trained.run.history.losses
    assert before.num_rounds > 100
    assert after.length > before.length + 0.1
    assert losses[-1][1] < losses[0][1] - 0.3


@pytest.mark.parametrize(("block_size", "num_drafts"), [(2, 1), (4, 3), (8, 4)])
def test_acceptance_is_measured_on_drafts_a_block_has(
    block_size: int, num_drafts: int, calm: Path, data: TokenData, tmp_path: Path
) -> None:
    acceptance = training(calm, data, tmp_path, steps=1, block_size=block_size).evaluate()
    assert len(acceptance.per_position) == acceptance.draft_depth == num_drafts
    assert acceptance.length <= 1 + num_drafts


@pytest.mark.parametrize(("num_steps", "num_answers"), quick_only([(25, 5), (80, 12)], [(25, 5)]))
@pytest.mark.parametrize("markov_rank", [0, 16])
async def test_the_saved_drafter_is_the_trained_one(
    markov_rank: int, num_steps: int, num_answers: int, calm: Path, data: TokenData, tmp_path: Path
) -> None:
    """The served checkpoint's drafts are accepted as often as training measured on whole batches."""
    with torch.enable_grad():
        run = training(calm, data, tmp_path, steps=num_steps, markov_rank=markov_rank)
        run.run()
    trainee = trainee_of(run)
    trainee.save(tmp_path)
    # bf16 rounds the stored weights.
    trainee.load(tmp_path)
    expected, found = [], []
    async with running_system(calm, f"dflash:{tmp_path}") as system:
        for index in range(num_answers):
            sequence = data[index]
            (accepted,) = trainee.accepted(run.source([sequence]), BLOCK_SIZE - 1)
            # Served, no draft is asked for where the target's own token will be the last.
            asked = [min(count, len(accepted) - 1 - anchor) for anchor, count in enumerate(accepted)]
            expected.append(HeldOutAcceptance.of([asked], BLOCK_SIZE - 1).num_accepted)
            answer = sequence.token_ids[sequence.prompt_length :]
            options = GenerateOptions(
                method="dflash",
                draft_depth=BLOCK_SIZE - 1,
                max_new_tokens=len(answer),
                ignore_eos=True,
            )
            prompt = sequence.token_ids[: sequence.prompt_length]
            result = await system.client.generate(prompt, options)
            assert result.token_ids == answer
            assert result.speculation.num_fallback_rounds == 0
            found.append(result.speculation.num_accepted_tokens)
    assert found == expected
    assert sum(found) > 0


def test_a_run_may_start_from_a_drafter(
    trained: Trained, calm: Path, data: TokenData, tmp_path: Path
) -> None:
    trained.run.trainee.save(tmp_path)
    second = training(calm, data, tmp_path / "more", steps=10)
    assert second.evaluate().length < trained.after.length - 0.05
    second.trainee.load(tmp_path)
    # Its weights were rounded to bf16.
    assert second.evaluate().length == pytest.approx(trained.after.length, abs=0.05)
    config = json.loads((tmp_path / "config.json").read_text())
    config["dflash_config"]["mask_token_id"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    for folder in (tmp_path, tmp_path / "more"):
        with pytest.raises(InvalidArgumentError, match="not a drafter like this one"):
            second.trainee.load(folder)


def test_another_drafters_run_is_not_resumed(calm: Path, data: TokenData, tmp_path: Path) -> None:
    training(calm, data, tmp_path, steps=1).run()
    training(calm, data, tmp_path, steps=1).resume()
    with pytest.raises(InvalidArgumentError, match=r"other settings \(block_size 5, not 4\)"):
        training(calm, data, tmp_path, steps=1, block_size=4).resume()
    run = training(calm, data, tmp_path, steps=1)
    trainee = trainee_of(run)
    trainee.scales = BlockScales(trainee.scales.hidden, 2 * trainee.scales.embedding)
    trainee.layer_ids = (0, 1)
    with pytest.raises(InvalidArgumentError, match=r"context_layers \[1, 2\], not \[0, 1\]; embedding_scale"):
        run.resume()
    checkpoint = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    checkpoint["identity"] |= {"method": "mtp", "draft_vocab": "another"}
    torch.save(checkpoint, tmp_path / CHECKPOINT)
    with pytest.raises(InvalidArgumentError, match="method mtp, not dflash; draft_vocab another"):
        training(calm, data, tmp_path, steps=1).resume()


@torch.no_grad()
def test_a_block_sees_its_context_and_itself(calm: Path, data: TokenData, tmp_path: Path) -> None:
    """A block's states do not depend on other blocks, other sequences or what comes after its anchor."""
    run = training(calm, data, tmp_path, steps=1)
    trainee = trainee_of(run)
    sequences = [data[0], data[1]]
    batch = PackedBatch.of(run.source(sequences))
    together = trainee.states(batch, batch.anchors, BLOCK_SIZE)
    for index in range(0, len(batch.anchors.row), 7):
        sequence = sequences[batch.anchors.sequence[index]]
        position = int(batch.anchors.position[index])
        cut = TokenSequence(sequence.token_ids[: position + 2], position)
        alone = PackedBatch.of(run.source([cut]))
        states: Tensor = trainee.states(alone, alone.anchors, BLOCK_SIZE)
        torch.testing.assert_close(states[-1], together[index], atol=1e-4, rtol=1e-4)


def test_the_mask_is_a_token_no_text_has() -> None:
    data = TokenData(numpy.array([VOCAB_SIZE - 1, 3, VOCAB_SIZE - 3]), numpy.array([0, 3]), numpy.array([1]))
    assert mask_token(data, VOCAB_SIZE) == VOCAB_SIZE - 2
    with pytest.raises(InvalidArgumentError, match="none is left"):
        mask_token(TokenData(numpy.arange(4), numpy.array([0, 4]), numpy.array([1])), 4)


def test_a_run_that_starts_from_a_drafter_has_its_mask(tmp_path: Path) -> None:
    data = TokenData(numpy.arange(4), numpy.array([0, 4]), numpy.array([1]))
    with pytest.raises(InvalidArgumentError, match="not a drafter like this one"):
        mask_token(data, VOCAB_SIZE, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"dflash_config": {"mask_token_id": 7}}))
    assert mask_token(data, VOCAB_SIZE, tmp_path) == 7


@pytest.mark.parametrize(
    ("num_layers", "count", "expected"),
    [(30, 4, [1, 10, 19, 28]), (4, 2, [1, 2]), (4, 1, [2]), (3, 2, [1])],
)
def test_context_layers_are_spread(num_layers: int, count: int, expected: list[int]) -> None:
    assert context_layers(num_layers, count) == expected
