"""`specdec bench capacity`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from specdec.bench.capacity import APART, PLACEMENTS, Cluster, MethodCosts, simulate
from specdec.bench.capacity_costs import (
    DEFAULT_TRACE,
    Line,
    answer_shapes,
    method_costs,
    read_pass_line,
    read_trace,
)
from specdec.bench.capacity_report import (
    CapacityRow,
    best_sizes,
    document,
    recorded_rows,
    recorded_table,
    table,
)
from specdec.bench.terminal import EXISTING_FILE, CommaList, table_console
from specdec.bench.trace import Trace
from specdec.cli.numbers import integers, numbers
from specdec.cli.streams import show_json
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.methods import PLAIN


class _Points(click.ParamType[Any]):
    """A curve as SIZE:MS points, separated by commas."""

    name = "CURVE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the points."""
        try:
            points = [tuple(map(float, point.split(":"))) for point in value.split(",")]
            curve = [(size, time_ms) for size, time_ms in points]
            if not all(0 < number < math.inf for point in curve for number in point):
                raise ValueError
            return curve
        except ValueError:
            self.fail(f"{value!r} is not a list of points such as 1:25,64:30.", param, ctx)


@click.command("capacity")
@click.option(
    "--trace",
    "trace_path",
    type=EXISTING_FILE,
    default=DEFAULT_TRACE,
    show_default="a trace of the embedded model on two cores",
    help="The trace.json of `specdec bench trace`: costs, acceptance and lengths.",
)
@click.option(
    "--pass-costs",
    type=EXISTING_FILE,
    help="The pass.json of `specdec bench pass`: how passes get longer with their tokens.  "
    "[default: as the trace says]",
)
@click.option(
    "--methods",
    type=CommaList(str),
    default="",
    help="Methods with their size, as METHOD/NODES@K.  "
    "[default: none, and of each method of the trace the size that gives the most tokens]",
)
@click.option(
    "--verifiers",
    type=CommaList(int, 1),
    default="1",
    show_default=True,
    help="Numbers of verifiers, such as 1,2,4.",
)
@click.option(
    "--drafters",
    type=CommaList(int, 1),
    default="",
    help="Numbers of drafter services.  [default: as many as verifiers]",
)
@click.option("--gateways", type=integers(1), help="Number of gateways.  [default: as many as verifiers]")
@click.option(
    "--placement",
    type=click.Choice(PLACEMENTS),
    default=APART,
    show_default=True,
    help="apart: each service has a processor of its own. shared: drafters run on the verifiers' processors, "
    "and what computes at the same time takes turns. together: all drafters share one processor.",
)
@click.option(
    "--concurrency",
    "concurrencies",
    type=CommaList(int, 1),
    default="1,8",
    show_default=True,
    help="Requests under way at a time, for each verifier.",
)
@click.option(
    "--verifier-rtt-ms",
    type=numbers(0),
    default=0.0,
    show_default=True,
    help="Round-trip time that the network adds between gateway and verifier, milliseconds.",
)
@click.option(
    "--drafter-rtt-ms",
    type=numbers(0),
    default=0.0,
    show_default=True,
    help="The same between gateway and drafter.",
)
@click.option(
    "--state-bytes",
    type=integers(0),
    default=0,
    show_default=True,
    help="Target state that a verifier streams to a drafter, bytes per token; `specdec bench transport` says "
    "how much it is. 0: it is mapped, or none is read.",
)
@click.option(
    "--link-mbit-s",
    type=numbers(0),
    default=0.0,
    help="What each verifier's link carries of that, Mbit/s.  [default: any amount]",
)
@click.option("--prompt-tokens", type=integers(1), help="Length of the prompts.  [default: as recorded]")
@click.option("--answer-tokens", type=integers(2), help="Length of the answers.  [default: as recorded]")
@click.option(
    "--answers",
    "answers_per_client",
    type=integers(1),
    default=8,
    show_default=True,
    help="Answers to simulate for each request that is under way.",
)
@click.option(
    "--pass-ms",
    type=_Points(),
    help="Time of a pass by its tokens, as TOKENS:MS points, in place of what was measured.",
)
@click.option("--draft-ms", type=numbers(0), help="Time of a draft, in place of what was measured.")
@click.option(
    "--transport-ms",
    type=numbers(0),
    help="Time of gateway and gRPC for a pass, and again for a draft, in place of what was measured.",
)
@click.option(
    "--draft-growth",
    type=numbers(1, 2),
    default=1.4,
    show_default=True,
    help="By what a draft takes longer where twice as many requests draft in one step.",
)
@click.option(
    "--ahead",
    type=numbers(0, 1),
    default=0.0,
    show_default=True,
    help="Share of the rounds whose draft is ready before the pass ends, because the drafter guessed how the "
    "pass would end. No drafter does this; the option shows what it would bring.",
)
@click.option(
    "--price",
    type=numbers(0),
    default=0.0,
    help="Price of a processor (a GPU) per hour; adds the price of a million tokens.",
)
@click.option(
    "--recorded",
    is_flag=True,
    help="Predict what the trace itself recorded with several requests under way, from its rounds of single "
    "requests, and show both. Give --pass-costs as well: else the passes are those of the loaded rounds.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def capacity_command(
    trace_path: Path,
    pass_costs: Path | None,
    methods: tuple[str, ...],
    pass_ms: list[tuple[float, float]] | None,
    draft_ms: float | None,
    transport_ms: float | None,
    draft_growth: float,
    price: float,
    recorded: bool,
    as_json: bool,
    **system: Any,
) -> None:
    """Predict the tokens per second and the latency of a system, from what was measured of its parts.

    Rounds are simulated: they share passes, processors, links and gateways as those of the services do. The
    result is a prediction, as good as the costs that go in.

    \b
    Examples:
      specdec bench capacity --verifiers 1,2,4 --concurrency 1,8
      specdec bench capacity --trace DIR/trace.json --verifier-rtt-ms 2 --drafter-rtt-ms 2
      specdec bench capacity --pass-ms 1:25,64:30 --draft-ms 3 --verifiers 8 --price 2.5
    """
    if not system["verifiers"] or not system["concurrencies"]:
        raise InvalidArgumentError("--verifiers and --concurrency must be lists of integers such as 1,4,8.")
    trace = read_trace(trace_path)
    passes = Line(pass_ms) if pass_ms else read_pass_line(pass_costs) if pass_costs else None
    known = method_costs(trace, passes, draft_growth, keeps_own_pass=not pass_ms)
    costs = [_replaced(each, draft_ms, transport_ms) for each in _named(methods, known)]
    if recorded:
        found = list(recorded_rows(trace, costs, Cluster(placement=system["placement"])))
        _show(as_json, document(found, trace, price), recorded_table(found, trace))
    else:
        rows = list(_predict(trace, costs, every_size=bool(methods), **system))
        _show(as_json, document(rows, trace, price), table(rows, trace, price))


def _show(as_json: bool, found: dict[str, Any], shown: Table) -> None:
    if as_json:
        show_json(found)
    else:
        table_console().print(shown)


def _named(names: Sequence[str], costs: Sequence[MethodCosts]) -> list[MethodCosts]:
    """Return plain decoding and the methods of these names; all of them where no name is given."""
    known = [each.name for each in costs]
    if unknown := [name for name in names if name not in known]:
        raise InvalidArgumentError(
            f"The trace has no {unknown[0]!r}; it has {', '.join(known)}.", field="methods"
        )
    return [each for each in costs if not names or each.name in (PLAIN, *names)]


def _replaced(costs: MethodCosts, draft_ms: float | None, transport_ms: float | None) -> MethodCosts:
    if draft_ms is not None and costs.num_draft_tokens:
        costs = replace(costs, draft_ms=draft_ms)
    if transport_ms is not None:
        costs = replace(costs, verify_transport_ms=transport_ms, draft_transport_ms=transport_ms)
    return costs


def _predict(
    trace: Trace,
    costs: Sequence[MethodCosts],
    *,
    every_size: bool,
    verifiers: Sequence[int],
    drafters: Sequence[int],
    gateways: int | None,
    concurrencies: Sequence[int],
    prompt_tokens: int | None,
    answer_tokens: int | None,
    answers_per_client: int,
    **network: Any,
) -> Iterator[CapacityRow]:
    for num_verifiers, num_drafters, number in product(verifiers, drafters or (0,), concurrencies):
        cluster = Cluster(
            num_verifiers=num_verifiers,
            num_drafters=num_drafters or num_verifiers,
            num_gateways=gateways or num_verifiers,
            concurrency=number * num_verifiers,
            **network,
        )
        num_answers = answers_per_client * cluster.concurrency
        rows = []
        for each in costs:
            shapes = answer_shapes(trace, each.name, num_answers, prompt_tokens, answer_tokens)
            rows.append(CapacityRow(each.name, cluster, simulate(each, cluster, shapes)))
        yield from rows if every_size else best_sizes(rows)
