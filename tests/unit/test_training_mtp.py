"""Training of MTP drafters on a tiny target."""

from __future__ import annotations

import io
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from drafter_service.drafters.mtp.layers import AssistantLayers
from drafter_service.training.acceptance import HeldOutAcceptance
from drafter_service.training.batch import PackedBatch, even_rows
from drafter_service.training.config import LoopConfig
from drafter_service.training.data import TokenData, TokenSequence
from drafter_service.training.features import FeatureSource, SequenceFeatures
from drafter_service.training.log import LOG_FILE, read_log
from drafter_service.training.loop import CHECKPOINT, Training
from drafter_service.training.mtp import KEEP_REJECTED, MtpTrainee, _going_on, make_trainee
from drafter_service.training.runs import run_interruptibly
from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.loading import LoadedModel, load_causal_lm

QUIET = Console(quiet=True)


def load(folder: Path) -> LoadedModel:
    return load_causal_lm(str(folder), dtype="float32", device="cpu")


class Interrupted:
    """A source of features at which someone presses Ctrl-C."""

    def __init__(self, source: FeatureSource, num_batches: float) -> None:
        self.source, self.num_left = source, num_batches
        self.seen: list[TokenSequence] = []

    def __call__(self, sequences: Sequence[TokenSequence]) -> list[SequenceFeatures]:
        if not self.num_left:
            raise KeyboardInterrupt
        self.num_left -= 1
        self.seen += sequences
        return self.source(sequences)


def training(
    calm: Path,
    data: TokenData,
    out: Path,
    *,
    steps: int = 0,
    minutes: float = 20.0,
    evaluate_minutes: float = 2.0,
    num_batches: float = math.inf,
    seed: int = 0,
    max_length: int = 512,
    console: Console = QUIET,
) -> Training:
    torch.manual_seed(0)
    out.mkdir(exist_ok=True)
    config = LoopConfig(
        out,
        steps=steps,
        minutes=minutes,
        evaluate_minutes=evaluate_minutes,
        warmup_steps=10,
        learning_rate=3e-3,
        tokens_per_step=256,
        max_length=max_length,
        num_held_out=32,
        seed=seed,
    )
    trainee, source = make_trainee(
        load(calm),
        data,
        num_layers=1,
        num_steps=4,
        draft_vocab_size=256,
        pool_tokens=config.pool_tokens,
    )
    return Training(trainee, Interrupted(source, num_batches), data, config, console)


def weights(run: Training) -> dict[str, Tensor]:
    return run.trainee.state_dict()


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
    before, after, history = trained.before, trained.after, trained.run.history
    assert before.num_rounds > 100
    assert after.length > before.length + 0.1
    assert history.losses[-1][1] < history.losses[0][1] - 0.5
    assert history.step == 80


def test_a_run_takes_the_minutes_it_is_given(
    calm: Path, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps take 30 seconds each, by a clock that the test makes up."""
    run = training(calm, data, tmp_path, minutes=2.5, evaluate_minutes=1.0)
    monkeypatch.setattr("drafter_service.training.loop.time.perf_counter", count(0, 30).__next__)
    progress, parameter = [], next(run.trainee.parameters())

    def loss(features: Sequence[SequenceFeatures], generator: torch.Generator) -> Tensor:
        progress.append(run.progress)
        return parameter.square().sum()

    run.trainee.loss = loss  # type: ignore[method-assign]
    run.trainee.accepted = lambda features, num_draft_tokens: [[0]]  # type: ignore[method-assign]
    run.run()
    assert progress == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8])
    assert (run.history.step, run.history.seconds, run.progress) == (5, 150.0, 1.0)
    assert [step for step, _ in run.history.acceptance] == [2, 4]


def test_held_out_answers_are_cut_as_those_trained_on(calm: Path, data: TokenData, tmp_path: Path) -> None:
    long = [data[index] for index in range(100)]
    long += [TokenSequence(data[index].token_ids[:9] * 200, 8) for index in range(100, 160)]
    run = training(calm, TokenData.of(long), tmp_path, steps=1, max_length=30)
    assert isinstance(run.source, Interrupted)
    assert run.evaluate().num_answers == 32
    assert {len(sequence.token_ids) for sequence in run.source.seen} == {30}
    nothing_left = training(calm, data, tmp_path, steps=1, max_length=10)
    assert nothing_left.evaluate().num_answers == 0


def test_a_resumed_run_is_the_uninterrupted_one(calm: Path, data: TokenData, tmp_path: Path) -> None:
    whole = training(calm, data, tmp_path / "whole", steps=12)
    whole.run()
    first = training(calm, data, tmp_path / "parts", steps=12, num_batches=5)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert first.history.step == 5
    second = training(calm, data, tmp_path / "parts", steps=12)
    second.resume()
    second.run()
    assert second.history.losses == whole.history.losses
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(second)[name]), name


def test_a_run_logs_loss_and_held_out_acceptance_by_tokens(trained: Trained) -> None:
    run, history = trained.run, trained.run.history
    *steps, last = read_log(run.config.out / LOG_FILE)
    assert [(line["step"], line["loss"]) for line in steps] == history.losses
    tokens = [line["num_tokens"] for line in steps]
    assert tokens == sorted(set(tokens))
    assert (last["step"], last["num_tokens"]) == (80, history.num_tokens) == (80, tokens[-1])
    assert last["acceptance_length"] == trained.after.length
    assert tuple(last["acceptance_per_position"]) == trained.after.per_position


def test_a_resumed_run_goes_on_in_its_log(calm: Path, data: TokenData, tmp_path: Path) -> None:
    first = training(calm, data, tmp_path, steps=4)
    first.run()
    path = tmp_path / LOG_FILE
    with path.open("a") as file:
        file.write('{"step": 5, "num_tokens": 99999, "loss": 7.0}\n{"step": 6')  # of a run that was killed
    second = training(calm, data, tmp_path, steps=8)
    second.resume()
    second.run()
    lines = read_log(path)
    losses = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert losses == second.history.losses
    assert [line["step"] for line in lines if "acceptance_length" in line] == [4, 8]


def test_a_run_is_resumed_within_a_later_pass(
    calm: Path, data: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features that were kept are made again and are the same."""
    monkeypatch.setattr("drafter_service.training.data.REPLAYED_BATCHES", 3)
    whole = training(calm, data, tmp_path / "whole", steps=12)
    whole.run()
    first = training(calm, data, tmp_path / "parts", steps=12)
    loss, calls = first.trainee.loss, count()

    def interrupted(features: Sequence[SequenceFeatures], generator: torch.Generator) -> Tensor:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return loss(features, generator)

    first.trainee.loss = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.run()
    second = training(calm, data, tmp_path / "parts", steps=12)
    second.resume()
    second.run()
    assert second.history.losses == whole.history.losses
    for name, weight in weights(whole).items():
        assert torch.equal(weight, weights(second)[name]), name


def test_a_terminated_run_leaves_its_checkpoint(calm: Path, data: TokenData, tmp_path: Path) -> None:
    shown = io.StringIO()
    run = training(calm, data, tmp_path, steps=12)
    source, before = run.source, signal.getsignal(signal.SIGTERM)

    def terminated(sequences: Sequence[TokenSequence]) -> list[SequenceFeatures]:
        if run.history.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return source(sequences)

    run.source = terminated
    with pytest.raises(SystemExit) as caught:
        run_interruptibly(run, Console(file=shown))
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    assert "Stopped after step 3; --resume goes on from here." in shown.getvalue()
    second = training(calm, data, tmp_path, steps=12)
    second.resume()
    assert second.history.step == 3


def test_the_first_step_is_shown_without_a_terminal(calm: Path, data: TokenData, tmp_path: Path) -> None:
    shown = io.StringIO()
    training(calm, data, tmp_path, steps=4, console=Console(file=shown)).run()
    lines = [line for line in shown.getvalue().splitlines() if line.startswith("25%: step 1, loss ")]
    assert len(lines) == 1, "then there is a line a minute"


def test_a_run_of_other_settings_is_not_resumed(calm: Path, data: TokenData, tmp_path: Path) -> None:
    training(calm, data, tmp_path, steps=1).run()
    other_data = TokenData.of([data[index] for index in reversed(range(len(data)))])
    for message, run in {
        r"other settings \(seed 0, not 1\)": training(calm, data, tmp_path, steps=2, seed=1),
        r"other settings \(data ": training(calm, other_data, tmp_path, steps=2),
    }.items():
        with pytest.raises(InvalidArgumentError, match=message):
            run.resume()
    run = training(calm, data, tmp_path, steps=2)
    trainee = run.trainee
    assert isinstance(trainee, MtpTrainee)
    for name, value in {
        "target_id": "other",
        "num_steps": 5,
        "hidden_scale": 9.0,
        "kv_layers": {"x": 0},
    }.items():
        kept = getattr(trainee, name)
        setattr(trainee, name, value)
        shown = {"target_id": "target", "num_steps": "unroll"}.get(name, name)
        with pytest.raises(InvalidArgumentError, match=rf"settings \({shown} .*, not "):
            run.resume()
        setattr(trainee, name, kept)
    # As other threads may round it.
    trainee.hidden_scale *= 1.0001
    run.config = replace(run.config, learning_rate=1e-4, minutes=1.0)
    run.resume()
    wider = training(calm, data, tmp_path, steps=2)
    wider.trainee.model.post_projection = torch.nn.Linear(3, 3)
    with pytest.raises(InvalidArgumentError, match="another drafter"):
        wider.resume()


def test_a_damaged_checkpoint_is_refused(calm: Path, data: TokenData, tmp_path: Path) -> None:
    run = training(calm, data, tmp_path, steps=1)
    run.run()
    path = tmp_path / CHECKPOINT
    state = torch.load(path, weights_only=True)
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(InvalidArgumentError, match="cannot be read"):
            run.resume()
    path.unlink()
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        run.resume()
    for name in state:
        torch.save({other: part for other, part in state.items() if other != name}, path)
        with pytest.raises(InvalidArgumentError, match=f"lacks {name}"):
            run.resume()
    for name in ("trainee", "optimizer", "generator", "history"):
        torch.save(state | {name: {"x": 1}}, path)
        with pytest.raises(InvalidArgumentError, match="damaged"):
            run.resume()
    torch.save([1], path)
    with pytest.raises(InvalidArgumentError, match="damaged"):
        run.resume()


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_run_before_it_spoils_the_weights(
    what: str, calm: Path, data: TokenData, tmp_path: Path
) -> None:
    whole = training(calm, data, tmp_path / "whole", steps=5)
    whole.run()
    run = training(calm, data, tmp_path, steps=5)
    loss = run.trainee.loss

    def spoilt(features: Sequence[SequenceFeatures], generator: torch.Generator) -> Tensor:
        value = loss(features, generator)
        if run.history.step < 3:
            return value
        # The root of 0 is finite, its gradient is not.
        return value * math.nan if what == "loss" else value + value.sub(value.detach()).sqrt()

    run.trainee.loss = spoilt  # type: ignore[method-assign]
    with pytest.raises(InvalidArgumentError, match=f"{what} is .* at step 3: lower --learning-rate"):
        run.run()
    saved = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    assert all(bool(weight.isfinite().all()) for weight in saved["trainee"].values())
    second = training(calm, data, tmp_path, steps=5)
    second.resume()
    assert second.history.step == 3
    second.run()
    assert second.history.losses == whole.history.losses


def test_a_run_may_start_from_a_drafter(
    trained: Trained, calm: Path, data: TokenData, tmp_path: Path
) -> None:
    trained.run.trainee.save(tmp_path)
    second = training(calm, data, tmp_path / "more", steps=10)
    assert second.evaluate().length < trained.after.length - 0.05
    second.trainee.load(tmp_path)
    # Its weights were rounded to bf16.
    assert second.evaluate().length == pytest.approx(trained.after.length, abs=0.05)
    wider = save_file_without(tmp_path, "post_projection.weight", tmp_path / "damaged")
    for folder in (wider, tmp_path / "more"):
        with pytest.raises(InvalidArgumentError, match="not a drafter like this one"):
            second.trainee.load(folder)


def save_file_without(folder: Path, name: str, damaged: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    damaged.mkdir()
    save_file(tensors, damaged / "model.safetensors")
    return damaged


@given(st.integers(0, 300), st.integers(0, 300))
def test_steps_come_in_even_numbers_of_rows(num_wanted: int, num_there: int) -> None:
    num_wanted = min(num_wanted, num_there)
    num_rows = even_rows(num_wanted, num_there)
    assert 0 <= num_rows <= num_there
    if num_there < 64:
        assert num_rows == (num_there if num_wanted else 0)
        return
    assert num_rows % 64 == 0
    # The next multiple, or the last there is.
    assert num_wanted <= num_rows < num_wanted + 64 or num_rows == num_there // 64 * 64


@pytest.mark.parametrize(
    ("num_wanted", "num_there", "num_rows"),
    [(0, 0, 0), (0, 100, 0), (1, 5, 5), (1, 64, 64), (64, 70, 64), (65, 128, 128), (65, 127, 64)],
)
def test_even_numbers_of_rows(num_wanted: int, num_there: int, num_rows: int) -> None:
    assert even_rows(num_wanted, num_there) == num_rows


@given(st.integers(0, 2**32), st.integers(0, 300), st.floats(0, 1), st.floats(0, 1))
def test_anchors_that_are_right_go_on_first_and_none_that_cannot(
    seed: int, num_anchors: int, share_right: float, share_able: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(num_anchors, generator=generator) < share_right
    can_go_on = torch.rand(num_anchors, generator=generator) < share_able
    index = _going_on(right, can_go_on, generator)
    chosen = set(index.tolist())
    assert index.tolist() == sorted(chosen)
    assert can_go_on[index].all()
    able_and_right, able = (set(x.nonzero()[:, 0].tolist()) for x in (right & can_go_on, can_go_on))
    num_wanted = len(able_and_right) + round(KEEP_REJECTED * len(able - able_and_right))
    assert len(chosen) == even_rows(num_wanted, len(able))
    assert able_and_right <= chosen or chosen <= able_and_right


def test_which_anchors_go_on_hangs_on_the_generator_alone() -> None:
    right, able = torch.arange(1000) % 10 == 0, torch.ones(1000, dtype=torch.bool)
    first, same, other = [_going_on(right, able, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    # 100 right ones and a quarter of the others make 325: 384 are the next multiple of 64.
    assert len(first) == 384


class PlainKv:
    """Attention of one anchor over everything before it, in fp32, written out."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys.transpose(0, 1).float(), values.transpose(0, 1).float()

    def attend(self, queries: Tensor, scaling: float, sliding_window: int | None) -> Tensor:
        repeats = len(queries) // len(self.keys)
        keys, values = (x.repeat_interleave(repeats, 0) for x in (self.keys, self.values))
        return (queries @ keys.transpose(1, 2) * scaling).softmax(-1) @ values


@torch.no_grad()
def test_the_saved_drafter_is_the_trained_one(calm: Path, data: TokenData, tmp_path: Path) -> None:
    """Drafts made step by step with the checkpoint are accepted as often as training measured."""
    with torch.enable_grad():
        run = training(calm, data, tmp_path, steps=40)
        run.run()
    trainee = run.trainee
    assert isinstance(trainee, MtpTrainee)
    trainee.save(tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, dtype=torch.float32
    )
    assert set(report["missing_keys"]) <= {"lm_head.weight", "model.embed_tokens.weight"}
    assert not report["unexpected_keys"]
    layers = AssistantLayers(model)
    # bf16 rounds the stored weights; the trainee gets the same ones, unscaled.
    for name, parameter in trainee.model.named_parameters():
        parameter.copy_(load_file(tmp_path / "model.safetensors")[name].float())
    trainee.embedding_scale = trainee.hidden_scale = 1.0
    draft_vocab = load_file(tmp_path / "draft_vocab.safetensors")["token_ids"]
    assert draft_vocab.tolist() == trainee.head.draft_vocab.tolist()

    (features,) = run.source([data[3]])
    batch = PackedBatch.of([features])
    (expected,) = trainee.accepted([features], 4)
    assert sum(expected) > 0
    for anchor, position in enumerate(batch.anchors.position.tolist()):
        (layer,) = trainee.kv_layers.values()
        kv = {"full_attention": PlainKv(*(part[:position] for part in features.kv(layer)))}
        token_ids, hidden = features.token_ids.tolist(), features.last_hidden[position - 1 : position].float()
        token, num_right = token_ids[position], 0
        while num_right < 4 and position + num_right + 1 < len(token_ids):
            embedding = trainee.weights.embed(torch.tensor([token])).float()
            states, hidden = layers.step(embedding, hidden, torch.tensor([position]), kv)
            token = draft_vocab[trainee.head.logits(states).argmax(-1)].item()
            if token != token_ids[position + num_right + 1]:
                break
            num_right += 1
        assert num_right == expected[anchor]


@pytest.mark.parametrize(
    ("accepted", "num_rounds", "num_accepted", "shares"),
    [
        ([[0, 0, 0]], 3, 0, (0.0, 0.0)),
        ([[2, 9, 9, 1, 9]], 2, 3, (1.0, 0.5)),
        ([[1, 0, 0], [2, 0, 0, 0]], 4, 3, (0.5, 0.25)),
        ([], 0, 0, (0.0, 0.0)),
    ],
)
def test_acceptance_is_counted_round_by_round(
    accepted: list[list[int]], num_rounds: int, num_accepted: int, shares: tuple[float, ...]
) -> None:
    found = HeldOutAcceptance.of(accepted, 2)
    assert found == HeldOutAcceptance(len(accepted), num_rounds, num_accepted, shares)
    assert found.length == 1 + num_accepted / max(num_rounds, 1)
