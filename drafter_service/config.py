"""Configuration of the drafter service."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.config import require_not_negative, require_positive
from specdec.errors import InvalidArgumentError


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """Which drafters a process loads and how much it may use."""

    listen: str = "127.0.0.1:50052"
    """Address to serve on: host:port or unix:/path."""
    drafter: tuple[str, ...] = ("ngram",)
    """A drafter to load, [NAME=]FAMILY[:MODEL]; may be given several times. "ngram" (prompt lookup),
    "causal-lm:FOLDER-OR-HUB-ID" (a small model with the target's vocabulary). Requests name it by NAME,
    which is FAMILY where it is left out."""
    dtype: str = "bfloat16"
    """Data type of draft models' weights and KV."""
    device: str = "cpu"
    """Device of draft models."""
    kv_cache_mib: float = 256.0
    """Memory of each draft model's KV pool, MiB."""
    max_sessions: int = 64
    """Most sessions at a time, all drafters together."""
    max_num_draft_tokens: int = 64
    """Most tokens drafted in a round."""
    prefill_chunk_tokens: int = 256
    """Prompt tokens a session adds to one pass of a draft model."""
    max_batch_tokens: int = 1024
    """Tokens of all sessions in one pass of a draft model."""
    ngram_min: int = 2
    """Shortest n-gram the ngram drafter looks up, tokens."""
    ngram_max: int = 4
    """Longest n-gram the ngram drafter looks up, tokens; longer matches are preferred."""
    drain_grace_s: float = 30.0
    """How long running sessions may go on after SIGTERM, seconds."""
    log_level: str = "info"
    """Least severe log level written."""

    def __post_init__(self) -> None:
        require_positive(
            self,
            "kv_cache_mib",
            "max_sessions",
            "max_num_draft_tokens",
            "prefill_chunk_tokens",
            "max_batch_tokens",
            "ngram_min",
        )
        if self.ngram_max < self.ngram_min:
            raise InvalidArgumentError("--ngram-max must not be less than --ngram-min.", field="ngram_max")
        if not self.drafter:
            raise InvalidArgumentError("No drafter given; pass --drafter ngram for one.", field="drafter")
        require_not_negative(self, "drain_grace_s")
