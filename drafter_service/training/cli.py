"""`specdec train`: drafters for a target, from its own answers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from drafter_service.training.config import CountOptions, LoopConfig
from specdec.cli.groups import ErrorGroup
from specdec.contract.errors import InvalidArgumentError
from specdec.runtime.loading import DTYPES
from specdec.service.tuning import keep_freed_memory, tune_process

if TYPE_CHECKING:
    from drafter_service.drafters.ngram_lm.table import TargetVocabulary
    from drafter_service.training.data import TokenData
    from drafter_service.training.features import FeatureSource
    from drafter_service.training.loop import Acceptance, Trainee
    from specdec.runtime.loading import LoadedModel

_DEFAULTS = LoopConfig(out=Path())
_COUNTING = CountOptions()
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_DATA_FILE = "tokens.safetensors"
_GENERATION = ("model", "prompts", "num_sequences", "max_new_tokens", "seed", "dtype")
"""Options that decide what is generated."""
_BATCH_SIZE = 48
"""Sequences that are generated together."""
_GENERATION_BYTES = 2**30
"""Their KV."""
_TASK_SHARE = 0.25
_MAX_TASK_TOKENS = 384
"""Longest prompt about a text."""

_DATA_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.option("--model", default="default", show_default=True, help="The target: folder or hub id."),
    click.option(
        "--prompts",
        type=_FILE,
        help="Have the target answer these prompts instead of ones of its own: JSON lines of "
        "question_id, category and turns, of which the first is used.",
    ),
    click.option(
        "--num-sequences",
        type=click.IntRange(min=2),
        default=4000,
        show_default=True,
        help="Answers to generate.",
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        help="Longest generated answer, tokens.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(min=0),
        default=_DEFAULTS.seed,
        show_default=True,
        help="Of data, order and weights.",
    ),
    click.option(
        "--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of the target."
    ),
    click.option("--device", default="cpu", show_default=True, help="Where to run."),
    click.option("--threads", type=click.IntRange(min=0), default=0, help="CPU threads.  [default: all]"),
)

_OUTPUT_OPTIONS: tuple[Callable[..., Any], ...] = (
    click.option(
        "--out",
        type=click.Path(file_okay=False, path_type=Path),
        required=True,
        help="Folder of the drafter, and of what it was made from: answers, an interrupted run's checkpoint.",
    ),
    click.option(
        "--tokens",
        type=_FILE,
        multiple=True,
        help="Learn from these sequences instead of generating any; may be given several times.",
    ),
)

_TRAINING_OPTIONS: tuple[Callable[..., Any], ...] = (
    *_OUTPUT_OPTIONS,
    click.option(
        "--minutes",
        type=click.FloatRange(min=0, min_open=True),
        default=_DEFAULTS.minutes,
        show_default=True,
        help="Time to train, generation apart.",
    ),
    click.option(
        "--steps",
        type=click.IntRange(min=0),
        default=_DEFAULTS.steps,
        help="Train this many steps, whatever the time.  [default: as many as fit]",
    ),
    click.option(
        "--learning-rate",
        type=click.FloatRange(min=0, min_open=True),
        default=_DEFAULTS.learning_rate,
        show_default=True,
        help="Of AdamW, at most.",
    ),
    click.option(
        "--warmup-steps",
        type=click.IntRange(min=1),
        default=_DEFAULTS.warmup_steps,
        show_default=True,
        help="Steps over which the learning rate rises.",
    ),
    click.option(
        "--tokens-per-step",
        type=click.IntRange(min=1),
        default=_DEFAULTS.tokens_per_step,
        show_default=True,
        help="Answer tokens of a step, at least.",
    ),
    click.option(
        "--max-length",
        type=click.IntRange(min=8),
        default=_DEFAULTS.max_length,
        show_default=True,
        help="Cut sequences here, tokens.",
    ),
    click.option(
        "--passes",
        type=click.IntRange(min=1),
        default=_DEFAULTS.passes,
        show_default=True,
        help="Times an answer is trained on while the target's states of it are in memory.",
    ),
    click.option(
        "--draft-vocab",
        "draft_vocab_size",
        type=click.IntRange(min=1),
        default=8192,
        show_default=True,
        help="Tokens the drafter can propose: the most frequent ones of the answers.",
    ),
    click.option(
        "--evaluate-minutes",
        type=click.FloatRange(min=0, min_open=True),
        default=_DEFAULTS.evaluate_minutes,
        show_default=True,
        help="Time between looks at held-out acceptance.",
    ),
    click.option(
        "--init",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        help="Start from this drafter, instead of from the target's last layers.",
    ),
    click.option("--resume", is_flag=True, help="Go on from the checkpoint in --out."),
)


def _with_options(*options: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda command: functools.reduce(lambda wrapped, add: add(wrapped), reversed(options), command)


@click.group(cls=ErrorGroup)
def train() -> None:
    """Train a drafter for a target from the target's own answers.

    The target answers prompts it makes up itself; the drafter learns to foresee the answers, mtp and dflash
    from the target's hidden states and KV. Writes a folder that `specdec up --drafter` serves.
    """


@train.command("data")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File of token sequences."
)
@click.option(
    "--task-share",
    type=click.FloatRange(0, 1),
    default=_TASK_SHARE,
    show_default=True,
    help="Share of prompts that are about a text the target wrote: summaries, corrections, questions.",
)
@click.option(
    "--passages",
    type=_FILE,
    help="Take these texts from the answers of this file of token sequences.  [default: from its own]",
)
@_with_options(*_DATA_OPTIONS)
def data(out: Path, **options: Any) -> None:
    """Token sequences to train on: prompts, and the target's own greedy answers.

    `specdec train ngram-lm --tokens FILE`, `mtp` and `dflash` alike, read them.
    """
    if options["prompts"] and options["passages"]:
        raise InvalidArgumentError("--prompts are answered as they are; --passages has no part in that.")
    if out.exists():
        raise InvalidArgumentError(f"{out} is there already; choose another --out.", field="out")
    tune_process()
    sequences = _generate(_load(options), options, Console(stderr=True))
    out.parent.mkdir(parents=True, exist_ok=True)
    sequences.save(out)
    click.echo(f"{len(sequences)} sequences, {sequences.num_response_tokens} answer tokens in {out}")


@train.command("mtp")
@_with_options(*_TRAINING_OPTIONS, *_DATA_OPTIONS)
@click.option(
    "--layers",
    "num_layers",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="Decoder layers of the drafter.",
)
@click.option(
    "--unroll",
    "num_steps",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Draft steps that are trained.",
)
def mtp(num_layers: int, num_steps: int, **options: Any) -> None:
    """A Gemma-4-assistant drafter: token by token, over the target's own KV cache."""
    tune_process()
    from drafter_service.training.mtp import make_trainee

    _train(
        "mtp",
        f"An MTP drafter of the Gemma 4 assistant architecture with {num_layers} layers: queries only, over "
        "keys and values of the target's last layer; embedding and LM head are the target's.",
        functools.partial(
            make_trainee,
            num_layers=num_layers,
            num_steps=num_steps,
            draft_vocab_size=options["draft_vocab_size"],
        ),
        options,
    )


@train.command("dflash")
@_with_options(*_TRAINING_OPTIONS, *_DATA_OPTIONS)
@click.option(
    "--layers",
    "num_layers",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Decoder layers of the drafter.",
)
@click.option(
    "--context-layers",
    "num_context_layers",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Layers of the target whose hidden states the drafter reads.",
)
@click.option(
    "--block-size",
    type=click.IntRange(min=2),
    default=8,
    show_default=True,
    help="Tokens of a block: the anchor, and a mask for every draft.",
)
@click.option(
    "--anchors",
    "num_anchors",
    type=click.IntRange(min=1),
    default=160,
    show_default=True,
    help="Blocks of a step.",
)
@click.option(
    "--markov-rank",
    type=click.IntRange(min=0),
    default=256,
    show_default=True,
    help="Width of a small head by which each draft depends on the one before it; 0: a plain DFlash drafter, "
    "which other engines load too.",
)
def dflash(
    num_layers: int,
    num_context_layers: int,
    block_size: int,
    num_anchors: int,
    markov_rank: int,
    **options: Any,
) -> None:
    """A DFlash drafter: a whole block in one pass, from hidden states of a few of the target's layers."""
    tune_process()
    from drafter_service.training.dflash import make_trainee

    _train(
        "dflash",
        f"A DFlash drafter with {num_layers} layers and blocks of {block_size}. Its context are the hidden "
        f"states of {num_context_layers} layers of the target; embedding and LM head are the target's."
        + (f" A Markov head of rank {markov_rank} lets drafts depend on each other." if markov_rank else ""),
        functools.partial(
            make_trainee,
            num_layers=num_layers,
            num_context_layers=num_context_layers,
            block_size=block_size,
            num_anchors=num_anchors,
            draft_vocab_size=options["draft_vocab_size"],
            markov_rank=markov_rank,
            init=options["init"],
        ),
        options,
    )


@train.command("ngram-lm")
@_with_options(*_OUTPUT_OPTIONS, *_DATA_OPTIONS)
@click.option(
    "--max-size",
    type=click.IntRange(min=1),
    default=_COUNTING.max_size,
    show_default=True,
    help="Longest context, tokens.",
)
@click.option(
    "--min-count",
    type=click.IntRange(min=1),
    default=_COUNTING.min_count,
    show_default=True,
    help="Drop contexts of several tokens seen fewer times.",
)
@click.option(
    "--min-gain",
    type=click.FloatRange(min=0),
    default=_COUNTING.min_gain,
    show_default=True,
    help="Drop contexts that tell less than this beyond the shorter one, nats over all their occurrences; "
    "more makes a smaller table.",
)
def ngram_lm(max_size: int, min_count: int, min_gain: float, **options: Any) -> None:
    """A table of what the target usually says: drafts that cost next to nothing, counted in seconds."""
    from drafter_service.drafters.ngram_lm.table import is_table
    from drafter_service.training.card import Card, write_table_card
    from drafter_service.training.data import TokenData, split
    from drafter_service.training.loop import CHECKPOINT
    from drafter_service.training.ngram_lm import count, measure

    out: Path = options["out"]
    if not is_table(out) and any((out / name).exists() for name in ("config.json", "README.md", CHECKPOINT)):
        raise InvalidArgumentError(
            f"{out} holds another drafter, or a README.md of something else; choose another --out.",
            field="out",
        )
    out.mkdir(parents=True, exist_ok=True)
    tune_process()
    console = Console(stderr=True)
    vocabulary = _vocabulary(options["model"])
    paths, data_source = _data_files(options, console)
    data = TokenData.joined([TokenData.load(path, vocabulary.size) for path in paths])
    counted, held_out = split(data, _DEFAULTS.num_held_out)
    rules = CountOptions(max_size, min_count, min_gain)
    with console.status("counting"):
        table = count(data, counted, vocabulary, rules)
    with console.status("drafting held-out answers"):
        acceptance = measure(table, data, held_out, _DEFAULTS.draft_depth)
    table.save(out)
    description = (
        f"A table of what the target usually says after up to {max_size} tokens, with prompt lookup in the "
        "text itself. No model pass is needed for a draft."
    )
    card = Card("ngram-lm", vocabulary.model_id, description, data_source, library="specdec")
    write_table_card(card, table, rules, data, acceptance, out)
    _announce("ngram-lm", out, acceptance)


def _vocabulary(model: str) -> TargetVocabulary:
    """Whose tokens are counted; no weights are read for it."""
    from transformers import AutoConfig

    from drafter_service.drafters.ngram_lm.table import TargetVocabulary
    from specdec.models.files import TOKENIZER_FILES, model_id, resolve_model, vocabulary_fingerprint

    folder = resolve_model(model, TOKENIZER_FILES)
    try:
        size = int(AutoConfig.from_pretrained(folder).get_text_config().vocab_size)
    except Exception as error:  # a broken config surfaces as many types
        raise InvalidArgumentError(f"{folder}/config.json cannot be used: {error}", field="model") from error
    return TargetVocabulary(model_id(model), vocabulary_fingerprint(folder), size)


def _train(
    method: str,
    description: str,
    make: Callable[..., tuple[Trainee, FeatureSource]],
    options: dict[str, Any],
) -> None:
    """Data, training, evaluation, and the folder that comes of it."""
    keep_freed_memory()
    import torch

    from drafter_service.training.card import Card, write_card
    from drafter_service.training.data import TokenData
    from drafter_service.training.loop import CHECKPOINT, Training

    names = {field.name for field in dataclasses.fields(LoopConfig)}
    config = LoopConfig(**{name: value for name, value in options.items() if name in names})
    _check_folder(config.out / CHECKPOINT, resume=options["resume"])
    console = Console(stderr=True)
    paths, data_source = _data_files(options, console)
    torch.manual_seed(config.seed)
    loaded = _load(options)
    vocab_size = loaded.model.get_output_embeddings().weight.shape[0]
    data = TokenData.joined([TokenData.load(path, vocab_size) for path in paths])
    trainee, source = make(loaded, data, pool_tokens=config.pool_tokens)
    training = Training(trainee, source, data, config, console)
    if options["init"]:
        trainee.load(options["init"])
    if options["resume"]:
        training.resume()
    acceptance = training.run()
    trainee.save(config.out)
    num_parameters = sum(parameter.numel() for parameter in trainee.parameters())
    description += f" {num_parameters / 1e6:.1f} million parameters in bf16."
    started_from = options["init"].name if options["init"] else ""
    card = Card(method, loaded.model_id, description, data_source, started_from)
    write_card(card, config, data, training.history, acceptance)
    _announce(method, config.out, acceptance)


def _announce(method: str, out: Path, acceptance: Acceptance) -> None:
    for path in out.glob("*.safetensors"):
        if path.name != _DATA_FILE:
            path.chmod(0o644)  # they are written for their owner alone, as prompts and answers stay
    click.echo(
        f"Acceptance length {acceptance.length:.2f} on {acceptance.num_answers} held-out answers (K = "
        f"{acceptance.draft_depth}). Serve it with: specdec up --drafter {method}:{out}"
    )


def _check_folder(checkpoint: Path, *, resume: bool) -> None:
    if resume and not checkpoint.is_file():
        raise InvalidArgumentError(f"There is no {checkpoint} to resume from.", field="resume")
    if checkpoint.is_file() and not resume:
        raise InvalidArgumentError(
            f"{checkpoint} is of an earlier run; go on with it (--resume), or choose another --out.",
            field="out",
        )
    checkpoint.parent.mkdir(parents=True, exist_ok=True)


def _load(options: dict[str, Any]) -> LoadedModel:
    from specdec.runtime.loading import load_causal_lm

    return load_causal_lm(
        options["model"], dtype=options["dtype"], device=options["device"], threads=options["threads"]
    )


def _data_files(options: dict[str, Any], console: Console) -> tuple[list[Path], str]:
    """The files of sequences to train on, one generated unless it is there, and what to call them."""
    from drafter_service.training.data import read_made_with

    given: tuple[Path, ...] = options["tokens"]
    if given:
        return list(given), f"the sequences of {', '.join(f'`{path.name}`' for path in given)}"
    kept: Path = options["out"] / _DATA_FILE
    made_with = {name: str(options[name]) for name in _GENERATION}
    if not kept.is_file():
        _generate(_load(options), options, console).save(kept, made_with)
    elif (found := read_made_with(kept)) != made_with:
        other = [f"{name} {found.get(name)}" for name in _GENERATION if found.get(name) != made_with[name]]
        raise InvalidArgumentError(
            f"{kept} was generated with other options ({', '.join(other)}); delete it, give it as --tokens, "
            "or choose another --out.",
            field="out",
        )
    prompts: Path | None = options["prompts"]
    asked = f"the prompts of `{prompts.name}`" if prompts else "prompts it made up"
    return [kept], f"the target's greedy answers to {asked}"


def _generate(loaded: LoadedModel, options: dict[str, Any], console: Console) -> TokenData:
    from drafter_service.training.data import TokenData, split
    from drafter_service.training.generate import Decoder, GenerationProgress, generate, room_after
    from drafter_service.training.prompts import PromptMaker
    from drafter_service.training.tasks import make_tasks
    from specdec.models.files import resolve_model
    from specdec.runtime.packed_model import PackedModel

    maker = PromptMaker(resolve_model(options["model"]), loaded.eos_token_ids)
    packed = PackedModel(loaded.model, kv_budget_bytes=_GENERATION_BYTES)
    seed, count, max_new_tokens = options["seed"], options["num_sequences"], options["max_new_tokens"]
    passages: Path | None = options.get("passages")
    with GenerationProgress(console) as progress:

        def answer(prompts: Sequence[Sequence[int]]) -> TokenData:
            return generate(
                packed,
                prompts,
                num_sequences=count,
                max_new_tokens=max_new_tokens,
                eos_token_ids=loaded.eos_token_ids,
                batch_size=_BATCH_SIZE,
                progress=progress,
            )

        if options["prompts"]:
            return answer(maker.read(options["prompts"]))
        num_tasks = round(count * options.get("task_share", _TASK_SHARE))
        num_openings = max(count - num_tasks, 0 if passages else 1)
        parts = []
        if num_openings:
            parts.append(answer(maker.make_up(Decoder(packed, _BATCH_SIZE), num_openings, seed, progress)))
        about = TokenData.load(passages, packed.vocab_size) if passages else parts[0]
        # At least as much is left for the answer.
        most = min(_MAX_TASK_TOKENS, room_after(packed, (0,)) // 2)
        # A task quotes an answer: those that will be held out are left alone.
        quotable, _ = split(about, _DEFAULTS.num_held_out)
        if tasks := make_tasks(maker, about, quotable, count - num_openings, seed, max_tokens=most):
            parts.append(answer(tasks))
    if not parts:
        raise InvalidArgumentError(f"The answers in {passages} are too short to ask about.", field="passages")
    return TokenData.joined(parts)
