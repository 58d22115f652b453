"""Configuration of training runs. It imports no torch: the command line reads its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

LOSS_NAMES = ("kl", "ce", "tv", "acceptance", "lk")
"""What a drafter can minimise; losses.py says what they are."""


class _Options:
    """Options that are taken from those of a command."""

    __slots__ = ()

    @classmethod
    def taken_from(cls, options: dict[str, Any]) -> Self:
        """Take the options that have the names of fields; the others belong to something else."""
        names = {entry.name for entry in fields(cls)}  # type: ignore[arg-type]
        return cls(**{name: value for name, value in options.items() if name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions(_Options):
    """Which target's answers a drafter learns from, and how they are generated if they are not given."""

    out: Path
    """Folder of the drafter, where generated answers are kept."""
    model: str = "default"
    """The target: a folder or hub id."""
    tokens: tuple[Path, ...] = ()
    """Files of token sequences to learn from; empty: answers are generated."""
    prompts: tuple[Path, ...] = ()
    """Files of prompts to answer; empty: the target makes prompts up."""
    num_sequences: int = 4000
    """Number of answers to generate."""
    max_new_tokens: int = 256
    """Longest generated answer, tokens."""
    seed: int = 0
    """Seed of the prompts that are made up."""
    dtype: str = "bfloat16"
    """Data type of the target."""
    device: str = "cpu"
    """Device of the target and the drafter."""
    threads: int = 0
    """CPU threads; 0: all."""
    task_share: float = 0.25
    """Share of the made-up prompts that are about a text the target wrote, 0 to 1."""
    passages: Path | None = None
    """File of token sequences whose answers are these texts; None: the answers generated before."""


@dataclass(frozen=True, slots=True)
class LoopConfig(_Options):
    """How a drafter is trained, whatever its method."""

    out: Path
    """Folder of the drafter, its card and its checkpoint."""
    minutes: float = 60.0
    """Time to train, minutes; the learning rate falls to nearly 0 over it."""
    steps: int = 0
    """Number of steps to train, the same on every machine; 0: as many as fit into the minutes."""
    learning_rate: float = 1e-3
    """Largest learning rate of AdamW."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises."""
    tokens_per_step: int = 512
    """Least number of answer tokens in a step; sequences are not cut for it."""
    max_length: int = 512
    """Length at which longer sequences are cut, tokens."""
    passes: int = 3
    """How often a batch is trained on while its features are kept: the target's pass costs more than a
    step."""
    evaluate_minutes: float = 5.0
    """Time between two measurements of the held-out acceptance, minutes."""
    draft_depth: int = 4
    """K of the held-out acceptance; less where a drafter cannot draft as many."""
    num_held_out: int = 48
    """Number of sequences held out."""
    seed: int = 0
    """Seed of the order of sequences and of all else that is random."""

    @property
    def pool_tokens(self) -> int:
        """Tokens whose KV the target keeps while it reads sequences.

        A step has room if its prompts are as long as its answers, and so has any single sequence; a step with
        longer prompts takes several passes.
        """
        return 2 * (self.tokens_per_step + self.max_length)


@dataclass(frozen=True, slots=True)
class CountOptions(_Options):
    """Which n-grams of the answers a table keeps."""

    max_size: int = 5
    """Length of the longest context, tokens."""
    min_count: int = 2
    """Occurrences below which a context of several tokens is left out."""
    min_gain: float = 4.0
    """Least gain of a context over the shorter one, nats over all its occurrences; -inf: any will do."""
