"""Whole runs of `specdec train`: data, training or counting, evaluation, and the folder that they leave."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from rich.console import Console
from transformers import AutoConfig

from drafter_service.drafters.ngram_lm.table import TargetVocabulary, is_table
from drafter_service.training.acceptance import HeldOutAcceptance
from drafter_service.training.answers import DATA_FILE, data_files, load_target
from drafter_service.training.card import Card, write_card, write_table_card
from drafter_service.training.config import CountOptions, DataOptions, LoopConfig
from drafter_service.training.data import TokenData, split
from drafter_service.training.features import FeatureSource
from drafter_service.training.loop import CHECKPOINT, Training
from drafter_service.training.ngram_lm import count, measure
from drafter_service.training.trainee import Trainee
from specdec.contract.errors import InvalidArgumentError
from specdec.models.files import TOKENIZER_FILES, model_id, resolve_model, vocabulary_fingerprint
from specdec.runtime.loading import LoadedModel
from specdec.service.tuning import keep_freed_memory

MakeTrainee = Callable[[LoadedModel, TokenData, int], tuple[Trainee, FeatureSource]]
"""Makes a drafter for a target and its data, and the source of its features, which has room for so many
tokens."""


def train_drafter(
    method: str,
    description: str,
    make: MakeTrainee,
    data_options: DataOptions,
    config: LoopConfig,
    *,
    init: Path | None,
    resume: bool,
    console: Console,
) -> HeldOutAcceptance:
    """Train a drafter and write its folder; return its held-out acceptance.

    An interrupted run leaves a checkpoint.

    Args:
        description: what the card says the drafter is.
        init: folder of the drafter to start from.
        resume: whether to go on from the checkpoint in the output folder.

    Raises:
        InvalidArgumentError: the options do not fit the output folder, the data or the target.
    """
    keep_freed_memory()
    _check_folder(config.out / CHECKPOINT, resume=resume)
    paths, data_source = data_files(data_options, console)
    torch.manual_seed(config.seed)
    with _shown("Loading the target", console):
        loaded = load_target(data_options)
        vocab_size = loaded.model.get_output_embeddings().weight.shape[0]
        data = TokenData.joined([TokenData.load(path, vocab_size) for path in paths])
        trainee, source = make(loaded, data, config.pool_tokens)
        training = Training(trainee, source, data, config, console)
    if init:
        trainee.load(init)
    if resume:
        training.resume()
    acceptance = run_interruptibly(training, console)
    trainee.save(config.out)
    num_parameters = sum(parameter.numel() for parameter in trainee.parameters())
    card = Card(
        method,
        loaded.model_id,
        f"{description} {num_parameters / 1e6:.1f} million parameters in bf16.",
        data_source,
        init.name if init else "",
    )
    write_card(card, config, data, training.history, acceptance)
    _let_others_read(config.out)
    return acceptance


def _check_folder(checkpoint: Path, *, resume: bool) -> None:
    if resume and not checkpoint.is_file():
        raise InvalidArgumentError(f"There is no {checkpoint} to resume from.", field="resume")
    if checkpoint.is_file() and not resume:
        raise InvalidArgumentError(
            f"{checkpoint} belongs to an earlier run; go on with it (--resume), or choose another --out.",
            field="out",
        )
    checkpoint.parent.mkdir(parents=True, exist_ok=True)


@contextmanager
def _shown(what: str, console: Console) -> Iterator[None]:
    """Show what the block does: beside a spinner, or as a line where there is no terminal."""
    if not console.is_terminal:
        console.print(f"{what} ...")
    with console.status(what):
        yield


def run_interruptibly(training: Training, console: Console) -> HeldOutAcceptance:
    """Train to the end; Ctrl-C and SIGTERM leave a checkpoint, and a line that says how to go on."""
    try:
        with _exit_on_sigterm():
            return training.run()
    except (KeyboardInterrupt, SystemExit):
        console.print(f"Stopped after step {training.history.step}; --resume goes on from here.")
        raise


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit at SIGTERM within the block, so that a checkpoint is saved as after Ctrl-C."""

    def leave(number: int, frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _let_others_read(out: Path) -> None:
    """Make the drafter's files readable for all users; prompts and answers stay their owner's alone."""
    for path in out.glob("*.safetensors"):
        if path.name != DATA_FILE:
            path.chmod(0o644)


def count_table(options: DataOptions, rules: CountOptions, console: Console) -> HeldOutAcceptance:
    """Count an n-gram table and write its folder; return its held-out acceptance.

    Raises:
        InvalidArgumentError: the folder holds something else, or the answers cannot be counted.
    """
    out, defaults = options.out, LoopConfig(out=options.out)
    if not is_table(out) and any((out / name).exists() for name in ("config.json", "README.md", CHECKPOINT)):
        raise InvalidArgumentError(
            f"{out} holds another drafter, or a README.md of something else; choose another --out.",
            field="out",
        )
    out.mkdir(parents=True, exist_ok=True)
    vocabulary = _vocabulary(options.model)
    paths, data_source = data_files(options, console)
    data = TokenData.joined([TokenData.load(path, vocabulary.size) for path in paths])
    counted, held_out = split(data, defaults.num_held_out)
    with _shown("Counting", console):
        table = count(data, counted, vocabulary, rules)
    with _shown("Drafting held-out answers", console):
        acceptance = measure(table, data, held_out, defaults.draft_depth)
    table.save(out)
    description = (
        f"A table of what the target usually says after up to {rules.max_size} tokens, with prompt lookup in "
        "the text itself. No model pass is needed for a draft."
    )
    card = Card("ngram-lm", vocabulary.model_id, description, data_source, library="specdec")
    write_table_card(card, table, rules, data, acceptance, out)
    _let_others_read(out)
    return acceptance


def _vocabulary(model: str) -> TargetVocabulary:
    """Describe the vocabulary of a target, without reading its weights."""
    folder = resolve_model(model, TOKENIZER_FILES)
    try:
        size = int(AutoConfig.from_pretrained(folder).get_text_config().vocab_size)
    except Exception as error:  # a broken config surfaces as many types
        raise InvalidArgumentError(f"{folder}/config.json cannot be used: {error}", field="model") from error
    return TargetVocabulary(model_id(model), vocabulary_fingerprint(folder), size)
