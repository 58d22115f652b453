"""The answers that a drafter learns from: generated, or read from files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from drafter_service.training.config import DataOptions, LoopConfig
from drafter_service.training.data import TokenData, read_made_with, split
from drafter_service.training.generate import Decoder, GenerationProgress, generate, room_after
from drafter_service.training.prompts import PromptMaker
from drafter_service.training.tasks import make_tasks
from specdec.contract.errors import InvalidArgumentError
from specdec.models.files import resolve_model
from specdec.runtime.loading import LoadedModel, load_causal_lm
from specdec.runtime.packed_model import PackedModel

DATA_FILE = "tokens.safetensors"
"""Name of the generated answers in the folder of their drafter."""
_GENERATION = ("model", "prompts", "num_sequences", "max_new_tokens", "seed", "dtype")
"""Options that decide what is generated."""
_BATCH_SIZE = 48
"""Number of sequences that are generated together."""
_GENERATION_BYTES = 2**30
"""Memory for the KV of these sequences."""
_MAX_TASK_TOKENS = 384
"""Longest prompt about a text, tokens."""
_NUM_HELD_OUT = LoopConfig(out=Path()).num_held_out


def load_target(options: DataOptions) -> LoadedModel:
    """Load the target.

    Raises:
        NotFoundError: there is no such model.
        InvalidArgumentError: the model or the device cannot be used.
    """
    return load_causal_lm(options.model, dtype=options.dtype, device=options.device, threads=options.threads)


def data_files(options: DataOptions, console: Console) -> tuple[list[Path], str]:
    """Return the files of sequences to train on, and what a card calls them.

    Answers are generated unless files are given, or the output folder has answers of the same options.

    Raises:
        InvalidArgumentError: the output folder has answers that were generated with other options.
    """
    if options.tokens:
        return list(options.tokens), f"the sequences of {_listed(options.tokens)}"
    kept = options.out / DATA_FILE
    made_with = _made_with(options)
    if not kept.is_file():
        generate_answers(load_target(options), options, console).save(kept, made_with)
    elif (found := read_made_with(kept)) != made_with:
        other = [f"{name} {found.get(name)}" for name in _GENERATION if found.get(name) != made_with[name]]
        raise InvalidArgumentError(
            f"{kept} was generated with other options ({', '.join(other)}); delete it, give it as --tokens, "
            "or choose another --out.",
            field="out",
        )
    asked = f"the prompts of {_listed(options.prompts)}" if options.prompts else "prompts it made up"
    return [kept], f"the target's greedy answers to {asked}"


def _made_with(options: DataOptions) -> dict[str, str]:
    """Return the options that decide what is generated, as a file of sequences keeps them."""
    prompts = ", ".join(map(str, options.prompts)) or "None"
    return {name: str(getattr(options, name)) for name in _GENERATION} | {"prompts": prompts}


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(f"`{path.name}`" for path in paths)


def generate_answers(loaded: LoadedModel, options: DataOptions, console: Console) -> TokenData:
    """Have the target answer prompts: those of a file, or prompts it makes up and tasks about its texts.

    Raises:
        InvalidArgumentError: a prompt leaves no room for an answer, or no text is long enough for a task.
    """
    maker = PromptMaker(resolve_model(options.model), loaded.eos_token_ids)
    packed = PackedModel(loaded.model, kv_budget_bytes=_GENERATION_BYTES)
    count = options.num_sequences
    with GenerationProgress(console) as progress:

        def answer(prompts: Sequence[Sequence[int]]) -> TokenData:
            return generate(
                packed,
                prompts,
                num_sequences=count,
                max_new_tokens=options.max_new_tokens,
                eos_token_ids=loaded.eos_token_ids,
                batch_size=_BATCH_SIZE,
                progress=progress,
            )

        if options.prompts:
            return answer(maker.read(*options.prompts))
        num_openings = max(count - round(count * options.task_share), 0 if options.passages else 1)
        parts = []
        if num_openings:
            decoder = Decoder(packed, _BATCH_SIZE)
            parts.append(answer(maker.make_up(decoder, num_openings, options.seed, progress)))
        about = TokenData.load(options.passages, packed.vocab_size) if options.passages else parts[0]
        tasks = _tasks(maker, about, packed, count - num_openings, options.seed)
        if tasks:
            parts.append(answer(tasks))
    if not parts:
        raise InvalidArgumentError(
            f"The answers in {options.passages} are too short to ask about.", field="passages"
        )
    return TokenData.joined(parts)


def _tasks(
    maker: PromptMaker, about: TokenData, packed: PackedModel, count: int, seed: int
) -> list[list[int]]:
    # At least as much room is left for the answer.
    max_tokens = min(_MAX_TASK_TOKENS, room_after(packed, (0,)) // 2)
    # A task quotes an answer, so answers that will be held out are not asked about.
    quotable, _ = split(about, _NUM_HELD_OUT)
    return make_tasks(maker, about, quotable, count, seed, max_tokens=max_tokens)
