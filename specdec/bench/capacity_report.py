"""The rows of `specdec bench capacity`, and the table and the document they become."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby, product
from statistics import median
from typing import Any

from rich.table import Table

from specdec.bench.capacity import Cluster, MethodCosts, Prediction, simulate
from specdec.bench.capacity_costs import answer_shapes, num_under_way, recorded_round_ms
from specdec.bench.provenance import collect
from specdec.bench.records import METHOD_SEPARATOR, NODES_SEPARATOR
from specdec.bench.trace import Trace

_S_PER_HOUR = 3600
_NEAR = 0.15
"""How far off a prediction may be and still count as near."""


@dataclass(frozen=True, slots=True)
class CapacityRow:
    """What a system gives with one method."""

    method: str
    cluster: Cluster
    prediction: Prediction

    def price(self, price_per_hour: float) -> float:
        """Return the price of a million tokens."""
        price_per_s = price_per_hour * self.cluster.num_processors / _S_PER_HOUR
        return 1e6 * price_per_s / self.prediction.tokens_per_s


def best_sizes(rows: Sequence[CapacityRow]) -> Iterator[CapacityRow]:
    for _, sizes in groupby(
        rows, lambda row: re.split(f"[{NODES_SEPARATOR}{METHOD_SEPARATOR}]", row.method)[0]
    ):
        yield max(sizes, key=lambda row: row.prediction.tokens_per_s)


@dataclass(frozen=True, slots=True)
class RecordedRow:
    """What rounds of a trace took under load, and what is predicted from its rounds of single requests."""

    method: str
    concurrency: int
    """Requests under way at a time."""
    predicted_ms: float
    """Time of a round."""
    recorded_ms: float

    @property
    def ratio(self) -> float:
        """Predicted over recorded."""
        return self.predicted_ms / self.recorded_ms


def recorded_rows(trace: Trace, costs: Sequence[MethodCosts], cluster: Cluster) -> Iterator[RecordedRow]:
    """Yield a row for each method and load of a trace but the least, which the costs are of."""
    for each, load in product(costs, sorted(trace.arms[0].costs)[1:]):
        number = num_under_way(trace, load)
        shapes = answer_shapes(trace, each.name, len(trace.arms[0].accepted), None, None)
        found = simulate(each, replace(cluster, concurrency=number), shapes)
        round_ms = found.tpot_ms * found.acceptance_length
        yield RecordedRow(each.name, number, round_ms, recorded_round_ms(trace, each.name, load))


def recorded_table(rows: Sequence[RecordedRow], trace: Trace) -> Table:
    """Return predicted and recorded times of rounds as a table, with the median of their ratios."""
    ratios = sorted(row.ratio for row in rows)
    near = sum(abs(ratio - 1) <= _NEAR for ratio in ratios)
    summary = f"{near} of {len(ratios)} within {_NEAR:.0%}, median {median(ratios):.2f}. {_source(trace)}"
    result = Table(title="Predicted from single requests, and recorded", caption=summary)
    for head in ("method", "requests", "predicted ms a round", "recorded", "ratio"):
        result.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        times_ms = (f"{row.predicted_ms:.1f}", f"{row.recorded_ms:.1f}")
        result.add_row(row.method, str(row.concurrency), *times_ms, f"{row.ratio:.2f}")
    return result


def _source(trace: Trace) -> str:
    return f"Costs of {trace.provenance.get('model')} on {trace.provenance.get('hardware', {}).get('cpu')}"


def document(
    rows: Sequence[CapacityRow] | Sequence[RecordedRow], trace: Trace, price: float
) -> dict[str, Any]:
    """Return the rows with where they come from, for JSON."""
    return {
        "provenance": collect(),
        "trace": trace.provenance,
        "rows": [
            asdict(row)
            if isinstance(row, RecordedRow)
            else {"method": row.method, **asdict(row.cluster), **asdict(row.prediction)}
            | ({"price_per_million_tokens": row.price(price)} if price else {})
            for row in rows
        ],
    }


def table(rows: Sequence[CapacityRow], trace: Trace, price: float) -> Table:
    """Return the rows as a table, with a column for the price of a million tokens where there is a price."""
    result = Table(title="Prediction", caption=_source(trace))
    heads = ["verifiers", "drafters", "requests", "method", "tok/s", "tau", "TTFT ms", "TPOT ms"]
    heads += ["answer ms", "p90", "verifier busy", "drafter busy"]
    for head in heads + (["price of 1M tokens"] if price else []):
        result.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        cluster, found = row.cluster, row.prediction
        result.add_row(
            *map(str, (cluster.num_verifiers, cluster.num_drafters, cluster.concurrency)),
            row.method,
            f"{found.tokens_per_s:.1f}",
            f"{found.acceptance_length:.2f}",
            *(f"{ms:.1f}" for ms in (found.ttft_ms, found.tpot_ms, found.total_ms, found.total_ms_p90)),
            f"{found.verifier_busy:.0%}",
            f"{found.drafter_busy:.0%}",
            *([f"{row.price(price):.3f}"] if price else []),
        )
    return result
