"""Configuration of the drafter service."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.config import ModelServiceConfig, require_positive
from specdec.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class DrafterConfig(ModelServiceConfig):
    """Which drafters a process loads and how much it may use."""

    listen: str = "127.0.0.1:50052"
    """Address to serve on: host:port or unix:/path."""
    drafter: tuple[str, ...] = ("ngram",)
    """A drafter to load, [NAME=]FAMILY[:MODEL]; may be given several times. "ngram" (prompt lookup),
    "causal-lm:FOLDER-OR-HUB-ID" (a small model with the target's vocabulary). Requests name it by NAME,
    which is FAMILY where it is left out."""
    ngram_min: int = 2
    """Shortest n-gram the ngram drafter looks up, tokens."""
    ngram_max: int = 4
    """Longest n-gram the ngram drafter looks up, tokens; longer matches are preferred."""

    def __post_init__(self) -> None:
        # The two-argument form: slots make another class object than the one super() would look for.
        super(DrafterConfig, self).__post_init__()
        require_positive(self, "ngram_min")
        if self.ngram_max < self.ngram_min:
            raise InvalidArgumentError("--ngram-max must not be less than --ngram-min.", field="ngram_max")
        if not self.drafter:
            raise InvalidArgumentError("No drafter given; pass --drafter ngram for one.", field="drafter")
