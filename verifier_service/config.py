"""Configuration of the verifier service."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.models.embedded import DEFAULT_MODEL
from specdec.service.config import ModelServiceConfig, require_positive
from specdec.transport.channel import parse_uris


@dataclass(frozen=True, slots=True)
class VerifierConfig(ModelServiceConfig):
    """What a verifier runs and how much it may use."""

    listen: str = "127.0.0.1:50051"
    """Address to serve on: host:port or unix:/path."""
    model: str = DEFAULT_MODEL
    """Target model: "default" (SmolLM2-135M-Instruct), a folder, or a hub id."""
    advertise: str = ""
    """Address at which drafters reach this replica to stream target state, host:port or a gRPC URI; empty:
    --listen, or HOSTNAME:PORT where that is every interface (0.0.0.0)."""
    max_draft_nodes: int = 64
    """Most draft tokens that a round may bring, all branches of a tree together."""
    max_hidden_layers: int = 16
    """Most layers whose hidden states are kept for drafters, in memory besides the KV pool: one hidden size
    per token of the pool each. A drafter that wants more gets none, and its requests no drafts."""

    def __post_init__(self) -> None:
        # The two-argument form: slots make another class object than the one super() would look for.
        super(VerifierConfig, self).__post_init__()
        require_positive(self, "max_draft_nodes", "max_hidden_layers")
        if self.advertise:
            parse_uris(self.advertise)
