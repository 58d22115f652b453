"""The three services on this machine: their command lines, and a context manager that runs them.

with LocalSystem(drafters=["ngram"]) as system, Client(system.gateway) as client:
    print(client.generate("Hello").text)
"""

from __future__ import annotations

import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Self

from specdec.contract.errors import InvalidArgumentError, NotFoundError, UnavailableError
from specdec.local.processes import ServiceGroup, ServiceSpec, free_ports
from specdec.models.embedded import DEFAULT_MODEL
from specdec.models.extra import require_models_extra
from specdec.transport.http_extra import has_http_extra, require_http_extra

HOST = "127.0.0.1"

SERVICE_GROUP = "specdec.services"
"""The group of entry points that name the program of each service."""

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemConfig:
    """The models, drafters and settings that a local system runs with."""

    model: str = DEFAULT_MODEL
    """Target model: a local folder, a Hugging Face id, or "default" for the embedded model."""
    dtype: str = "bfloat16"
    """Weight data type of the target."""
    device: str = "cpu"
    """Device of the target, for example "cuda:0"."""
    drafters: tuple[str, ...] = ("ngram",)
    """Drafters to load: "ngram", "mtp[:MODEL]", "dflash[:MODEL]", "causal-lm:MODEL"."""
    target_state: str = "auto"
    """How drafters read the target's state: "auto", "handle" or "stream"."""
    threads: int = 0
    """CPU threads of each of the two model services; 0: one thread per core that they may use."""
    kv_cache_mib: float | None = None
    """Memory for the target's KV, MiB; None: the verifier's default."""
    gateway_port: int = 0
    """Port of the gateway; 0: any free port."""
    http_port: int = 0
    """Port of the gateway's HTTP interface, which takes the extra `http`; 0: any free port."""
    has_http: bool = True
    """Whether the gateway has its HTTP interface, where the extra is installed."""
    extra_args: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """More command-line arguments of each service, by its name: "gateway", "drafter" or "verifier"."""
    ready_timeout_s: float = 120.0
    """Seconds within which the services must become healthy."""

    @property
    def needs_default_model(self) -> bool:
        """Whether the system uses the embedded model, which must then be fetched first."""
        draft_models = [drafter.partition(":")[2] for drafter in self.drafters]
        return DEFAULT_MODEL in (self.model, *draft_models)


def default_drafters(model: str) -> tuple[str, ...]:
    """Return the drafters of a system that names none, best first: those that come with the model or need
    none.
    """
    return ("dflash", "mtp", "ngram-lm", "ngram") if model == DEFAULT_MODEL else ("ngram",)


def prepare_models(config: SystemConfig, report: Report) -> None:
    """Fetch the embedded model if the system uses it, so that two services do not both fetch it later.

    Raises:
        FailedPreconditionError: the packages that run models are not installed.
        UnavailableError: the model cannot be fetched.
    """
    require_models_extra()
    if config.needs_default_model:
        from specdec.models.embedded import prepare_default_model

        prepare_default_model(report)


def service_specs(config: SystemConfig) -> list[ServiceSpec]:
    """Return the services of a system, on free ports, in the order in which they stop.

    Raises:
        FailedPreconditionError: a port for HTTP is given, and the extra that it needs is not installed.
        InvalidArgumentError: both ports of the gateway are the same.
        UnavailableError: a port of the gateway is taken.
    """
    if config.http_port and config.http_port == config.gateway_port:
        raise InvalidArgumentError(
            f"--port and --http-port are both {config.http_port}; gRPC and HTTP need a port each. Pass "
            "another one, or 0 for any free port.",
            field="http_port",
        )
    for port in filter(None, (config.gateway_port, config.http_port)):
        _require_free(port)
    *ports, http_port = free_ports(4)
    gateway, drafter, verifier = (f"{HOST}:{port}" for port in (config.gateway_port or ports[0], *ports[1:]))
    # The target is for drafters that have to stream its state, and for those that ask what it is.
    drafter_args = ["--target", config.model, "--verifier-allow", verifier]
    drafter_args += [argument for name in config.drafters for argument in ("--drafter", name)]
    shared = ["--dtype", config.dtype, "--device", config.device, "--target-state", config.target_state]
    if config.threads:
        shared += ["--threads", str(config.threads)]
    gateway_args = ["--verifier", verifier, "--drafter", drafter, "--tokenizer", config.model]
    http = _http_address(config, http_port)
    if http:
        gateway_args += ["--http-listen", http]
    verifier_args = ["--model", config.model]
    if config.kv_cache_mib is not None:
        verifier_args += ["--kv-cache-mib", str(config.kv_cache_mib)]
    return [
        _spec(config, "gateway", gateway, gateway_args, http=f"http://{http}" if http else ""),
        _spec(config, "drafter", drafter, [*drafter_args, *shared]),
        _spec(config, "verifier", verifier, [*verifier_args, *shared]),
    ]


def _http_address(config: SystemConfig, free_port: int) -> str:
    """Return where the gateway serves HTTP; empty: what it needs for that is not installed."""
    if config.http_port:
        require_http_extra()
    is_there = config.has_http and has_http_extra()
    return f"{HOST}:{config.http_port or free_port}" if is_there else ""


def _spec(
    config: SystemConfig, name: str, address: str, arguments: Sequence[str], *, http: str = ""
) -> ServiceSpec:
    command = (sys.executable, "-m", service_module(name), "--listen", address, *arguments)
    return ServiceSpec(
        name=name,
        address=address,
        command=(*command, *config.extra_args.get(name, ())),
        health_service=health_service(name),
        http=http,
    )


def health_service(name: str) -> str:
    """Return the name by which the service "gateway", "verifier" or "drafter" tells of its health."""
    return f"specdec.v1.{name.capitalize()}Service"


def service_module(name: str) -> str:
    """Return the module that runs the service "gateway", "verifier" or "drafter".

    Raises:
        NotFoundError: the package is not installed, or only a part of it is.
    """
    programs = entry_points(group=SERVICE_GROUP, name=name)
    if not programs:
        raise NotFoundError(
            f"The {name} service is not installed here: the entry points {SERVICE_GROUP!r} do not have "
            f"{name!r}. Install the package again: pip install --editable '.[models]'",
            reason="SERVICE_NOT_INSTALLED",
        )
    return next(iter(programs)).module


def _require_free(port: int) -> None:
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        raise UnavailableError(
            f"Port {port} of {HOST} cannot be used ({error.strerror}); "
            "pass another --port or --http-port, or 0 for any free port.",
            reason="PORT_IN_USE",
        ) from error


class LocalSystem:
    """The three services, running while a `with` block runs. `specdec up` and `down` do not know of them.

    Args:
        model: target model; see `SystemConfig.model`.
        dtype: weight data type of the target.
        device: device of the target.
        drafters: drafters to load; see `SystemConfig.drafters`.
        extra_args: more arguments by service, for example `{"verifier": ["--kv-cache-mib", "64"]}`.
        log_dir: directory of the logs; None: a temporary directory, which is removed at the end.
        env: environment variables of the services, added to those of this process.
        ready_timeout_s: seconds within which the services must become healthy.
        report: receives one line of text per slow step.

    Raises:
        UnavailableError: a service did not start. Entering the block raises it, with the end of the log.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        dtype: str = "bfloat16",
        device: str = "cpu",
        drafters: Sequence[str] = ("ngram",),
        extra_args: Mapping[str, Sequence[str]] | None = None,
        log_dir: Path | None = None,
        env: Mapping[str, str] | None = None,
        ready_timeout_s: float = 120.0,
        report: Report = lambda _: None,
    ) -> None:
        self._config = SystemConfig(
            model=model, dtype=dtype, device=device, drafters=tuple(drafters), extra_args=extra_args or {}
        )
        self._report = report
        self._specs = service_specs(self._config)
        self.gateway, self.drafter, self.verifier = (spec.address for spec in self._specs)
        self.http = self._specs[0].http
        """URL of the gateway's HTTP interface. Empty: the extra `http` is not installed."""
        self.log_dir = log_dir
        self._keep_logs = log_dir is not None
        self._env = env
        self._ready_timeout_s = ready_timeout_s
        self._group: ServiceGroup | None = None

    @property
    def pids(self) -> dict[str, int]:
        """The pid of each service by name ("gateway", "drafter", "verifier"); empty outside the block."""
        return self._group.pids if self._group else {}

    def __enter__(self) -> Self:
        prepare_models(self._config, self._report)
        self.log_dir = self.log_dir or Path(tempfile.mkdtemp(prefix="specdec-"))
        group = ServiceGroup(self._specs, self.log_dir, env=self._env, ready_timeout_s=self._ready_timeout_s)
        group.start()
        self._group = group
        return self

    def __exit__(self, *_: object) -> None:
        if self._group:
            self._group.stop()
            self._group = None
        if self.log_dir and not self._keep_logs:
            shutil.rmtree(self.log_dir, ignore_errors=True)
            self.log_dir = None
