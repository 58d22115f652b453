"""The rows of `specdec bench capacity`, and the table and the document they become."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from rich.table import Table

from specdec.bench.capacity import Cluster, Prediction
from specdec.bench.provenance import collect
from specdec.bench.records import METHOD_SEPARATOR, NODES_SEPARATOR
from specdec.bench.trace import Trace

_S_PER_HOUR = 3600


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


def document(rows: Sequence[CapacityRow], trace: Trace, price: float) -> dict[str, Any]:
    """Return the rows with where they come from, for JSON."""
    return {
        "provenance": collect(),
        "trace": trace.provenance,
        "rows": [
            {"method": row.method, **asdict(row.cluster), **asdict(row.prediction)}
            | ({"price_per_million_tokens": row.price(price)} if price else {})
            for row in rows
        ],
    }


def table(rows: Sequence[CapacityRow], trace: Trace, price: float) -> Table:
    """Return the rows as a table, with a column for the price of a million tokens where there is a price."""
    source = f"Costs of {trace.provenance.get('model')} on {trace.provenance.get('hardware', {}).get('cpu')}"
    result = Table(title="Prediction", caption=source)
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
