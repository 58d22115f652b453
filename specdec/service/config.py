"""Service configuration: frozen dataclasses that check their values and become command-line options."""

from __future__ import annotations

import ast
import grp
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import click

from specdec.contract.bounds import MAX_NUMBER, bound_passed
from specdec.contract.errors import InvalidArgumentError
from specdec.transport.tls import OutgoingTls, PemFiles

TARGET_STATE_MODES = ("auto", "handle", "stream")

MAX_THREADS = 1024
"""Most CPU threads of a model: hardly a machine has more cores, and some have no room for more threads."""


@dataclass(frozen=True, slots=True)
class ServiceConfig:
    """Options that all three services have."""

    tls_certificate: str = ""
    """PEM file with this service's certificate, followed by any intermediate ones. It turns TLS on for the
    service's port, and the service shows it to the services it calls. A changed file takes effect without a
    restart."""
    tls_private_key: str = ""
    """PEM file with the certificate's private key."""
    tls_authorities: str = ""
    """PEM file with the authorities that this service trusts when it calls other services; calls then use
    TLS. Empty: calls are plaintext."""
    tls_client_authorities: str = ""
    """PEM file with the authorities that must have signed a caller's certificate (mutual TLS). Empty: callers
    need no certificate."""
    tls_server_name: str = ""
    """Name that the certificates of the called services must carry. Empty: the name in their address."""
    metrics_listen: str = ""
    """Address of the Prometheus endpoint, host:port; its path is /metrics. Empty: there is no such endpoint.
    Export by OTLP is set by the OTEL_* variables alone."""
    health_listen: str = ""
    """Address of a second port, host:port, that answers health checks and nothing else, always in plaintext,
    for probes that know neither TLS nor tokens. Empty: there is no second port."""

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
        """Files for TLS on the service's own port; None: the port is plaintext."""
        return self._files(self.tls_client_authorities) if self.tls_certificate else None

    def outgoing_tls(self) -> OutgoingTls | None:
        """Return the credentials for calls to other services; None: calls are plaintext.

        Raises:
            InvalidArgumentError: a file is missing, or its content cannot be used.
        """
        if not self.tls_authorities:
            return None
        return OutgoingTls(self._files(self.tls_authorities), self.tls_server_name)

    def _files(self, authorities: str) -> PemFiles:
        paths = (authorities, self.tls_private_key, self.tls_certificate)
        return PemFiles(*(Path(path) if path else None for path in paths))


@dataclass(frozen=True, slots=True)
class ModelServiceConfig(ServiceConfig):
    """Options that the two services that run models have."""

    dtype: str = "bfloat16"
    """Data type of the weights and the KV cache."""
    device: str = "cpu"
    """Device that holds the weights and the KV cache, such as cpu or cuda:0."""
    threads: int = 0
    """CPU threads of the model, 1024 at most; 0: one per core that the process may use by its affinity and
    its container's quota. Give it fewer where other processes keep cores busy: an operation ends only when
    its slowest thread does."""
    kv_cache_mib: float = 256.0
    """Memory of a model's KV pool, MiB. It is allocated at start and never grows."""
    max_sessions: int = 64
    """Most sessions that run at a time."""
    tls_session_callers: str = ""
    """DNS names of the gateways, separated by commas: a caller may open sessions only if its certificate
    carries one of them. Other callers may still ask what the service is, and read target state by a session's
    id. Empty: every certificate that --tls-client-authorities signed will do."""
    idle_timeout_s: float = 300.0
    """How long a session may stay silent, seconds; then it ends and its memory is freed."""
    step_timeout_s: float = 30.0
    """Longest time of a step of the engine, seconds for every 64 tokens in it. Then its sessions go on
    elsewhere and the service is NOT_SERVING until the step ends; after three times as long the process ends.
    Raise it for a model that is slow here. 0: no limit."""
    prefill_chunk_tokens: int = 128
    """Prompt tokens that one session adds to a pass. Where a pass also serves rounds, which have to wait for
    it, all sessions together add no more than this."""
    max_batch_tokens: int = 1024
    """Most tokens of all sessions together in one pass."""
    target_state: str = "auto"
    """How target state gets from the verifier to the drafter. "auto": by handle where both share a host or a
    GPU, else by stream. "handle": by handle or not at all; a verifier that cannot share memory does not
    start, and a drafter that cannot map it does not draft. "stream": over gRPC only."""
    shared_dir: str = "/dev/shm"
    """Memory-backed directory in which verifiers and drafters of one host share target state; both must be
    given the same. They use a folder specdec-UID in it, and a verifier puts its KV pool there."""
    shared_group: str = ""
    """Group, by name or number, whose members may read target state in shared memory. Verifier and drafter
    of two users must be given the same group, and belong to it. Empty: only services of one user share
    memory."""
    drain_grace_s: float = 30.0
    """How long running sessions may go on after SIGTERM, seconds."""
    log_level: str = "info"
    """Least severe level of log records that are written."""

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
        require_not_negative(self, "drain_grace_s", "step_timeout_s")
        require_between(self, 0, MAX_THREADS, "threads")
        require_choice(self, "target_state", TARGET_STATE_MODES)
        _ = self.shared_gid
        if self.tls_session_callers and not self.tls_client_authorities:
            raise InvalidArgumentError(
                "--tls-session-callers needs callers with certificates; give --tls-client-authorities.",
                field="tls_session_callers",
            )

    @property
    def shared_gid(self) -> int | None:
        """Number of the group that shares target state; None: there is none.

        Raises:
            InvalidArgumentError: this host has no such group.
        """
        name = self.shared_group
        if not name:
            return None
        if name.isascii() and name.isdigit() and not bound_passed(int(name), 0, MAX_NUMBER):
            return int(name)
        try:
            return grp.getgrnam(name).gr_gid
        except KeyError:
            raise InvalidArgumentError(
                f"--shared-group is {name!r}; it must be the name or the number of a group of this host.",
                field="shared_group",
            ) from None

    @property
    def session_callers(self) -> frozenset[str]:
        """Names of which a caller's certificate must carry one; empty: every name will do."""
        return frozenset(self.tls_session_callers.replace(",", " ").split())


_LOG_LEVELS = ("debug", "info", "warning", "error")

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def service_context(prefix: str) -> dict[str, object]:
    """Return the click settings of a service's command.

    Args:
        prefix: the environment variable of each option is PREFIX_OPTION.
    """
    return {
        "show_default": True,
        "auto_envvar_prefix": prefix,
        "help_option_names": ["-h", "--help"],
    }


def config_options(
    config_type: type[Any], *, choices: Mapping[str, Sequence[str]] | None = None
) -> Callable[[CommandT], CommandT]:
    """Add one option per field: `max_sessions` becomes --max-sessions, its docstring becomes the help.

    Options of fields whose default is a tuple may be given several times; those of a bool are flags.
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
                is_flag=kind is bool,
                multiple=isinstance(default, tuple),
                show_envvar=True,
                help=docs.get(entry.name, ""),
            )(command)
        return command

    return decorate


def parse_address(address: str, name: str) -> tuple[str, int]:
    """Split host:port or [IPv6 host]:port into host and port.

    Args:
        name: the field that holds the address.

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
    """Refuse fields that are not more than 0, or larger than any number is.

    Raises:
        InvalidArgumentError: naming the option.
    """
    for name in names:
        passed = bound_passed(getattr(config, name), 0, MAX_NUMBER, above=True)
        _require(not passed, config, name, passed)


def require_not_negative(config: object, *names: str) -> None:
    """Refuse fields that are less than 0, or larger than any number is.

    Raises:
        InvalidArgumentError: naming the option.
    """
    require_between(config, 0, MAX_NUMBER, *names)


def require_between(config: object, least: float, most: float, *names: str) -> None:
    """Refuse fields that are less than `least` or more than `most`.

    Raises:
        InvalidArgumentError: naming the option.
    """
    for name in names:
        passed = bound_passed(getattr(config, name), least, most)
        _require(not passed, config, name, passed)


def require_choice(config: object, name: str, choices: Sequence[str]) -> None:
    """Refuse a field whose value is not among `choices`.

    Raises:
        InvalidArgumentError: naming the option.
    """
    _require(getattr(config, name) in choices, config, name, f"one of {', '.join(choices)}")


def _require(is_right: bool, config: object, name: str, expected: str) -> None:
    if not is_right:
        option = f"--{name.replace('_', '-')}"
        raise InvalidArgumentError(f"{option} is {getattr(config, name)}; it must be {expected}.", field=name)


def _field_docs(config_type: type[Any]) -> dict[str, str]:
    """Return the string literal under each field, inherited ones included; Python does not keep them."""
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
