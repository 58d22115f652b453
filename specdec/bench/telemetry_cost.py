"""Measures what telemetry costs: systems with and without it answer the same prompts in turn.

Two systems have none: their ratio, which should be 1, shows how much of the other ratio is chance.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from urllib.request import urlopen

import grpc
import psutil

from specdec.bench.backends import GatewayBackend
from specdec.bench.records import Contender, RequestRecord
from specdec.bench.run import run, schedule, warm_up
from specdec.bench.telemetry_report import CONTROL, OFF, ON, SERVICES, Cost, RequestTime
from specdec.bench.workload import Prompt
from specdec.client import AsyncClient, GenerateOptions
from specdec.contract.errors import InternalError, UnavailableError
from specdec.contract.methods import drafters_of
from specdec.local.launcher import HOST, LocalSystem
from specdec.local.processes import free_ports

_NUM_WARM_UPS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetryConfig:
    """What is measured."""

    model: str = "default"
    """Model to start."""
    dtype: str = "bfloat16"
    """Data type of the model."""
    device: str = "cpu"
    """Device of the model."""
    method: str = "ngram"
    """Method of the requests, whose drafters are started."""
    draft_depth: int = 3
    """K, the same in every round, so that all systems do the same work."""
    max_new_tokens: int = 64
    """Most tokens of an answer."""
    restarts: int = 4
    """How often all systems are started: processes of the same code differ by where their memory lies."""
    scrape_interval_s: float = 15.0
    """Time between two scrapes of each endpoint, seconds."""

    @property
    def drafters(self) -> tuple[str, ...]:
        """The drafters to start."""
        return drafters_of(self.method) or ("ngram",)

    @property
    def options(self) -> GenerateOptions:
        """The options of every request."""
        return GenerateOptions(
            method=self.method,
            draft_depth=self.draft_depth,
            max_new_tokens=self.max_new_tokens,
            ignore_eos=True,
        )


class Sink(grpc.GenericRpcHandler):
    """An OTLP collector that counts the exports it receives, and drops them."""

    def __init__(self) -> None:
        self.num_exports = 0

    def service(self, call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        """Handle every method: an empty message is a valid answer to all methods of OTLP."""
        return grpc.unary_unary_rpc_method_handler(self._export)

    def _export(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.num_exports += 1
        return b""


def measure(
    config: TelemetryConfig,
    prompts: Sequence[Prompt],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[RequestTime], list[Cost]]:
    """Run every prompt on every system, `restarts` times.

    Args:
        on_progress: called with the number of restarts done and of all restarts.

    Returns:
        Every request, and the CPU time of each service meanwhile.

    Raises:
        UnavailableError: a service did not start, or a request failed.
        InternalError: the system with telemetry exported nothing, so the figures would mean nothing.
    """
    samples: list[RequestTime] = []
    costs: list[Cost] = []
    for restart in range(config.restarts):
        sink = Sink()
        with (
            _listening(sink) as endpoint,
            _systems(config, restart, endpoint) as (systems, metrics),
            _scraped(metrics, config.scrape_interval_s),
        ):
            processes = [
                (arm, service, psutil.Process(system.pids[service]))
                for arm, system in systems.items()
                for service in SERVICES
            ]
            before = [_cpu_ms(process) for _, _, process in processes]
            gateways = {arm: system.gateway for arm, system in systems.items()}
            records = asyncio.run(_ask_all(config, prompts, gateways))
            spent = [_cpu_ms(process) - then for (_, _, process), then in zip(processes, before, strict=True)]
        if not sink.num_exports:
            raise InternalError("The system with telemetry sent nothing to its collector.")
        samples += [_sample(restart, record) for record in records]
        num_tokens = (len(prompts) + _NUM_WARM_UPS) * config.max_new_tokens
        costs += [
            Cost(restart, arm, service, cpu_ms / num_tokens)
            for (arm, service, _), cpu_ms in zip(processes, spent, strict=True)
        ]
        on_progress(restart + 1, config.restarts)
    return samples, costs


def _cpu_ms(process: psutil.Process) -> float:
    times = process.cpu_times()
    return 1e3 * (times.user + times.system)


@contextmanager
def _listening(sink: Sink) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(max_workers=4), handlers=[sink])
    port = server.add_insecure_port(f"{HOST}:0")
    server.start()
    try:
        yield f"http://{HOST}:{port}"
    finally:
        server.stop(grace=1).wait()


@contextmanager
def _systems(
    config: TelemetryConfig, restart: int, endpoint: str
) -> Iterator[tuple[dict[str, LocalSystem], list[str]]]:
    """Start the systems, in another order each time; yield them by arm, and the metrics addresses of ON."""
    metrics = [f"{HOST}:{port}" for port in free_ports(len(SERVICES))]
    arms = [OFF, CONTROL, ON]
    systems: dict[str, LocalSystem] = {}
    with ExitStack() as stack:
        for arm in arms[restart % 3 :] + arms[: restart % 3]:
            system = LocalSystem(
                config.model,
                dtype=config.dtype,
                device=config.device,
                drafters=config.drafters,
                extra_args=_metrics_arguments(metrics) if arm == ON else {},
                env=_environment(endpoint if arm == ON else ""),
            )
            systems[arm] = stack.enter_context(system)
        yield systems, metrics


def _metrics_arguments(addresses: Sequence[str]) -> Mapping[str, Sequence[str]]:
    return {
        service: ("--metrics-listen", address) for service, address in zip(SERVICES, addresses, strict=True)
    }


def _environment(endpoint: str) -> dict[str, str]:
    """Return the variables that turn OTLP on or off, whatever the caller's own variables are."""
    if not endpoint:
        return {"OTEL_SDK_DISABLED": "true"}
    return {
        "OTEL_SDK_DISABLED": "false",
        "OTEL_TRACES_EXPORTER": "otlp",
        "OTEL_METRICS_EXPORTER": "otlp",
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
    }


@contextmanager
def _scraped(addresses: Sequence[str], interval_s: float) -> Iterator[None]:
    """Read the endpoints within the block, at once and then in intervals, as Prometheus does.

    Raises:
        UnavailableError: an endpoint cannot be read.
    """
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(interval_s):
            with suppress(OSError):  # a system that is gone fails the run's own requests as well
                _read_all(addresses)

    _read_all(addresses)
    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _read_all(addresses: Sequence[str]) -> None:
    for address in addresses:
        with urlopen(f"http://{address}/metrics", timeout=10) as response:
            if b"specdec_" not in response.read():
                raise UnavailableError(f"No metrics at {address}.")


async def _ask_all(
    config: TelemetryConfig, prompts: Sequence[Prompt], gateways: Mapping[str, str]
) -> list[RequestRecord]:
    async with AsyncExitStack() as stack:
        contenders = [
            Contender(
                arm,
                GatewayBackend(await stack.enter_async_context(AsyncClient(gateways[arm])), config.options),
            )
            for arm in (OFF, CONTROL, ON)
        ]
        await warm_up(contenders, prompts[:_NUM_WARM_UPS])
        return await run(list(schedule(contenders, prompts, [1])))


def _sample(restart: int, record: RequestRecord) -> RequestTime:
    if record.answer is None or record.answer.tpot_ms is None:
        raise UnavailableError(f"A request failed or was too short to time: {record.error or 'one token'}")
    return RequestTime(restart, record.method, record.question_id, record.answer.tpot_ms)
