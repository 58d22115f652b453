"""Training data: what a target makes up and answers, and the files it is kept in."""

from __future__ import annotations

import functools
import io
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard
from rich.console import Console
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from drafter_service.drafters.ngram_lm.table import NgramTable, TargetVocabulary
from drafter_service.training.cli import train
from drafter_service.training.config import CountOptions
from drafter_service.training.data import REPLAYED_BATCHES, TokenData, TokenSequence, batches, split
from drafter_service.training.features import FeatureSource, pool_bytes
from drafter_service.training.generate import Decoder, GenerationProgress, Job, generate
from drafter_service.training.loop import CHECKPOINT
from drafter_service.training.ngram_lm import count
from drafter_service.training.prompts import PromptMaker
from drafter_service.training.tasks import make_tasks
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.sampling import SamplingParams
from specdec.runtime.loading import load_causal_lm
from specdec.runtime.packed_model import PackedModel, probe
from tests.ngram_tables import contents
from tests.tiny_models import EOS, VOCAB_SIZE, save_tiny_model

PROMPTS = ([5, 6, 7], [9], list(range(40, 60)), [1, 2], [70, 71, 72, 73])


@pytest.fixture(scope="module")
def packed(tiny_llama: Path) -> PackedModel:
    loaded = load_causal_lm(str(tiny_llama), dtype="float32", device="cpu")
    return PackedModel(loaded.model, kv_budget_bytes=2**24)


QUIET = GenerationProgress(Console(quiet=True))


def job(prompt: Sequence[int], max_tokens: int, *stop_ids: int, seed: int | None = None) -> Job:
    sampling = SamplingParams() if seed is None else SamplingParams(temperature=1.0, seed=seed)
    return Job(tuple(prompt), max_tokens, frozenset(stop_ids), sampling)


def decode(packed: PackedModel, jobs: Sequence[Job], batch_size: int = 4) -> list[list[int]]:
    outputs = dict(Decoder(packed, batch_size).run(jobs))
    return [outputs[index] for index in range(len(jobs))]


def reference(model: Path, prompt: Sequence[int], num_tokens: int) -> list[int]:
    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    output = target.generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, eos_token_id=EOS
    )
    token_ids: list[int] = output[0, len(prompt) :].tolist()
    return token_ids


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_are_the_targets_own(packed: PackedModel, tiny_llama: Path, batch_size: int) -> None:
    jobs = [job(prompt, 20 + index, EOS) for index, prompt in enumerate(PROMPTS)]
    free = packed.pool.free_tokens
    outputs = decode(packed, jobs, batch_size)
    expected = [reference(tiny_llama, prompt, 20 + index) for index, prompt in enumerate(PROMPTS)]
    assert outputs == expected
    assert packed.pool.free_tokens == free


def test_progress_is_shown_at_once_without_a_terminal(packed: PackedModel) -> None:
    shown = io.StringIO()
    with GenerationProgress(Console(file=shown)) as progress:
        progress.run("Answering", Decoder(packed, 2), [job(prompt, 3) for prompt in PROMPTS])
    assert shown.getvalue().startswith(f"Answering: 0 of {len(PROMPTS)}, ")


def test_a_generation_that_ends_early_gives_its_memory_back(packed: PackedModel) -> None:
    jobs = [job(prompt, 3 + at) for at, prompt in enumerate(PROMPTS)]
    outputs = Decoder(packed, 2).run(jobs)
    next(outputs)
    assert packed.pool.free_tokens < packed.pool.capacity_tokens
    outputs.close()
    assert packed.pool.free_tokens == packed.pool.capacity_tokens

    def interrupt(num_tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(Decoder(packed, 2).run(jobs, interrupt))
    assert packed.pool.free_tokens == packed.pool.capacity_tokens


def test_answers_end_with_their_stop_token(packed: PackedModel) -> None:
    (whole,) = decode(packed, [job(PROMPTS[0], 20)])
    assert len(whole) == 20
    stop = whole[5]
    (stopped,) = decode(packed, [job(PROMPTS[0], 20, stop)])
    assert stopped == whole[: whole.index(stop) + 1]


def test_sampled_text_hangs_on_the_seed_alone(packed: PackedModel) -> None:
    def sample(seed: int, batch_size: int) -> list[list[int]]:
        return decode(packed, [job(prompt, 12, seed=seed) for prompt in PROMPTS], batch_size)

    assert sample(3, 2) == sample(3, 5)
    assert sample(3, 2) != sample(4, 2)


def test_prompts_are_made_up_within_the_chat_template(packed: PackedModel, tiny_llama: Path) -> None:
    maker = PromptMaker(tiny_llama, [EOS])
    decoder = Decoder(packed, 5)
    prompts = maker.make_up(decoder, 12, 7, QUIET)
    empty = maker.prompt("")
    opening = next(i for i, (a, b) in enumerate(zip(prompts[0], empty, strict=False)) if a != b)
    for prompt in prompts:
        assert prompt[:opening] == empty[:opening]
        assert prompt[opening - len(empty) :] == empty[opening:]
        assert EOS not in prompt[opening : opening - len(empty)]
    assert len({tuple(prompt) for prompt in prompts}) == 12
    assert maker.make_up(decoder, 12, 7, QUIET) == prompts
    neighbours = maker.make_up(decoder, 12, 8, QUIET)
    assert not {tuple(prompt) for prompt in prompts} & {tuple(prompt) for prompt in neighbours}


def test_made_up_prompts_leave_room_for_an_answer(tiny_llama: Path, tmp_path: Path) -> None:
    loaded = load_causal_lm(str(tiny_llama), dtype="float32", device="cpu")
    short = PackedModel(loaded.model, kv_budget_bytes=2**15)
    maker = PromptMaker(tiny_llama, [EOS])
    capacity = short.pool.capacity_tokens
    assert capacity < 2 * 96
    assert all(len(prompt) < capacity for prompt in maker.make_up(Decoder(short, 1), 8, 7, QUIET))


def test_tasks_are_about_texts_the_target_wrote(tiny_llama: Path) -> None:
    maker = PromptMaker(tiny_llama, [EOS])
    words = "The mill stood by the river. " * 20
    code = "Here it is:\n```python\nx = 1\n```\n" + words
    data = TokenData.of(
        [
            TokenSequence((*maker.prompt(question), *maker.encode(text)), len(maker.prompt(question)))
            for question, text in (("Where was the mill?", words), ("Is there code?", code), ("So?", "No."))
        ]
    )
    prompts = make_tasks(maker, data, range(3), 40, 3, max_tokens=600)
    assert prompts == make_tasks(maker, data, range(3), 40, 3, max_tokens=600)
    assert prompts != make_tasks(maker, data, range(3), 40, 4, max_tokens=600)
    assert len({tuple(prompt) for prompt in prompts}) == len(prompts) > 10
    texts = [maker.question(prompt) for prompt in prompts]
    assert all("The mill stood by the river." in text or "```python" in text for text in texts)
    assert any("Where was the mill?" in text for text in texts)
    assert any("```python\nx = 1\n```" in text and "river" not in text for text in texts)
    assert all(len(prompt) <= 300 for prompt in make_tasks(maker, data, range(3), 40, 3, max_tokens=300))
    assert make_tasks(maker, data, range(3), 40, 3, max_tokens=10) == []
    assert make_tasks(maker, data, [2], 40, 3, max_tokens=600) == []


def test_prompts_need_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"(?s)no tokenizer.*--tokens"):
        PromptMaker(tmp_path, [EOS])


def test_a_long_prompt_joins_those_under_way(
    packed: PackedModel, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drafter_service.training.generate._MAX_PREFILL_TOKENS", 8)
    jobs = [job(range(40, 44), 12), job(range(50, 70), 4), job(range(60, 63), 4)]
    per_pass: list[int] = []
    outputs = dict(Decoder(packed, 3).run(jobs, per_pass.append))
    assert per_pass[:3] == [1, 2, 3]
    assert outputs[1] == reference(tiny_llama, list(range(50, 70)), 4)


def test_prompts_of_a_file(packed: PackedModel, tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [{"question_id": i, "category": "c", "turns": [text, "x"]} for i, text in enumerate("ab")]
    path.write_text("\n".join(map(json.dumps, lines)))
    maker = PromptMaker(tiny_llama, [EOS])
    assert maker.read(path) == [maker.prompt("a"), maker.prompt("b")]
    data = generate(
        packed,
        maker.read(path),
        num_sequences=9,
        max_new_tokens=6,
        eos_token_ids=[EOS],
        batch_size=2,
        progress=QUIET,
    )
    assert [sequence.prompt_length for sequence in (data[0], data[1])] == [len(maker.prompt("a"))] * 2
    assert list(data[0].token_ids) == [
        *maker.prompt("a"),
        *reference(tiny_llama, maker.prompt("a"), 6),
    ]


def test_prompts_of_several_files(tiny_llama: Path, tmp_path: Path) -> None:
    maker = PromptMaker(tiny_llama, [EOS])
    paths = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    for path, text in zip(paths, "ab", strict=True):
        path.write_text(json.dumps({"question_id": "q/1", "category": "c", "turns": [text]}))
    assert maker.read(*paths) == [maker.prompt("a"), maker.prompt("b")]


def some_data(num_sequences: int = 20) -> TokenData:
    rng = numpy.random.default_rng(0)
    return TokenData.of(
        [
            TokenSequence(tuple(rng.integers(0, VOCAB_SIZE, 6 + index % 5).tolist()), 2 + index % 3)
            for index in range(num_sequences)
        ]
    )


def test_files_hold_the_sequences(tmp_path: Path) -> None:
    data, path = some_data(), tmp_path / "tokens.safetensors"
    data.save(path)
    loaded = TokenData.load(path, VOCAB_SIZE)
    assert len(loaded) == 20
    assert [loaded[i] for i in range(20)] == [data[i] for i in range(20)]
    assert loaded.num_response_tokens == sum(
        len(s.token_ids) - s.prompt_length for s in map(data.__getitem__, range(20))
    )


def test_data_of_several_files() -> None:
    parts = [some_data(3), some_data(5)]
    joined = TokenData.joined(parts)
    assert [joined[index] for index in range(len(joined))] == [
        part[index] for part in parts for index in range(len(part))
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_offsets": None}, "no token sequences"),
        ({"sequence_offsets": [0, 3, 5]}, "do not fit"),
        ({"sequence_offsets": [0, 4, 3, 6]}, "do not fit"),
        ({"prompt_lengths": [1, 5]}, "do not fit"),
        ({"prompt_lengths": [0, 1]}, "do not fit"),
        ({"token_ids": [1, 2, 3, 4, 5, VOCAB_SIZE]}, "outside the target's"),
    ],
)
def test_damaged_files_are_refused(
    changes: dict[str, list[int] | None], message: str, tmp_path: Path
) -> None:
    tensors = {"token_ids": [1, 2, 3, 4, 5, 6], "sequence_offsets": [0, 3, 6], "prompt_lengths": [1, 2]}
    kept = {name: numpy.array(values) for name, values in (tensors | changes).items() if values is not None}
    save_file(kept, tmp_path / "tokens.safetensors")
    with pytest.raises(InvalidArgumentError, match=message):
        TokenData.load(tmp_path / "tokens.safetensors", VOCAB_SIZE)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("no tensors")
    with pytest.raises(InvalidArgumentError, match="no token sequences"):
        TokenData.load(tmp_path / "x", VOCAB_SIZE)


def test_held_out_sequences_are_not_trained_on() -> None:
    train_indices, held_out = split(some_data(), 6)
    assert len(held_out) == 6
    assert sorted(train_indices + held_out) == list(range(20))
    assert split(some_data(), 6) == (train_indices, held_out)
    assert len(split(some_data(4), 100)[1]) == 2


def test_of_more_data_only_new_sequences_join_those_held_out() -> None:
    data = TokenData.joined([some_data(20), some_data(45)])
    known = {data[index] for index in range(20)}
    _, before = split(some_data(20), 10)
    _, after = split(data, 10)
    assert len(after) == 10
    assert {data[index] for index in after} & known <= {some_data(20)[index] for index in before}


def test_sequences_of_one_prompt_stay_together() -> None:
    prompts = [(index // 3, 1) for index in range(60)]
    data = TokenData.of([TokenSequence((*prompt, 5, 6, 7), 2) for prompt in prompts])
    train_indices, held_out = split(data, 6)
    assert len({prompts[index] for index in held_out}) == len(held_out) == 6
    assert not {prompts[index] for index in held_out} & {prompts[index] for index in train_indices}
    assert len(train_indices) == 60 - 6 * 3


def test_data_without_answers_is_refused() -> None:
    data = TokenData.of([TokenSequence((1, 2, 3), 2)] * 4)
    options = {"tokens_per_step": 12, "passes": 1, "seed": 5, "skip": 0}
    for sequences, max_length in ((data, 9), (some_data(), 2)):
        with pytest.raises(InvalidArgumentError, match="--max-length"):
            next(batches(sequences, range(len(sequences)), max_length=max_length, **options))


def test_batches_go_on_where_a_run_was_interrupted() -> None:
    options = {"tokens_per_step": 12, "max_length": 9, "passes": 1, "seed": 5}
    indices = list(range(20))
    whole = list(islice(batches(some_data(), indices, skip=0, **options), 12))
    assert list(islice(batches(some_data(), indices, skip=7, **options), 5)) == whole[7:]
    for batch in whole:
        assert batch.is_last_pass
        assert all(len(sequence.token_ids) <= 9 for sequence in batch.sequences)
        assert sum(len(s.token_ids) - s.prompt_length for s in batch.sequences) >= 12


def test_batches_come_again_while_their_features_are_kept() -> None:
    options = {"tokens_per_step": 12, "max_length": 9, "passes": 3, "seed": 5}
    indices = list(range(20))
    num_shown = 2 * 3 * REPLAYED_BATCHES
    shown = list(islice(batches(some_data(), indices, skip=0, **options), num_shown))
    assert list(islice(batches(some_data(), indices, skip=700, **options), 5)) == shown[700:705]
    for start in range(0, num_shown, REPLAYED_BATCHES):
        own = shown[start : start + REPLAYED_BATCHES]
        first = start // (3 * REPLAYED_BATCHES) * REPLAYED_BATCHES
        assert sorted(batch.number for batch in own) == list(range(first, first + REPLAYED_BATCHES))
        assert {batch.is_last_pass for batch in own} == {start // REPLAYED_BATCHES % 3 == 2}
    order = [batch.number for batch in shown]
    assert order[:REPLAYED_BATCHES] != order[REPLAYED_BATCHES : 2 * REPLAYED_BATCHES]
    by_number = {batch.number: batch.sequences for batch in shown}
    assert all(by_number[batch.number] == batch.sequences for batch in shown)


def source_of(model: Path, pool_tokens: int) -> tuple[FeatureSource, PackedModel]:
    loaded = load_causal_lm(str(model), dtype="float32", device="cpu")
    shapes = probe(loaded.model)[1]
    packed = PackedModel(loaded.model, kv_budget_bytes=pool_bytes(shapes, loaded.model.dtype, pool_tokens))
    return FeatureSource(packed, kv_layers=[1], hidden_layers=[0, 2]), packed


def test_features_hang_on_no_pools_size(tiny_llama: Path) -> None:
    sequences = [TokenSequence(tuple(range(length)), 1) for length in (40, 130, 3, 64, 128, 70)]
    (whole, large), (parts, small) = source_of(tiny_llama, 1024), source_of(tiny_llama, 129)
    assert (large.pool.capacity_tokens, small.pool.capacity_tokens) == (1024, 192)
    for in_one_pass, in_parts in zip(whole(sequences), parts(sequences), strict=True):
        assert in_one_pass.token_ids.tolist() == in_parts.token_ids.tolist()
        for name, states in in_one_pass.states.items():
            assert len(states) == len(in_one_pass.token_ids)
            torch.testing.assert_close(states, in_parts.states[name], atol=1e-5, rtol=1e-5)
    assert small.pool.free_tokens == 192


def test_features_that_cannot_be_had_leave_the_pool_free(tiny_llama: Path) -> None:
    source, packed = source_of(tiny_llama, 192)
    fits, too_long = TokenSequence(tuple(range(70)), 1), TokenSequence(tuple(range(193)), 1)
    with pytest.raises(InvalidArgumentError, match="193 tokens"):
        source([fits, too_long])
    with pytest.raises(IndexError):
        source([TokenSequence((1, 2, 3), 1), TokenSequence((1, VOCAB_SIZE, 3), 1)])
    assert packed.pool.free_tokens == 192
    assert len(source([fits])) == 1


def test_the_draft_vocabulary_is_what_answers_use_most() -> None:
    data = TokenData.of([TokenSequence((9, 9, 9, 4, 4, 7, 7, 7, 1), 3), TokenSequence((9, 1, 4), 1)])
    assert data.draft_vocab(2).tolist() == [4, 7]
    assert data.draft_vocab(3).tolist() == [1, 4, 7]


def run_training(*arguments: str, method: str = "mtp") -> tuple[int, str]:
    result = CliRunner().invoke(train, [method, *arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("method", ["mtp", "dflash"])
def test_a_drafter_from_nothing_by_command(method: str, tiny_llama: Path, tmp_path: Path) -> None:
    run = functools.partial(run_training, method=method)
    out = tmp_path / "drafter"
    arguments = ("--out", str(out), "--model", str(tiny_llama), "--dtype", "float32", "--steps", "3")
    code, output = run(*arguments, "--num-sequences", "12", "--max-new-tokens", "8", "--layers", "1")
    assert code == 0, output
    assert f"specdec up --drafter {method}:" in output
    assert {"config.json", "model.safetensors", "draft_vocab.safetensors", "README.md"} <= {
        path.name for path in out.iterdir()
    }
    card = (out / "README.md").read_text()
    assert "| steps | 3 |" in card
    assert "4 answers, greedy, K = 4" in card
    assert "\n| draft token | 1 | 2 | 3 | 4 |\n|---|---|---|---|---|\n| accepted, share of rounds | " in card
    code, output = run(*arguments)
    assert code == 2
    assert "--resume" in output
    code, output = run(*arguments, "--resume", "--layers", "1", "--num-sequences", "13")
    assert (code, "num_sequences 12" in output) == (2, True)
    resumed = ("--resume", "--layers", "1", "--num-sequences", "12", "--max-new-tokens", "8", "--steps", "5")
    code, output = run(*arguments, *resumed)
    assert code == 0, output
    card = (out / "README.md").read_text()
    assert "| steps | 5 |" in card
    assert "| started from | layers of the target |" in card
    assert "in 3 passes" in card
    again = (
        "--out",
        str(tmp_path / "again"),
        *arguments[2:],
        "--init",
        str(out),
        "--layers",
        "1",
        "--tokens",
        str(out / "tokens.safetensors"),
    )
    code, output = run(*again)
    assert code == 0, output
    assert f"| started from | the drafter `{out.name}`" in (tmp_path / "again" / "README.md").read_text()


@pytest.mark.parametrize("method", ["mtp", "dflash"])
@pytest.mark.parametrize("family", ["phi3", "olmo2"])
def test_targets_whose_layers_are_named_otherwise(family: str, method: str, tmp_path: Path) -> None:
    """Phi-3 fuses projections, OLMo 2 moves norms: a layer without a counterpart starts at random."""
    target = save_tiny_model(tmp_path / "target", family)
    some_data().save(tmp_path / "tokens")
    code, output = run_training(
        *("--out", str(tmp_path / "drafter"), "--model", str(target), "--dtype", "float32"),
        *("--tokens", str(tmp_path / "tokens"), "--steps", "3", "--layers", "1"),
        method=method,
    )
    assert code == 0, output
    assert "Acceptance length" in output


def test_a_small_block_says_how_many_drafts_were_measured(tiny_llama: Path, tmp_path: Path) -> None:
    some_data().save(tmp_path / "tokens")
    code, output = run_training(
        *("--out", str(tmp_path / "out"), "--model", str(tiny_llama), "--dtype", "float32", "--steps", "1"),
        *("--tokens", str(tmp_path / "tokens"), "--layers", "1", "--block-size", "3"),
        method="dflash",
    )
    assert code == 0, output
    assert "K = 2)" in output
    assert "greedy, K = 2, " in (tmp_path / "out" / "README.md").read_text()


def test_data_by_command(tiny_llama: Path, tmp_path: Path) -> None:
    model = (
        "--model",
        str(tiny_llama),
        "--dtype",
        "float32",
        "--num-sequences",
        "12",
        "--max-new-tokens",
        "8",
    )
    first, second = tmp_path / "first", tmp_path / "second"
    code, output = run_training("--out", str(first), *model, method="data")
    assert code == 0, output
    assert str(len(TokenData.load(first, VOCAB_SIZE))) in output
    code, output = run_training("--out", str(first), *model, method="data")
    assert (code, "another --out" in output) == (2, True)
    passages = ("--passages", str(first), "--task-share", "1")
    code, output = run_training("--out", str(second), *model, *passages, method="data")
    assert (code, "too short to ask about" in output) == (2, True)
    code, output = run_training(
        "--out", str(second), *model, "--prompts", str(first), *passages, method="data"
    )
    assert (code, "--passages has no part" in output) == (2, True)
    code, output = run_training(
        *("--out", str(tmp_path / "drafter"), *model, "--steps", "2", "--layers", "1"),
        *("--tokens", str(first), "--tokens", str(first)),
    )
    assert code == 0, output
    assert "`first`, `first`: 18 sequences" in (tmp_path / "drafter" / "README.md").read_text()


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_table_by_command(tiny_llama: Path, tmp_path: Path) -> None:
    first, second, out = tmp_path / "first", tmp_path / "second", tmp_path / "new" / "table"
    parts = [some_data(), some_data(45)]
    for data, path in zip(parts, (first, second), strict=True):
        data.save(path)
    model = ("--model", str(tiny_llama), "--dtype", "float32", "--out", str(out))
    code, output = run_training(*model, "--tokens", str(first), "--tokens", str(second), method="ngram-lm")
    assert code == 0, output
    assert f"specdec up --drafter ngram-lm:{out}" in output
    table = NgramTable.load(out)
    loaded = load_causal_lm(str(tiny_llama), dtype="float32", device="cpu")
    assert table.vocabulary == TargetVocabulary(loaded.model_id, loaded.vocabulary_fingerprint, VOCAB_SIZE)
    data = TokenData.joined(parts)
    counted, held_out = split(data, 48)
    expected = count(data, counted, table.vocabulary, CountOptions(max_size=5, min_count=2, min_gain=4.0))
    assert contents(table) == contents(expected)
    metadata = ModelCard.load(out / "README.md").data
    assert (metadata.base_model, metadata.library_name) == (loaded.model_id, "specdec")
    assert metadata.tags == ["speculative-decoding", "ngram-lm"]
    card = (out / "README.md").read_text()
    assert f"`first`, `second`: 65 sequences, {data.num_response_tokens} answer tokens" in card
    assert f"| contexts | {len(table.contexts)}, of 1 to 5 tokens; " in card
    assert f"| listed tokens | {len(table.token_ids)} |" in card
    assert f"| held out | {len(held_out)} of these answers, which were not counted |" in card
    assert f"{len(held_out)} answers, greedy, K = 4, " in card
    assert {path.name for path in out.iterdir()} == {"config.json", "ngrams.safetensors", "README.md"}
    assert (out / "ngrams.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_table_is_counted_anew_by_command(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "table"
    arguments = ("--out", str(out), "--model", str(tiny_llama), "--dtype", "float32")
    prompts = tmp_path / "prompts.jsonl"
    lines = [{"question_id": index, "category": "c", "turns": [text]} for index, text in enumerate("abcd")]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    data = ("--prompts", str(prompts), "--num-sequences", "4", "--max-new-tokens", "8")
    code, output = run_training(*arguments, *data, method="ngram-lm")
    assert code == 0, output
    before, generated = NgramTable.load(out), (out / "tokens.safetensors").read_bytes()
    assert before.max_size == 5
    rules = ("--max-size", "2", "--min-count", "1", "--min-gain", "0")
    code, output = run_training(*arguments, *data, *rules, method="ngram-lm")
    assert code == 0, output
    after = NgramTable.load(out)
    assert after.max_size == 2
    assert len(after.contexts) > len(before.contexts)
    assert (out / "tokens.safetensors").read_bytes() == generated
    card = (out / "README.md").read_text()
    assert "of 1 to 2 tokens; longer ones seen at least 1 times, which tell at least 0 nats beyond" in card
    assert "the target's greedy answers to the prompts of `prompts.jsonl`: 4 sequences" in card
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join(map(json.dumps, lines)))
    both = (*data, "--prompts", str(more))
    code, output = run_training(*arguments, *both, method="ngram-lm")
    assert (code, f"prompts {prompts})" in output) == (2, True)
    (out / "tokens.safetensors").unlink()
    code, output = run_training(*arguments, *both, "--num-sequences", "8", method="ngram-lm")
    assert code == 0, output
    card = (out / "README.md").read_text()
    assert "answers to the prompts of `prompts.jsonl`, `more.jsonl`: 8 sequences" in card


def test_a_table_does_not_take_the_place_of_another_model(tiny_llama: Path, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", "qwen3")
    before = files(other)
    some_data().save(tmp_path / "tokens")
    code, output = run_training(
        *("--out", str(other), "--model", str(tiny_llama), "--dtype", "float32"),
        *("--tokens", str(tmp_path / "tokens")),
        method="ngram-lm",
    )
    assert (code, f"{other} holds another drafter" in output) == (2, True)
    assert files(other) == before
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / CHECKPOINT).touch()
    code, output = run_training(
        *("--out", str(unfinished), "--model", str(tiny_llama), "--dtype", "float32"),
        *("--tokens", str(tmp_path / "tokens")),
        method="ngram-lm",
    )
    assert (code, f"{unfinished} holds another drafter" in output) == (2, True)
    assert list(unfinished.iterdir()) == [unfinished / CHECKPOINT]
    noted = tmp_path / "noted"
    noted.mkdir()
    (noted / "README.md").write_text("mine")
    code, output = run_training(
        *("--out", str(noted), "--model", str(tiny_llama), "--dtype", "float32"),
        *("--tokens", str(tmp_path / "tokens")),
        method="ngram-lm",
    )
    assert (code, (noted / "README.md").read_text()) == (2, "mine")


def test_a_damaged_table_is_counted_anew(tiny_llama: Path, tmp_path: Path) -> None:
    some_data(45).save(tmp_path / "tokens")
    out = tmp_path / "table"
    arguments = ("--out", str(out), "--model", str(tiny_llama), "--dtype", "float32")
    tokens = ("--tokens", str(tmp_path / "tokens"))
    assert run_training(*arguments, *tokens, method="ngram-lm")[0] == 0
    whole = (out / "ngrams.safetensors").read_bytes()
    (out / "ngrams.safetensors").write_bytes(whole[:-5])
    code, output = run_training(*arguments, *tokens, method="ngram-lm")
    assert code == 0, output
    assert (out / "ngrams.safetensors").read_bytes() == whole


def test_sequences_without_answers_cannot_be_counted(tiny_llama: Path, tmp_path: Path) -> None:
    TokenData.of([TokenSequence((1, 2, 3), 3)] * 3).save(tmp_path / "tokens")
    code, output = run_training(
        *("--out", str(tmp_path / "table"), "--model", str(tiny_llama), "--dtype", "float32"),
        *("--tokens", str(tmp_path / "tokens")),
        method="ngram-lm",
    )
    assert (code, "no answer tokens" in output) == (2, True)


def test_wrong_arguments_of_counting(tiny_llama: Path, tmp_path: Path) -> None:
    some_data().save(tmp_path / "tokens")
    given = (
        "--out",
        str(tmp_path / "table"),
        "--model",
        str(tiny_llama),
        "--tokens",
        str(tmp_path / "tokens"),
    )
    for option, value in (("--max-size", "0"), ("--min-count", "0"), ("--min-gain", "-1")):
        code, output = run_training(*given, option, value, method="ngram-lm")
        assert (code, f"Invalid value for '{option}'" in output) == (2, True)
    (tmp_path / "strange").write_text("no tensors")
    code, output = run_training(*given[:-1], str(tmp_path / "strange"), method="ngram-lm")
    assert (code, "no token sequences" in output) == (2, True)


def test_wrong_arguments_of_training(tiny_llama: Path, tmp_path: Path) -> None:
    model = ("--model", str(tiny_llama), "--dtype", "float32")
    code, output = run_training("--out", str(tmp_path / "none"), *model, "--resume")
    assert (code, "to resume from" in output) == (2, True)
    for option in ("--minutes", "--learning-rate", "--evaluate-minutes"):
        for value in ("0", "-1"):
            code, output = run_training("--out", str(tmp_path / "none"), *model, option, value)
            assert (code, f"Invalid value for '{option}'" in output) == (2, True)
    some_data().save(tmp_path / "tokens")
    tokens = ("--tokens", str(tmp_path / "tokens"))
    code, output = run_training("--out", str(tmp_path / "none"), *model, *tokens, "--device", "fast")
    assert (code, "Device 'fast' cannot be used" in output) == (2, True)
    code, output = run_training(
        "--out", str(tmp_path / "deep"), *model, "--tokens", str(tmp_path / "tokens"), "--layers", "4"
    )
    assert (code, "fewer" in output) == (2, True)
