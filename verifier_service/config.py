"""Configuration of the verifier service."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.config import ModelServiceConfig
from specdec.runtime.embedded import DEFAULT_MODEL


@dataclass(frozen=True, slots=True)
class VerifierConfig(ModelServiceConfig):
    """What a verifier runs and how much it may use."""

    listen: str = "127.0.0.1:50051"
    """Address to serve on: host:port or unix:/path."""
    model: str = DEFAULT_MODEL
    """Target model: "default" (SmolLM2-135M-Instruct), a folder, or a hub id."""
