"""Command-line options that several commands of `specdec train` have."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from drafter_service.training.config import LOSS_NAMES, DataOptions, LoopConfig
from specdec.cli.files import OutputFolder
from specdec.cli.numbers import integers, numbers
from specdec.runtime.loading import DTYPES
from specdec.service.config import MAX_THREADS

_DEFAULTS = LoopConfig(out=Path())
DATA_DEFAULTS = DataOptions(out=Path())
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)

DATA_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.option(
        "--model",
        default=DATA_DEFAULTS.model,
        show_default=True,
        help="The target model: a folder or hub id.",
    ),
    click.option(
        "--prompts",
        type=FILE,
        multiple=True,
        help="File of prompts for the target to answer, instead of prompts it makes up: a JSON object with "
        "question_id, category and turns per line, of which the first turn is used. May be given several "
        "times.",
    ),
    click.option(
        "--num-sequences",
        type=integers(2),
        default=DATA_DEFAULTS.num_sequences,
        show_default=True,
        help="Number of answers to generate.",
    ),
    click.option(
        "--max-new-tokens",
        type=integers(1),
        default=DATA_DEFAULTS.max_new_tokens,
        show_default=True,
        help="Longest generated answer, tokens.",
    ),
    click.option(
        "--seed",
        type=integers(0),
        default=_DEFAULTS.seed,
        show_default=True,
        help="Seed of the data, of its order and of the first weights.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default=DATA_DEFAULTS.dtype,
        show_default=True,
        help="Data type of the target.",
    ),
    click.option(
        "--device",
        default=DATA_DEFAULTS.device,
        show_default=True,
        help="Device of the target and the drafter.",
    ),
    click.option(
        "--threads",
        type=integers(0, MAX_THREADS),
        default=0,
        help="Number of CPU threads.  [default: one per core that it may use]",
    ),
)

OUTPUT_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.option(
        "--out",
        type=OutputFolder(),
        required=True,
        help="Folder for the drafter, the generated answers and the checkpoint of an interrupted run.",
    ),
    click.option(
        "--tokens",
        type=FILE,
        multiple=True,
        help="File of token sequences to learn from, instead of generating answers; may be given several "
        "times, the same file as well, which then weighs more.",
    ),
)

TRAINING_OPTIONS: tuple[Callable[..., Any], ...] = (
    *OUTPUT_OPTIONS,
    click.option(
        "--minutes",
        type=numbers(0, above=True),
        default=_DEFAULTS.minutes,
        show_default=True,
        help="Time to train, minutes, without the generation of answers.",
    ),
    click.option(
        "--steps",
        type=integers(0),
        default=_DEFAULTS.steps,
        help="Number of steps to train, whatever the time.  [default: as many as fit into the minutes]",
    ),
    click.option(
        "--learning-rate",
        type=numbers(0, above=True),
        default=_DEFAULTS.learning_rate,
        show_default=True,
        help="Largest learning rate of AdamW.",
    ),
    click.option(
        "--warmup-steps",
        type=integers(1),
        default=_DEFAULTS.warmup_steps,
        show_default=True,
        help="Number of steps over which the learning rate rises.",
    ),
    click.option(
        "--tokens-per-step",
        type=integers(1),
        default=_DEFAULTS.tokens_per_step,
        show_default=True,
        help="Least number of answer tokens in a step.",
    ),
    click.option(
        "--max-length",
        type=integers(8),
        default=_DEFAULTS.max_length,
        show_default=True,
        help="Length at which sequences are cut, tokens.",
    ),
    click.option(
        "--passes",
        type=integers(1),
        default=_DEFAULTS.passes,
        show_default=True,
        help="How often an answer is trained on while the target's states of it are in memory.",
    ),
    click.option(
        "--draft-vocab",
        "draft_vocab_size",
        type=integers(1),
        default=8192,
        show_default=True,
        help="Number of tokens the drafter can propose: the most frequent tokens of the answers.",
    ),
    click.option(
        "--loss",
        type=click.Choice(LOSS_NAMES),
        default="kl",
        show_default=True,
        help="What is minimised: kl, the divergence from the target's distribution; ce, the cross entropy "
        "against its own tokens; tv, the total variation, which is the share of drafts it rejects when it "
        "samples; acceptance, the negative logarithm of the share it accepts; lk, tv with kl as a guard "
        "where little is accepted.",
    ),
    click.option(
        "--evaluate-minutes",
        type=numbers(0, above=True),
        default=_DEFAULTS.evaluate_minutes,
        show_default=True,
        help="Time between measurements of the held-out acceptance, minutes.",
    ),
    click.option(
        "--init",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Folder of a drafter to start from, instead of the target's last layers.",
    ),
    click.option("--resume", is_flag=True, help="Go on from the checkpoint in the --out folder."),
)


def with_options(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add options to a command, in their order."""
    return lambda command: functools.reduce(lambda wrapped, add: add(wrapped), reversed(options), command)
