"""Configuration of the gateway."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.contract.errors import InvalidArgumentError
from specdec.contract.methods import AUTO
from specdec.models.embedded import DEFAULT_MODEL
from specdec.service.config import ServiceConfig, require_not_negative, require_positive
from specdec.transport.channel import parse_uris


@dataclass(frozen=True, slots=True)
class GatewayConfig(ServiceConfig):
    """Which services a gateway uses and how."""

    listen: str = "127.0.0.1:50050"
    """Address to serve on: host:port or unix:/path."""
    verifier: str = "127.0.0.1:50051"
    """Verifier replicas: gRPC URIs (host:port, dns:///name:port, unix:/path), separated by commas."""
    drafter: str = "127.0.0.1:50052"
    """Drafter replicas, likewise; empty: no drafters."""
    tokenizer: str = DEFAULT_MODEL
    """Whose tokenizer and chat template to use: "default", the target's folder, or its hub id."""
    default_method: str = AUTO
    """Drafter of requests that name none, or several joined by +; "none": plain decoding; "auto": the first
    that reads the target's state, or else has a model, together with ngram-lm or else ngram, where they have
    the target's vocabulary."""
    default_max_new_tokens: int = 256
    """Most tokens to emit when a request does not say."""
    max_requests: int = 256
    """Most requests at a time."""
    max_prompt_bytes: int = 2**20
    """Longest text of a prompt, all messages of a chat together, bytes of UTF-8; tokenising takes some 300
    times as much memory for a moment."""
    draft_timeout_s: float = 2.0
    """How long a round waits for its draft, seconds; a later draft counts as lost."""
    drafter_wait_s: float = 5.0
    """How long a starting gateway waits for a drafter before it serves without, seconds."""
    failover_wait_s: float = 10.0
    """How long a request whose verifier was lost waits for another to go on with, seconds; then it fails."""
    auth_tokens: str = ""
    """TOML file of who may call, one [[tokens]] table each, as `specdec token` makes them; read anew when it
    changes. Health checks stay open to all. Empty: everyone that can connect may call."""
    authenticator: str = ""
    """MODULE:NAME of a callable that returns a specdec.service.auth.Authenticator. It stands in place of
    --auth-tokens."""
    drain_grace_s: float = 30.0
    """How long running requests may go on after SIGTERM, seconds."""
    log_level: str = "info"
    """Least severe log level written."""

    def __post_init__(self) -> None:
        # The two-argument form: slots make another class object than the one super() would look for.
        super(GatewayConfig, self).__post_init__()
        require_positive(
            self,
            "default_max_new_tokens",
            "max_requests",
            "max_prompt_bytes",
            "draft_timeout_s",
        )
        require_not_negative(self, "drain_grace_s", "drafter_wait_s", "failover_wait_s")
        if self.auth_tokens and self.authenticator:
            raise InvalidArgumentError(
                "--auth-tokens and --authenticator exclude each other; give one.", field="authenticator"
            )
        parse_uris(self.verifier)
        if self.drafter:
            parse_uris(self.drafter)

    @property
    def verifier_uris(self) -> tuple[str, ...]:
        """Verifier addresses."""
        return parse_uris(self.verifier)

    @property
    def drafter_uris(self) -> tuple[str, ...]:
        """Drafter addresses, none if there are no drafters."""
        return parse_uris(self.drafter) if self.drafter else ()
