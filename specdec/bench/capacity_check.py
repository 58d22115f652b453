"""Predictions of the capacity model beside measurements, on services that are pinned to cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.table import Table

from specdec.bench import verify_pass
from specdec.bench.capacity import TOGETHER, Cluster, MethodCosts, simulate
from specdec.bench.capacity_costs import answer_shapes, method_costs, rising
from specdec.bench.experiment import BenchConfig, run_experiment
from specdec.bench.records import METHOD_SEPARATOR, RequestRecord
from specdec.bench.run import PROMPTS_PER_WORKER
from specdec.bench.stats import OVERALL, Row, compute_rows
from specdec.bench.trace import Trace, make_trace
from specdec.bench.verify_pass import PassFigures
from specdec.contract.methods import PLAIN
from specdec.local.launcher import SystemConfig, prepare_models, service_specs
from specdec.local.processes import ServiceGroup, ServiceSpec, free_ports

_PASS_REPEATS = 12
_CONTEXT_TOKENS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """What is compared."""

    methods: tuple[str, ...] = ("ngram-lm", "dflash")
    draft_depth: int = 4
    """Draft tokens of a round in a row (K)."""
    concurrencies: tuple[int, ...] = (1, 2, 4)
    """Numbers of requests under way; the costs are measured with one."""
    limit: int = 8
    """Number of prompts."""
    max_new_tokens: int = 48
    repeats: int = 3
    """How often costs and speeds are measured, in turn."""


@dataclass(frozen=True, slots=True)
class CheckRow:
    """A prediction and a measurement, in the same repeat."""

    repeat: int
    method: str
    num_drafters: int
    concurrency: int
    predicted_tokens_per_s: float
    tokens_per_s: float
    predicted_tpot_ms: float
    """Median time per output token after the first."""
    tpot_ms: float

    @property
    def ratio(self) -> float:
        """Predicted over measured tokens a second."""
        return self.predicted_tokens_per_s / self.tokens_per_s


@dataclass(frozen=True, slots=True)
class _Services:
    verifier: str
    gateways: dict[int, str]
    """By the number of their drafters."""


def check(
    config: CheckConfig, directory: Path, report: Callable[[str], None] = lambda line: None
) -> list[CheckRow]:
    """Measure costs with one request, predict speeds with several and with two drafters, and measure them.

    A verifier runs on the first core that this process may use, and two drafters and two gateways on the
    last one, with one thread each. One gateway knows one drafter, the other both.

    Raises:
        SpecdecError: a service did not start, or requests failed.
    """
    rows = []
    with _pinned_services(config.methods, report) as services:
        for repeat in range(1, config.repeats + 1):
            for row in _check_once(config, services, repeat, directory):
                report(
                    f"{row.repeat} {row.method:12} drafters {row.num_drafters} requests {row.concurrency}: "
                    f"predicted {row.predicted_tokens_per_s:.1f}, measured {row.tokens_per_s:.1f} tokens/s"
                )
                rows.append(row)
    return rows


def _check_once(config: CheckConfig, services: _Services, repeat: int, directory: Path) -> Iterator[CheckRow]:
    passes = verify_pass.measure(
        services.verifier,
        sizes=_sizes(config),
        context_tokens=_CONTEXT_TOKENS,
        repeats=_PASS_REPEATS,
    )
    alone = _measure(config, services.gateways[1], 1, directory / f"costs-{repeat}")
    trace = make_trace({}, [_named(record, config) for record in alone])
    costs = {each.name: each for each in method_costs(trace, _line(passes))}
    for num_drafters, gateway in services.gateways.items():
        for concurrency in config.concurrencies:
            folder = directory / f"{num_drafters}-drafters-{concurrency}-requests-{repeat}"
            records = _measure(config, gateway, concurrency, folder)
            for row in compute_rows([_named(record, config) for record in records]):
                if row.category == OVERALL:
                    cluster = Cluster(num_drafters=num_drafters, placement=TOGETHER, concurrency=concurrency)
                    yield _compare(repeat, row, costs[_short(row.method)], cluster, trace)


def _compare(repeat: int, row: Row, costs: MethodCosts, cluster: Cluster, trace: Trace) -> CheckRow:
    """Simulate what was measured: in blocks, at whose ends workers wait for the last answer."""
    num_prompts = len(trace.arms[0].accepted)
    answers = answer_shapes(trace, costs.name, num_prompts, None, None)
    size = 1 if cluster.concurrency == 1 else PROMPTS_PER_WORKER * cluster.concurrency
    blocks = [
        (block, simulate(costs, cluster, block))
        for start in range(0, num_prompts, size)
        if (block := answers[start : start + size])
    ]
    num_tokens = sum(answer.num_tokens for answer in answers)
    assert row.tokens_per_s is not None
    assert row.tpot_ms_p50 is not None
    return CheckRow(
        repeat,
        costs.name,
        cluster.num_drafters,
        cluster.concurrency,
        1000 * num_tokens / sum(prediction.wall_ms for _, prediction in blocks),
        row.tokens_per_s,
        median(prediction.tpot_ms for _, prediction in blocks),
        row.tpot_ms_p50,
    )


def _measure(config: CheckConfig, gateway: str, concurrency: int, directory: Path) -> list[RequestRecord]:
    bench = BenchConfig(
        methods=config.methods,
        draft_depth=(config.draft_depth,),
        draft_nodes=(0,),
        concurrencies=(concurrency,),
        limit=config.limit,
        max_new_tokens=config.max_new_tokens,
    )
    return run_experiment(bench, bench.load_prompts(), gateway, directory).records


def _named(record: RequestRecord, config: CheckConfig) -> RequestRecord:
    """Name the size, which a run of a single size leaves out."""
    if record.method == PLAIN:
        return record
    return replace(record, method=f"{record.method}/0{METHOD_SEPARATOR}{config.draft_depth}")


def _short(method: str) -> str:
    return method.replace("/0", "")


def _sizes(config: CheckConfig) -> list[int]:
    largest = max(config.concurrencies)
    return sorted({1, largest, *(number * (config.draft_depth + 1) for number in config.concurrencies)})


def _line(figures: PassFigures) -> Callable[[float], float]:
    return rising([(row.num_tokens, row.compute_ms_p50) for row in figures.rows])


@contextmanager
def _pinned_services(methods: Sequence[str], report: Callable[[str], None]) -> Iterator[_Services]:
    cores = sorted(os.sched_getaffinity(0))
    config = SystemConfig(drafters=tuple(methods), threads=1)
    prepare_models(config, report)
    gateway, drafter, verifier = service_specs(config)
    second_drafter, second_gateway = (
        _moved(spec, f"127.0.0.1:{port}")
        for spec, port in zip((drafter, gateway), free_ports(2), strict=True)
    )
    both = f"{drafter.address},{second_drafter.address}"
    second_gateway = replace(
        second_gateway,
        command=tuple(both if word == drafter.address else word for word in second_gateway.command),
    )
    specs = [gateway, second_gateway, drafter, second_drafter, verifier]
    with TemporaryDirectory(prefix="specdec-") as logs, ServiceGroup(specs, Path(logs)) as group:
        for service in group.services:
            _pin(service.pid, cores[0] if service.spec is verifier else cores[-1])
        _pin(os.getpid(), cores[-1])
        yield _Services(verifier.address, {1: gateway.address, 2: second_gateway.address})


def _moved(spec: ServiceSpec, address: str) -> ServiceSpec:
    """Return a second service like the first, at an address of its own."""
    command = tuple(address if word == spec.address else word for word in spec.command)
    return replace(spec, name=f"{spec.name}-2", address=address, command=command)


def _pin(pid: int, core: int) -> None:
    """Let all threads of a process, and those that they start, run on one core alone."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {core})


def table(rows: Sequence[CheckRow]) -> Table:
    """Return the medians over the repeats, with the range of the ratios."""
    result = Table(title="Predicted and measured, medians over the repeats")
    heads = (
        "method",
        "drafters",
        "requests",
        "predicted tok/s",
        "measured tok/s",
        "ratio",
        "of repeats",
        "TPOT",
    )
    for head in heads:
        result.add_column(head, justify="left" if head == "method" else "right")
    for key in dict.fromkeys((row.method, row.num_drafters, row.concurrency) for row in rows):
        same = [row for row in rows if (row.method, row.num_drafters, row.concurrency) == key]
        ratios = [row.ratio for row in same]
        result.add_row(
            *map(str, key),
            f"{median(row.predicted_tokens_per_s for row in same):.1f}",
            f"{median(row.tokens_per_s for row in same):.1f}",
            f"{median(ratios):.2f}",
            f"{min(ratios):.2f} to {max(ratios):.2f}",
            f"{median(row.predicted_tpot_ms / row.tpot_ms for row in same):.2f}",
        )
    return result
