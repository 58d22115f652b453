"""The results of an offered load: results.json, table.md, load.png, and tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from specdec.bench.load import LoadRecord
from specdec.bench.load_stats import CallerRow, LoadRow, Spread
from specdec.bench.plots import new_figure
from specdec.bench.report import RESULTS_FILE, TABLE_FILE, cell, markdown_table

PLOT_FILE = "load.png"


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the system answers while it always has as much to do as `concurrency` requests are."""

    answers_per_s: float
    """Answers per second."""
    tokens_per_s: float
    """Their tokens per second."""


@dataclass(frozen=True, slots=True)
class LoadOutcome:
    """A finished run."""

    rows: list[LoadRow]
    caller_rows: list[CallerRow]
    capacity: Capacity | None
    """The measured capacity; None: rates were given."""
    records: list[LoadRecord]
    """Every request of every load."""
    provenance: dict[str, Any]


def write(directory: Path, outcome: LoadOutcome) -> None:
    """Write results.json (provenance, capacity, rows, caller_rows, errors) and table.md."""
    results = {
        "provenance": outcome.provenance,
        "capacity": asdict(outcome.capacity) if outcome.capacity else None,
        "rows": [asdict(row) for row in outcome.rows],
        "caller_rows": [asdict(row) for row in outcome.caller_rows],
        "errors": _errors(outcome.records),
    }
    (directory / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tables = (_load_cells(outcome.rows), _caller_cells(outcome.caller_rows))
    (directory / TABLE_FILE).write_text("\n".join(markdown_table(*table) for table in tables))


def _errors(records: Sequence[LoadRecord]) -> dict[str, int]:
    """Return how often each error came, the commonest first."""
    counts: dict[str, int] = {}
    for record in records:
        if record.error:
            counts[record.error] = counts.get(record.error, 0) + 1
    return dict(sorted(counts.items(), key=lambda each: -each[1]))


def tables(outcome: LoadOutcome) -> list[Table]:
    """Return the tables for the terminal."""
    return [
        _table(
            "Offered load (late: deadline passed, begun: after its first token)", *_load_cells(outcome.rows)
        ),
        _table("Callers", *_caller_cells(outcome.caller_rows)),
    ]


def _table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for head in heads:
        table.add_column(head, justify="left" if head == "caller" else "right")
    for line in lines:
        table.add_row(*line)
    return table


def _load_cells(rows: Sequence[LoadRow]) -> tuple[list[str], list[list[str]]]:
    """Return heads and cells; times are p50 / p95 / p99."""
    heads = ["load", "offered/s", "offered", "admitted", "answered", "refused (told when)"]
    heads += ["late (begun)", "failed", "goodput tok/s", "waited s", "TTFT s", "total s"]
    return heads, [
        [
            f"{row.multiple:g}x" if row.multiple else "-",
            f"{row.offered_per_s:.2f}",
            str(row.num_offered),
            str(row.num_admitted),
            str(row.num_answered),
            f"{row.num_refused} ({row.num_told_when})",
            f"{row.num_late} ({row.num_late_begun})",
            str(row.num_failed),
            f"{row.goodput_tokens_per_s:.1f}",
            *map(_spread, (row.waited_s, row.ttft_s, row.total_s)),
        ]
        for row in rows
    ]


def _spread(spread: Spread) -> str:
    return " / ".join("-" if value is None else f"{value:.1f}" for value in asdict(spread).values())


def _caller_cells(rows: Sequence[CallerRow]) -> tuple[list[str], list[list[str]]]:
    heads = ["offered/s", "caller", "offered", "answered", "refused", "answered share", "share of answers"]
    return [*heads, "longest wait s"], [
        [
            f"{row.offered_per_s:.2f}",
            row.caller,
            str(row.num_offered),
            str(row.num_answered),
            str(row.num_refused),
            cell(row.answered_share),
            cell(row.share_of_answers),
            f"{row.longest_wait_s:.1f}",
        ]
        for row in rows
    ]


def verdicts(outcome: LoadOutcome) -> list[str]:
    """Return what the figures say of goodput under the largest load, and of callers without an answer."""
    best = max(outcome.rows, key=lambda row: row.goodput_tokens_per_s)
    last = max(outcome.rows, key=lambda row: row.offered_per_s)
    lines = []
    if best.goodput_tokens_per_s:
        share = last.goodput_tokens_per_s / best.goodput_tokens_per_s
        lines.append(
            f"Goodput at {last.offered_per_s:.2f} requests/s is {share:.2f} of its peak, which is "
            f"{best.goodput_tokens_per_s:.1f} tok/s at {best.offered_per_s:.2f} requests/s."
        )
    lines += [
        f"{row.caller} got no answer at {row.offered_per_s:.2f} requests/s, of {row.num_offered} requests."
        for row in outcome.caller_rows
        if row.num_offered and not row.num_answered
    ]
    return lines


def draw(outcome: LoadOutcome, directory: Path) -> Path:
    """Draw goodput and the 95th percentile of the total time against the offered load: load.png.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure(width_in=6.0)
    rows = sorted(outcome.rows, key=lambda row: row.offered_per_s)
    offered = [row.offered_per_s for row in rows]
    lines = axes.plot(
        offered, [row.goodput_tokens_per_s for row in rows], marker="o", color="C0", label="goodput"
    )
    if outcome.capacity:
        axes.axvline(outcome.capacity.answers_per_s, color="black", linewidth=0.8, linestyle=":")
        axes.text(outcome.capacity.answers_per_s, 0, " capacity", rotation=90, va="bottom", ha="right")
    axes.set_xlabel("offered load, requests/s")
    axes.set_ylabel("goodput, tokens/s")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    times = axes.twinx()
    answered = [row for row in rows if row.total_s.p95 is not None]
    lines += times.plot(
        [row.offered_per_s for row in answered],
        [row.total_s.p95 for row in answered],
        marker="s",
        color="C1",
        label="time to the end, p95",
    )
    times.set_ylabel("seconds")
    times.set_ylim(bottom=0)
    axes.legend(handles=lines, loc="lower right")
    path = directory / PLOT_FILE
    figure.savefig(path)
    return path
