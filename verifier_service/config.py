"""Configuration of the verifier service."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.config import require_not_negative, require_positive
from specdec.runtime.embedded import DEFAULT_MODEL


@dataclass(frozen=True, slots=True)
class VerifierConfig:
    """What a verifier runs and how much it may use."""

    listen: str = "127.0.0.1:50051"
    """Address to serve on: host:port or unix:/path."""
    model: str = DEFAULT_MODEL
    """Target model: "default" (SmolLM2-135M-Instruct), a folder, or a hub id."""
    dtype: str = "bfloat16"
    """Data type of weights and KV."""
    device: str = "cpu"
    """Device of weights and KV."""
    kv_cache_mib: float = 256.0
    """Memory of the KV pool, MiB; allocated at start, never more."""
    max_sessions: int = 64
    """Most sessions at a time."""
    max_num_draft_tokens: int = 64
    """Most draft tokens in one round."""
    prefill_chunk_tokens: int = 256
    """Prompt tokens a session adds to one pass; a round waits for no more than that of each other session."""
    max_batch_tokens: int = 1024
    """Tokens of all sessions in one pass."""
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
        )
        require_not_negative(self, "drain_grace_s")
