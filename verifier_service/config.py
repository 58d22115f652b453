"""Configuration of the verifier service."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.models.embedded import DEFAULT_MODEL
from specdec.service.config import ModelServiceConfig, require_positive
from specdec.transport.channel import parse_uris


@dataclass(frozen=True, slots=True)
class VerifierConfig(ModelServiceConfig):
    """Options of the verifier service."""

    listen: str = "127.0.0.1:50051"
    """Address to serve on: host:port or unix:/path."""
    model: str = DEFAULT_MODEL
    """Target model: a folder, a hub id, or "default" for the embedded model, SmolLM2-135M-Instruct."""
    advertise: str = ""
    """Address at which drafters reach this replica to stream target state: host:port or a gRPC URI. Empty:
    the address of --listen, or HOSTNAME:PORT where --listen is every interface (0.0.0.0)."""
    max_draft_nodes: int = 64
    """Most draft tokens that a round may bring, all branches of a tree together."""
    max_hidden_layers: int = 16
    """Most layers whose hidden states are kept for drafters. Each layer takes memory besides the KV pool: one
    hidden size per token of the pool. A drafter for which too few of them are left gets no state, and
    its requests run without it."""

    kv_session_tokens: int = 4096
    """Length of texts, tokens, that the KV pool is divided for, where a model has layers with a sliding
    window beside layers that attend to the whole text. The former need the last tokens of a text only: the
    longer the texts, the more of the memory goes to the latter. If texts are much shorter or longer than
    this, one part of the pool is full while the other has room."""

    no_prefix_reuse: bool = False
    """Compute every prompt from its first token. Without this option, KV and hidden states of texts are kept
    while there is room, and a prompt that begins like an earlier text of the same caller and cache_salt takes
    up where they differ."""

    def __post_init__(self) -> None:
        # The two-argument form: slots make another class object than the one super() would look for.
        super(VerifierConfig, self).__post_init__()
        require_positive(self, "max_draft_nodes", "max_hidden_layers", "kv_session_tokens")
        if self.advertise:
            parse_uris(self.advertise)
