"""Predictions of the capacity model beside measurements, on services that are pinned to cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from rich.table import Table

from specdec.bench import verify_pass
from specdec.bench.capacity import TOGETHER, Cluster, MethodCosts, simulate
from specdec.bench.capacity_costs import Line, answer_shapes, method_costs, rising
from specdec.bench.experiment import BenchConfig, run_experiment
from specdec.bench.records import METHOD_SEPARATOR, RequestRecord
from specdec.bench.run import PROMPTS_PER_WORKER
from specdec.bench.stats import OVERALL, Row, compute_rows
from specdec.bench.trace import Trace, make_trace
from specdec.bench.verify_pass import PassFigures
from specdec.cli.streams import report
from specdec.contract.methods import PLAIN
from specdec.local.launcher import SystemConfig, prepare_models, service_specs
from specdec.local.processes import ServiceGroup, ServiceSpec, free_ports
from specdec.models.embedded import DEFAULT_MODEL

_PASS_REPEATS = 12
_CONTEXT_TOKENS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """What is compared."""

    model: str = DEFAULT_MODEL
    """The verifier's model, as its command line names it."""
    dtype: str = "bfloat16"
    """Data type of the model."""
    methods: tuple[str, ...] = ("ngram-lm", "dflash")
    draft_depth: int = 4
    """Draft tokens of a round in a row (K)."""
    concurrencies: tuple[int, ...] = (2, 4)
    """Numbers of requests under way beside 1, at which the costs are measured."""
    limit: int = 4
    """Number of prompts."""
    max_new_tokens: int = 32
    repeats: int = 8
    """How often costs and speeds are measured, in turn."""


@dataclass(frozen=True, slots=True)
class CheckRow:
    """What is predicted and what was measured for a method on one system."""

    method: str
    num_drafters: int
    concurrency: int
    predicted_tokens_per_s: float
    tokens_per_s: list[float]
    """Of each repeat."""
    predicted_tpot_ms: float
    """Median time per output token after the first."""
    tpot_ms: list[float]
    """Of each repeat."""

    @property
    def speed_ratio(self) -> float:
        """Predicted over measured tokens a second, the latter the median of the repeats."""
        return self.predicted_tokens_per_s / median(self.tokens_per_s)

    @property
    def tpot_ratio(self) -> float:
        """The same of the time per token."""
        return self.predicted_tpot_ms / median(self.tpot_ms)


@dataclass(frozen=True, slots=True)
class _Services:
    verifier: str
    gateways: dict[int, str]
    """By the number of their drafters."""


System = tuple[int, int]
"""The number of drafters and of requests under way."""
_ALONE: System = (1, 1)
"""Where costs are measured."""


def check(
    config: CheckConfig, directory: Path, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[CheckRow]:
    """Measure costs with one request and speeds with several and with two drafters, and predict the latter.

    A verifier runs on the first core that this process may use, and two drafters and two gateways on the
    last one, with one thread each. One gateway knows one drafter, the other both. What others do on the
    machine changes everything, so costs and speeds are measured in turn, and medians are compared.

    Args:
        on_progress: called with the number of repeats done and of all repeats.

    Raises:
        SpecdecError: a service did not start, or requests failed.
    """
    passes: list[PassFigures] = []
    records: dict[System, list[list[RequestRecord]]] = {}
    with _pinned_services(config) as services:
        for repeat in range(config.repeats):
            passes.append(_measure_passes(config, services.verifier))
            for system in _systems(config):
                folder = directory / f"repeat-{repeat + 1}" / "drafters-{}-requests-{}".format(*system)
                measured = _measure(config, services, system, folder, is_first=not repeat)
                records.setdefault(system, []).append(measured)
            on_progress(repeat + 1, config.repeats)
    return _rows(config, passes, records)


def _systems(config: CheckConfig) -> list[System]:
    return [_ALONE, *((drafters, number) for drafters in (1, 2) for number in config.concurrencies)]


def _rows(
    config: CheckConfig,
    passes: Sequence[PassFigures],
    records: Mapping[System, Sequence[Sequence[RequestRecord]]],
) -> list[CheckRow]:
    trace = make_trace({}, [record for each in records[_ALONE] for record in each])
    return [
        _compare(system, costs, trace, config.limit, [_row(each, costs.name) for each in repeats])
        for system, repeats in records.items()
        for costs in method_costs(trace, _line(passes))
    ]


def _compare(
    system: System, costs: MethodCosts, trace: Trace, num_prompts: int, measured: Sequence[Row]
) -> CheckRow:
    """Simulate what was measured: in blocks, at whose ends workers wait for the last answer."""
    num_drafters, concurrency = system
    cluster = Cluster(num_drafters=num_drafters, placement=TOGETHER, concurrency=concurrency)
    answers = answer_shapes(trace, costs.name, num_prompts, None, None)
    size = 1 if concurrency == 1 else PROMPTS_PER_WORKER * concurrency
    blocks = [answers[start : start + size] for start in range(0, num_prompts, size)]
    predictions = [simulate(costs, cluster, block) for block in blocks]
    num_tokens = sum(answer.num_tokens for answer in answers)
    return CheckRow(
        costs.name,
        num_drafters,
        concurrency,
        1000 * num_tokens / sum(prediction.wall_ms for prediction in predictions),
        [row.tokens_per_s or 0.0 for row in measured],
        median(prediction.tpot_ms for prediction in predictions),
        [row.tpot_ms_p50 or 0.0 for row in measured],
    )


def _row(records: Sequence[RequestRecord], method: str) -> Row:
    rows = compute_rows(records)
    return next(row for row in rows if row.category == OVERALL and row.method.replace("/0", "") == method)


def _measure_passes(config: CheckConfig, verifier: str) -> PassFigures:
    sizes = {
        1,
        *config.concurrencies,
        *(number * (config.draft_depth + 1) for number in config.concurrencies),
    }
    return verify_pass.measure(
        verifier,
        sizes=sorted(sizes),
        context_tokens=_CONTEXT_TOKENS,
        repeats=_PASS_REPEATS,
        model=config.model,
    )


def _measure(
    config: CheckConfig, services: _Services, system: System, directory: Path, *, is_first: bool
) -> list[RequestRecord]:
    num_drafters, concurrency = system
    bench = BenchConfig(
        methods=config.methods,
        draft_depth=(config.draft_depth,),
        draft_nodes=(0,),
        concurrencies=(concurrency,),
        limit=config.limit,
        max_new_tokens=config.max_new_tokens,
        num_warmup_prompts=int(is_first),
    )
    outcome = run_experiment(bench, bench.load_prompts(), services.gateways[num_drafters], directory)
    return [_named(record, config) for record in outcome.records]


def _named(record: RequestRecord, config: CheckConfig) -> RequestRecord:
    """Name the size, which a run of a single size leaves out."""
    if record.method == PLAIN:
        return record
    return replace(record, method=f"{record.method}/0{METHOD_SEPARATOR}{config.draft_depth}")


def _line(figures: Sequence[PassFigures]) -> Line:
    """Return what passes take by their tokens: medians over the repeats."""
    times_ms: dict[int, list[float]] = {}
    for each in figures:
        for row in each.rows:
            times_ms.setdefault(row.num_tokens, []).append(row.compute_ms_p50)
    return rising([(size, median(times)) for size, times in times_ms.items()])


@contextmanager
def _pinned_services(config: CheckConfig) -> Iterator[_Services]:
    cores = sorted(os.sched_getaffinity(0))
    system = SystemConfig(
        model=config.model,
        dtype=config.dtype,
        drafters=config.methods,
        threads=1,
        has_http=False,  # two gateways have the same arguments
    )
    prepare_models(system, report)
    gateway, drafter, verifier = service_specs(system)
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
            _pin(service.pid, {cores[0] if service.spec is verifier else cores[-1]})
        _pin(os.getpid(), {cores[-1]})
        try:
            yield _Services(verifier.address, {1: gateway.address, 2: second_gateway.address})
        finally:
            _pin(os.getpid(), set(cores))


def _moved(spec: ServiceSpec, address: str) -> ServiceSpec:
    """Return a second service like the first, at an address of its own."""
    command = tuple(address if word == spec.address else word for word in spec.command)
    return replace(spec, name=f"{spec.name}-2", address=address, command=command)


def _pin(pid: int, cores: set[int]) -> None:
    """Let all threads of a process, and those that they start, run on these cores alone."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):  # the thread has ended meanwhile
            os.sched_setaffinity(int(thread.name), cores)


def table(rows: Sequence[CheckRow]) -> Table:
    """Return predictions and medians over the repeats, with the range of what was measured."""
    result = Table(title="Predicted and measured")
    speeds = (
        "predicted tok/s",
        "measured tok/s",
        "of repeats",
        "ratio",
        "predicted TPOT ms",
        "measured",
        "ratio",
    )
    for head in ("method", "drafters", "requests", *speeds):
        result.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        result.add_row(
            *map(str, (row.method, row.num_drafters, row.concurrency)),
            f"{row.predicted_tokens_per_s:.1f}",
            f"{median(row.tokens_per_s):.1f}",
            f"{min(row.tokens_per_s):.1f} to {max(row.tokens_per_s):.1f}",
            f"{row.speed_ratio:.2f}",
            f"{row.predicted_tpot_ms:.1f}",
            f"{median(row.tpot_ms):.1f}",
            f"{row.tpot_ratio:.2f}",
        )
    return result
