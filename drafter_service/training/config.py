"""Configuration of a training run. Imports no torch: the command line reads its defaults from here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """How a drafter is trained, whatever its method."""

    out: Path
    """Folder of the drafter, its card and its checkpoint."""
    minutes: float = 60.0
    """Time to train, minutes; the learning rate falls to nearly 0 over it."""
    steps: int = 0
    """Steps to train, the same on every machine; 0: as many as fit into the minutes."""
    learning_rate: float = 1e-3
    """Largest learning rate of AdamW."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises."""
    tokens_per_step: int = 512
    """Answer tokens of a step, at least; sequences are not cut for it."""
    max_length: int = 512
    """Longer sequences are cut there, tokens."""
    passes: int = 3
    """Times a batch is trained on before its features go: the target's pass costs more than a step."""
    evaluate_minutes: float = 5.0
    """Time between two looks at held-out acceptance, minutes."""
    draft_depth: int = 4
    """K of the held-out acceptance; less where a drafter cannot draft as many."""
    num_held_out: int = 48
    """Sequences held out."""
    seed: int = 0
    """Of the order of sequences and all else that is random."""

    @property
    def pool_tokens(self) -> int:
        """Tokens whose KV the target keeps while it reads sequences: a step's with prompts as long as their
        answers, and always one sequence; a step with longer prompts takes several passes."""
        return 2 * (self.tokens_per_step + self.max_length)


@dataclass(frozen=True, slots=True)
class CountOptions:
    """What of the answers an n-gram table keeps."""

    max_size: int = 5
    """Tokens of the longest context."""
    min_count: int = 2
    """Occurrences below which a context of several tokens is left out."""
    min_gain: float = 4.0
    """Nats that a context must tell beyond the shorter one, over all its occurrences; -inf: anything."""
