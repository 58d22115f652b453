"""Configuration of the gateway."""

from __future__ import annotations

from dataclasses import dataclass

from specdec.contract.bounds import MAX_NUMBER
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.methods import AUTO
from specdec.contract.request_limits import MAX_LISTS_BYTES
from specdec.models.embedded import DEFAULT_MODEL
from specdec.service.config import (
    ServiceConfig,
    parse_address,
    require_between,
    require_not_negative,
    require_positive,
)
from specdec.transport.channel import parse_uris

MAX_STREAM_PADDING = 2**16
"""Most bytes that a message of an answer is padded to a multiple of."""


@dataclass(frozen=True, slots=True)
class GatewayConfig(ServiceConfig):
    """Options of the gateway."""

    listen: str = "127.0.0.1:50050"
    """Address to serve on: host:port or unix:/path."""
    http_listen: str = ""
    """Address to serve OpenAI's HTTP interface on, host:port. It needs the extra `http`. The certificates,
    tokens and limits of this gateway hold there as well. Empty: it is not served."""
    verifier: str = "127.0.0.1:50051"
    """Addresses of the verifiers: gRPC URIs (host:port, dns:///name:port, unix:/path), separated by commas.
    Each address that a name resolves to is a replica."""
    drafter: str = "127.0.0.1:50052"
    """Addresses of the drafter services, written as those of the verifiers. Empty: the gateway asks no
    drafter, and every answer is decoded plainly."""
    tokenizer: str = DEFAULT_MODEL
    """Model whose tokenizer and chat template are used, which must be the target's: a folder, a hub id, or
    "default" for the embedded model."""
    default_method: str = AUTO
    """Method of requests that name none: a drafter, several drafters joined by +, "none" for plain decoding,
    or "auto", which chooses round by round what pays best among all drafters with the target's
    vocabulary."""
    default_max_new_tokens: int = 256
    """Most tokens of an answer whose request sets no limit."""
    max_output_tokens: int = 8192
    """Most tokens of an answer that a request may ask for."""
    max_request_s: float = 900.0
    """Longest time of a request, seconds, from when it begins to run until its client has read all of the
    answer; then it is ended. An answer whose client reads slowly waits in the gateway's memory, and holds no
    verifier."""
    max_requests: int = 256
    """Most requests that run at a time."""
    max_waiting: int = 256
    """Most requests that wait, while --max-requests run or the verifiers have no room. Callers take turns. A
    request that finds the queue full is refused, and told when to come back. 0: none waits."""
    max_waiting_bytes: int = 64 * 2**20
    """Most bytes of all requests that wait, prompts included. A request that would take them further is
    refused as one that finds the queue full is."""
    max_wait_s: float = 900.0
    """Longest time that a request waits for room, seconds; then it is ended. A request with a deadline of its
    own is ended once its answer would come too late."""
    max_connection_age_s: float = 300.0
    """How long a client may use one connection, seconds, give or take a tenth; then it is told to make
    another one, and running requests go on over the old one. A client looks its name for the gateways up when
    it connects, so after that time a new gateway has its share of the requests, those of clients that have
    been connected all along included. Some client libraries, such as grpclib, end running calls instead: give
    theirs more time than an answer takes."""
    max_prompt_bytes: int = 2**20
    """Longest text of a prompt, all messages of a chat together, bytes of UTF-8. While a text is tokenised it
    takes about 300 times as much memory. A whole request, token ids included, may have twice as many bytes
    and 256 KiB besides; longer requests are not received."""
    connection_idle_s: float = 200.0
    """How long a client's connection without a call stays open, seconds, at least 1; a later call connects
    anew. The Python client ends its own after 120 s. 0: as long as --max-connection-age-s."""
    max_http_connections: int = 1024
    """Most HTTP connections at a time. Where one more comes, the one that has been without a request for the
    longest time ends; where all have requests, the new one is refused."""
    allow_special_tokens: bool = False
    """Let the text of a special token, such as <|im_end|>, in the messages of a chat become that token; a
    message can then end its turn and speak for others. Without this option it stays text. A raw prompt may
    have special tokens in any case."""
    draft_timeout_s: float = 2.0
    """How long a round waits for its draft, seconds; a draft that comes later counts as lost."""
    round_timeout_s: float = 60.0
    """How long a verifier may take for a round, seconds; then it counts as lost, and the answer goes on at
    another one. A process that stands still is noticed within seconds; this is for one that answers pings and
    nothing else."""
    drafter_wait_s: float = 5.0
    """How long a gateway waits for a drafter when it starts, seconds; then it serves without one."""
    failover_wait_s: float = 10.0
    """How long a request whose verifier was lost waits for another verifier, seconds; then the request
    fails."""
    auth_tokens: str = ""
    """TOML file of the callers, one [[tokens]] table for each, as `specdec token` prints it. The file is read
    again when it changes. Health checks need no token. Empty: everyone who can connect may call."""
    authenticator: str = ""
    """MODULE:NAME of a callable that returns a specdec.service.auth.Authenticator, which then decides who may
    call. It replaces --auth-tokens."""
    stream_padding: int = 0
    """Pad each message of an answer to a multiple of so many bytes, at most 65,536, so that who sees sizes on
    the wire does not learn how many tokens each round accepted; 1024 is enough for the tokens of a round
    without log probabilities. 0: messages are as long as what is in them."""
    trust_traceparent: bool = False
    """Let a request belong to the trace that its caller names (metadata traceparent), which then also says
    whether spans of it are recorded. Without this option it has a trace of its own, with a link to the
    caller's span. Set it where all callers are your own services."""
    drain_grace_s: float = 30.0
    """How long running requests may go on after SIGTERM, seconds."""
    log_level: str = "info"
    """Least severe level of log records that are written."""

    def __post_init__(self) -> None:
        # The two-argument form: slots make another class object than the one super() would look for.
        super(GatewayConfig, self).__post_init__()
        require_positive(
            self,
            "default_max_new_tokens",
            "max_output_tokens",
            "max_request_s",
            "max_requests",
            "max_wait_s",
            "max_connection_age_s",
            "max_prompt_bytes",
            "max_http_connections",
            "draft_timeout_s",
            "round_timeout_s",
        )
        require_not_negative(
            self,
            "drain_grace_s",
            "drafter_wait_s",
            "failover_wait_s",
            "max_waiting",
            "max_waiting_bytes",
            "connection_idle_s",
        )
        require_between(self, 0, MAX_STREAM_PADDING, "stream_padding")
        if 0 < self.connection_idle_s < 1:
            # A connection could end before its first call has come.
            require_between(self, 1, MAX_NUMBER, "connection_idle_s")
        if self.default_max_new_tokens > self.max_output_tokens:
            raise InvalidArgumentError(
                f"--default-max-new-tokens is {self.default_max_new_tokens}, more than --max-output-tokens, "
                f"{self.max_output_tokens}.",
                field="default_max_new_tokens",
            )
        if self.auth_tokens and self.authenticator:
            raise InvalidArgumentError(
                "--auth-tokens and --authenticator exclude each other; give one.", field="authenticator"
            )
        if self.http_listen:
            parse_address(self.http_listen, "http_listen")
        parse_uris(self.verifier)
        if self.drafter:
            parse_uris(self.drafter)

    @property
    def max_message_bytes(self) -> int:
        """Largest message that the gateway receives."""
        # Twice the longest prompt: one that is somewhat too long is refused in the gateway's own words.
        return 2 * self.max_prompt_bytes + MAX_LISTS_BYTES

    @property
    def verifier_uris(self) -> tuple[str, ...]:
        """Addresses of the verifiers."""
        return parse_uris(self.verifier)

    @property
    def drafter_uris(self) -> tuple[str, ...]:
        """Addresses of the drafter services; empty: there are no drafters."""
        return parse_uris(self.drafter) if self.drafter else ()
