"""Service configuration: a frozen dataclass is checked here and becomes command-line options."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import click

from specdec.contract.errors import InvalidArgumentError
from specdec.transport.tls import OutgoingTls, PemFiles

TARGET_STATE_MODES = ("auto", "handle", "stream")


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """What all services have in common."""

    tls_certificate: str = ""
    """PEM file of this service's certificate, and of those between it and an authority: turns TLS on for its
    port, and is shown to the services it calls. Changed files are used without a restart."""
    tls_private_key: str = ""
    """PEM file of the certificate's private key."""
    tls_authorities: str = ""
    """PEM file of who may have signed the certificates of the services this one calls; calls then go over
    TLS. Empty: they are plaintext."""
    tls_client_authorities: str = ""
    """PEM file of who may have signed callers' certificates, which they then must show (mutual TLS); empty:
    none is demanded."""
    tls_server_name: str = ""
    """Name the certificates of the services it calls must carry; empty: the one of their address."""
    metrics_listen: str = ""
    """Address of the Prometheus endpoint, host:port, with path /metrics; empty: there is none. OTLP, by the
    OTEL_* variables, does not depend on it."""
    health_listen: str = ""
    """Address of a second port, host:port, that answers health checks and nothing else, always in plaintext,
    for probes that know neither TLS nor tokens; empty: there is none."""

    def __post_init__(self) -> None:
        for name in ("metrics_listen", "health_listen"):
            if address := getattr(self, name):
                parse_address(address, name)
        if bool(self.tls_certificate) != bool(self.tls_private_key):
            raise InvalidArgumentError(
                "--tls-certificate and --tls-private-key go together; give both or neither.",
                field="tls_certificate",
            )
        if self.tls_client_authorities and not self.tls_certificate:
            raise InvalidArgumentError(
                "--tls-client-authorities needs a port with TLS; give it a --tls-certificate and its key.",
                field="tls_client_authorities",
            )
        if self.tls_server_name and not self.tls_authorities:
            raise InvalidArgumentError(
                "--tls-server-name needs calls over TLS; give --tls-authorities.", field="tls_server_name"
            )

    @property
    def server_tls(self) -> PemFiles | None:
        """Files of the own port; None: it is plaintext."""
        return self._files(self.tls_client_authorities) if self.tls_certificate else None

    def outgoing_tls(self) -> OutgoingTls | None:
        """Credentials for the services it calls; None: calls are plaintext.

        Raises:
            InvalidArgumentError: a file is missing or no good.
        """
        if not self.tls_authorities:
            return None
        return OutgoingTls(self._files(self.tls_authorities), self.tls_server_name)

    def _files(self, authorities: str) -> PemFiles:
        paths = (authorities, self.tls_private_key, self.tls_certificate)
        return PemFiles(*(Path(path) if path else None for path in paths))


@dataclass(frozen=True, slots=True)
class ModelServiceConfig(ServiceConfig):
    """What the two services that run models have in common."""

    dtype: str = "bfloat16"
    """Data type of weights and KV."""
    device: str = "cpu"
    """Device of weights and KV."""
    threads: int = 0
    """CPU threads of the model; 0: one per core. Fewer where other processes keep cores busy: an operation
    ends when its last thread does."""
    kv_cache_mib: float = 256.0
    """Memory of a model's KV pool, MiB; allocated at start, never more."""
    max_sessions: int = 64
    """Most sessions at a time."""
    tls_session_callers: str = ""
    """DNS names, separated by commas, one of which a caller's certificate must carry to open a session, the
    gateways' that is; empty: any that --tls-client-authorities signed will do. Others may still ask what the
    service is, and read target state by a session's id."""
    idle_timeout_s: float = 300.0
    """How long a session may go without a message, seconds; then it ends and its memory is free."""
    prefill_chunk_tokens: int = 128
    """Prompt tokens a session adds to one pass, and all sessions together to one with rounds, which wait."""
    max_batch_tokens: int = 1024
    """Tokens of all sessions in one pass."""
    target_state: str = "auto"
    """How target state goes from verifier to drafter: "auto" (by handle on one host or GPU, else by stream),
    "handle" (by handle or not at all: a verifier that cannot share memory does not start, a drafter that
    cannot map it does not draft) or "stream" (over gRPC only)."""
    shared_dir: str = "/dev/shm"
    """Memory-backed directory of the handles, the same for verifiers and drafters of a host; they use a
    folder specdec-UID in it. A verifier puts its KV pool there."""
    drain_grace_s: float = 30.0
    """How long running sessions may go on after SIGTERM, seconds."""
    log_level: str = "info"
    """Least severe log level written."""

    def __post_init__(self) -> None:
        # The two-argument form: slots make another class object than the one super() would look for.
        super(ModelServiceConfig, self).__post_init__()
        require_positive(
            self,
            "kv_cache_mib",
            "max_sessions",
            "idle_timeout_s",
            "prefill_chunk_tokens",
            "max_batch_tokens",
        )
        require_not_negative(self, "drain_grace_s", "threads")
        require_choice(self, "target_state", TARGET_STATE_MODES)
        if self.tls_session_callers and not self.tls_client_authorities:
            raise InvalidArgumentError(
                "--tls-session-callers needs callers with certificates; give --tls-client-authorities.",
                field="tls_session_callers",
            )

    @property
    def session_callers(self) -> frozenset[str]:
        """Names one of which a certificate must carry; empty: any will do."""
        return frozenset(self.tls_session_callers.replace(",", " ").split())


_LOG_LEVELS = ("debug", "info", "warning", "error")

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def config_options(
    config_type: type[Any], *, choices: Mapping[str, Sequence[str]] | None = None
) -> Callable[[CommandT], CommandT]:
    """Add one option per field: `max_sessions` is --max-sessions, its default and its docstring are the help.

    Fields whose default is a tuple may be given several times.
    """
    docs = _field_docs(config_type)
    allowed = {"log_level": _LOG_LEVELS, "target_state": TARGET_STATE_MODES, **(choices or {})}

    def decorate(command: CommandT) -> CommandT:
        # A service's own options first, then those it shares with others.
        entries = sorted(fields(config_type), key=lambda entry: entry.name not in config_type.__annotations__)
        for entry in reversed(entries):
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            kind: Any = type(default[0] if isinstance(default, tuple) and default else default)
            if entry.name in allowed:
                kind = click.Choice(list(allowed[entry.name]))
            command = click.option(
                f"--{entry.name.replace('_', '-')}",
                entry.name,
                type=str if kind is tuple else kind,
                default=default,
                multiple=isinstance(default, tuple),
                show_envvar=True,
                help=docs.get(entry.name, ""),
            )(command)
        return command

    return decorate


def parse_address(address: str, name: str) -> tuple[str, int]:
    """Host and port of host:port or [IPv6 host]:port.

    Args:
        name: the field it is the value of.

    Raises:
        InvalidArgumentError: naming the option.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        option = f"--{name.replace('_', '-')}"
        raise InvalidArgumentError(
            f"{option} is {address!r}; it must be host:port, such as 127.0.0.1:9464.", field=name
        )
    return host.removeprefix("[").removesuffix("]"), int(port)


def require_positive(config: object, *names: str) -> None:
    """Refuse fields that are not more than 0.

    Raises:
        InvalidArgumentError: naming the option.
    """
    for name in names:
        _require(0 < getattr(config, name) < math.inf, config, name, "a number more than 0")


def require_not_negative(config: object, *names: str) -> None:
    """Refuse fields that are less than 0.

    Raises:
        InvalidArgumentError: naming the option.
    """
    for name in names:
        _require(0 <= getattr(config, name) < math.inf, config, name, "a number, 0 or more")


def require_choice(config: object, name: str, choices: Sequence[str]) -> None:
    """Refuse a field that is none of `choices`.

    Raises:
        InvalidArgumentError: naming the option.
    """
    _require(getattr(config, name) in choices, config, name, f"one of {', '.join(choices)}")


def _require(is_right: bool, config: object, name: str, expected: str) -> None:
    if not is_right:
        option = f"--{name.replace('_', '-')}"
        raise InvalidArgumentError(f"{option} is {getattr(config, name)}; it must be {expected}.", field=name)


def _field_docs(config_type: type[Any]) -> dict[str, str]:
    """The string literal under each field, inherited ones included, which Python itself does not keep."""
    docs: dict[str, str] = {}
    for owner in reversed(config_type.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for field_node, doc_node in pairwise(body):
            if (
                isinstance(field_node, ast.AnnAssign)
                and isinstance(field_node.target, ast.Name)
                and isinstance(doc_node, ast.Expr)
                and isinstance(doc_node.value, ast.Constant)
            ):
                docs[field_node.target.id] = " ".join(str(doc_node.value.value).split())
    return docs
