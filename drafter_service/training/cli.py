"""`specdec train`: drafters for a target, from its own answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from drafter_service.training.config import CountOptions, DataOptions, LoopConfig
from drafter_service.training.options import (
    DATA_DEFAULTS,
    DATA_OPTIONS,
    FILE,
    OUTPUT_OPTIONS,
    TRAINING_OPTIONS,
    with_options,
)
from specdec.cli.groups import ErrorGroup
from specdec.cli.numbers import integers, numbers
from specdec.cli.streams import show
from specdec.contract.errors import InvalidArgumentError
from specdec.service.tuning import tune_process

if TYPE_CHECKING:
    from drafter_service.training.acceptance import HeldOutAcceptance
    from drafter_service.training.runs import MakeTrainee

_COUNTING = CountOptions()


@click.group(cls=ErrorGroup)
def train() -> None:
    """Train a drafter for a target from the target's own answers.

    The target answers prompts that it makes up itself, and the drafter learns to foresee the answers; mtp and
    dflash learn from the target's hidden states and KV. Each command writes a folder that `specdec up
    --drafter` serves.
    """


@train.command("data")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="File for the token sequences.",
)
@click.option(
    "--task-share",
    type=numbers(0, 1),
    default=DATA_DEFAULTS.task_share,
    show_default=True,
    help="Share of the prompts that are about a text the target wrote: summaries, corrections, questions.",
)
@click.option(
    "--passages",
    type=FILE,
    help="File of token sequences whose answers are these texts.  [default: the answers generated before]",
)
@with_options(*DATA_OPTIONS)
def data(**options: Any) -> None:
    """Generate token sequences to train on: prompts, and the target's own greedy answers.

    `specdec train mtp`, `dflash` and `ngram-lm` read them with --tokens FILE.
    """
    given = DataOptions.taken_from(options)
    if given.prompts and given.passages:
        raise InvalidArgumentError("--prompts are answered as they are; --passages has no part in that.")
    if given.out.exists():
        raise InvalidArgumentError(f"{given.out} exists; choose another --out.", field="out")
    # Before the work, which takes long: a folder that cannot be made must not cost its result.
    given.out.parent.mkdir(parents=True, exist_ok=True)
    tune_process()
    from drafter_service.training.answers import generate_answers, load_target

    sequences = generate_answers(load_target(given), given, Console(stderr=True))
    sequences.save(given.out)
    show(f"{len(sequences)} sequences, {sequences.num_response_tokens} answer tokens in {given.out}")


@train.command("mtp")
@with_options(*TRAINING_OPTIONS, *DATA_OPTIONS)
@click.option(
    "--layers",
    "num_layers",
    type=integers(1),
    default=2,
    show_default=True,
    help="Number of decoder layers of the drafter.",
)
@click.option(
    "--unroll",
    "num_steps",
    type=integers(1),
    default=5,
    show_default=True,
    help="Number of draft steps that are trained.",
)
def mtp(num_layers: int, num_steps: int, draft_vocab_size: int, loss: str, **options: Any) -> None:
    """Train a Gemma 4 assistant, which drafts token by token over the target's own KV cache."""
    tune_process()
    from drafter_service.training.mtp import make_trainee

    _train(
        "mtp",
        f"An MTP drafter of the Gemma 4 assistant architecture with {num_layers} layers: queries only, over "
        "keys and values of the target's last layer; embedding and LM head are the target's.",
        lambda loaded, data, pool_tokens: make_trainee(
            loaded,
            data,
            num_layers=num_layers,
            num_steps=num_steps,
            draft_vocab_size=draft_vocab_size,
            pool_tokens=pool_tokens,
            loss=loss,
        ),
        options,
    )


@train.command("dflash")
@with_options(*TRAINING_OPTIONS, *DATA_OPTIONS)
@click.option(
    "--layers",
    "num_layers",
    type=integers(1),
    default=3,
    show_default=True,
    help="Number of decoder layers of the drafter.",
)
@click.option(
    "--context-layers",
    "num_context_layers",
    type=integers(1),
    default=4,
    show_default=True,
    help="Number of target layers whose hidden states the drafter reads.",
)
@click.option(
    "--block-size",
    type=integers(2),
    default=8,
    show_default=True,
    help="Number of tokens in a block: the anchor, and a mask for every draft.",
)
@click.option(
    "--anchors",
    "num_anchors",
    type=integers(1),
    default=160,
    show_default=True,
    help="Number of blocks in a step.",
)
@click.option(
    "--markov-rank",
    type=integers(0),
    default=256,
    show_default=True,
    help="Width of a small head that makes each draft depend on the draft before it; 0 leaves the head out, "
    "and other engines can load the drafter.",
)
def dflash(
    num_layers: int,
    num_context_layers: int,
    block_size: int,
    num_anchors: int,
    markov_rank: int,
    draft_vocab_size: int,
    loss: str,
    **options: Any,
) -> None:
    """Train a DFlash drafter, which drafts a whole block in one pass from hidden states of a few target
    layers."""
    tune_process()
    from drafter_service.training.dflash import make_trainee

    _train(
        "dflash",
        f"A DFlash drafter with {num_layers} layers and blocks of {block_size}. Its context are the hidden "
        f"states of {num_context_layers} layers of the target; embedding and LM head are the target's."
        + (f" A Markov head of rank {markov_rank} lets drafts depend on each other." if markov_rank else ""),
        lambda loaded, data, pool_tokens: make_trainee(
            loaded,
            data,
            num_layers=num_layers,
            num_context_layers=num_context_layers,
            block_size=block_size,
            num_anchors=num_anchors,
            draft_vocab_size=draft_vocab_size,
            pool_tokens=pool_tokens,
            markov_rank=markov_rank,
            loss=loss,
            init=options["init"],
        ),
        options,
    )


@train.command("ngram-lm")
@with_options(*OUTPUT_OPTIONS, *DATA_OPTIONS)
@click.option(
    "--max-size",
    type=integers(1),
    default=_COUNTING.max_size,
    show_default=True,
    help="Length of the longest context, tokens.",
)
@click.option(
    "--min-count",
    type=integers(1),
    default=_COUNTING.min_count,
    show_default=True,
    help="Drop contexts of several tokens that occur fewer times.",
)
@click.option(
    "--min-gain",
    type=numbers(0),
    default=_COUNTING.min_gain,
    show_default=True,
    help="Drop contexts that say less than this beyond the next shorter context, nats over all their "
    "occurrences; a higher value makes a smaller table.",
)
def ngram_lm(**options: Any) -> None:
    """Count a table of what the target usually says: its drafts need no model, and counting takes seconds."""
    tune_process()
    from drafter_service.training.runs import count_table

    given = DataOptions.taken_from(options)
    rules = CountOptions.taken_from(options)
    _announce("ngram-lm", given.out, count_table(given, rules, Console(stderr=True)))


@train.command("curve")
@click.argument(
    "folders",
    metavar="FOLDER...",
    nargs=-1,
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="File for the plot, such as curve.png.",
)
def curve(folders: tuple[Path, ...], out: Path) -> None:
    """Draw how well runs of mtp or dflash learned: acceptance on held-out answers, and loss, by tokens.

    Each FOLDER is the --out folder of a run, where the run's log is; the run may still be under way. All runs
    are drawn into one plot.
    """
    from drafter_service.training.curve import draw_curves
    from specdec.bench.plots import require_matplotlib

    require_matplotlib()
    out.parent.mkdir(parents=True, exist_ok=True)
    draw_curves({str(folder): folder for folder in folders}, out)
    show(f"The plot is in {out}.")


def _train(method: str, description: str, make: MakeTrainee, options: dict[str, Any]) -> None:
    from drafter_service.training.runs import train_drafter

    config = LoopConfig.taken_from(options)
    acceptance = train_drafter(
        method,
        description,
        make,
        DataOptions.taken_from(options),
        config,
        init=options["init"],
        resume=options["resume"],
        console=Console(stderr=True),
    )
    _announce(method, config.out, acceptance)


def _announce(method: str, out: Path, acceptance: HeldOutAcceptance) -> None:
    show(
        f"Acceptance length {acceptance.length:.2f} on {acceptance.num_answers} held-out answers (K = "
        f"{acceptance.draft_depth}). Serve it with: specdec up --drafter {method}:{out}"
    )
