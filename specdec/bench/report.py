"""The results of a run: results.json, table.md, and tables for the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from specdec.bench.records import RequestRecord
from specdec.bench.stats import OVERALL, Row, TurnRow
from specdec.contract.errors import InvalidArgumentError
from specdec.contract.methods import PLAIN

RESULTS_FILE = "results.json"
TABLE_FILE = "table.md"

_ROW_FIELDS = [field.name for field in fields(Row)]
_KEYS = {"method": "method", "concurrency": "conc."}
_SPEED = {
    "ttft_ms_p50": "TTFT ms",
    "tpot_ms_p50": "TPOT ms",
    "tokens_per_s": "tok/s",
    "speedup": "speedup",
    "mean_acceptance_length": "tau",
    "identical_to_none": "same",
    "num_errors": "errors",
}
_PARTS = {
    "draft_ms_p50": "draft",
    "verify_ms_p50": "verify",
    "transport_ms_p50": "transport",
    "gateway_ms_p50": "gateway",
}


def write_results(
    directory: Path,
    provenance: dict[str, Any],
    rows: Sequence[Row],
    turn_rows: Sequence[TurnRow],
    records: Sequence[RequestRecord],
) -> None:
    """Write results.json (provenance, rows, turn_rows, errors) and table.md."""
    results = {
        "provenance": provenance,
        "rows": [asdict(row) for row in rows],
        "turn_rows": [{"ask": each.ask, "turn": each.turn, **asdict(each.row)} for each in turn_rows],
        "errors": [
            {
                "method": record.method,
                "concurrency": record.concurrency,
                "source": record.source,
                "question_id": record.question_id,
                "ask": record.ask,
                "turn": record.turn,
                "error": record.error,
            }
            for record in records
            if record.answer is None
        ],
    }
    (directory / RESULTS_FILE).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    tables = markdown(rows) + ("\n" + turn_markdown(turn_rows) if turn_rows else "")
    (directory / TABLE_FILE).write_text(tables, encoding="utf-8")


def read_rows(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Read provenance and rows of a results.json.

    Raises:
        InvalidArgumentError: the file is not a results.json.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return results["provenance"], [Row(**row) for row in results["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidArgumentError(
            f"{path} is not a {RESULTS_FILE} of `specdec bench run`: {error!r}"
        ) from error


def markdown(rows: Sequence[Row]) -> str:
    """Return all rows as a Markdown table whose heads are the fields' names."""
    return markdown_table(_ROW_FIELDS, [_figures(row) for row in rows])


def turn_markdown(turn_rows: Sequence[TurnRow]) -> str:
    """Return the rows of turns as a Markdown table like the one of `markdown`."""
    lines = [[each.ask, each.turn, *_figures(each.row)] for each in turn_rows]
    return markdown_table(["ask", "turn", *_ROW_FIELDS], lines)


def _figures(row: Row) -> list[object]:
    return [getattr(row, name) for name in _ROW_FIELDS]


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads)]
    lines += [[_markdown_cell(cell(value)) for value in row] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _markdown_cell(text: str) -> str:
    """Escape what would end a cell or a row of a Markdown table: the name of a category may hold it."""
    return " ".join(text.split()).replace("|", r"\|")


def speed_table(rows: Sequence[Row]) -> Table:
    """Return a table of each method's speed over all prompts; it fits into 80 characters."""
    return _overall_table(
        "All prompts (tau: acceptance length; same: identical to none)", _KEYS | _SPEED, rows
    )


def parts_table(rows: Sequence[Row]) -> Table:
    """Return a table of where the time of a round went, for the methods that have rounds."""
    with_rounds = [row for row in rows if row.verify_ms_p50 is not None]
    return _overall_table("One round, median ms", _KEYS | _PARTS, with_rounds)


def _overall_table(title: str, columns: dict[str, str], rows: Sequence[Row]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name, head in columns.items():
        table.add_column(head, justify="left" if name == "method" else "right", no_wrap=name == "method")
    for row in rows:
        if row.category == OVERALL:
            table.add_row(*(cell(getattr(row, name)) for name in columns))
    return table


def category_table(rows: Sequence[Row]) -> Table:
    """Return a table of each method's speedup and acceptance length by category, without `none`."""
    keyed = [((row.category, str(row.concurrency)), row) for row in rows]
    return _gain_table("By category (speedup, tau)", ["category", "conc."], keyed)


def pair_table(rows: Sequence[Row]) -> Table:
    """Return a table of each method's tokens per second over those of `none`, block by block of prompts."""
    keyed = [((row.category, str(row.concurrency)), row) for row in rows]
    title = "Tokens/s over none, block by block (median, 95 % interval)"
    return _gain_table(title, ["category", "conc."], keyed, _paired)


def turn_table(turn_rows: Sequence[TurnRow]) -> Table:
    """Return a table of each method's speedup and acceptance length by time asked and turn."""
    keyed = [((str(each.ask), str(each.turn), str(each.row.concurrency)), each.row) for each in turn_rows]
    return _gain_table("By time asked and turn (speedup, tau)", ["asked", "turn", "conc."], keyed)


def _gain_table(
    title: str,
    heads: Sequence[str],
    keyed: Sequence[tuple[tuple[str, ...], Row]],
    text: Callable[[Row | None], str] | None = None,
) -> Table:
    """Return a table with a line for each key and a column for each method but `none`."""
    table = Table(title=title, box=SIMPLE_HEAD)
    methods = list(dict.fromkeys(row.method for _, row in keyed if row.method != PLAIN))
    for index, head in enumerate([*heads, *methods]):
        table.add_column(head, justify="left" if index == 0 else "right")
    by_key: dict[tuple[str, ...], dict[str, Row]] = {}
    for key, row in keyed:
        by_key.setdefault(key, {})[row.method] = row
    for key, by_method in by_key.items():
        table.add_row(*map(escape, key), *((text or _gain)(by_method.get(method)) for method in methods))
    return table


def peer_ratios(rows: Sequence[Row], peers: Sequence[str]) -> list[str]:
    """Return a line for each peer: tokens/s of `none` over tokens/s of the peer, over all prompts."""
    overall = {(row.method, row.concurrency): row.tokens_per_s for row in rows if row.category == OVERALL}
    lines = []
    for peer in peers:
        ours, theirs = overall.get((PLAIN, 1)), overall.get((peer, 1))
        if ours and theirs:
            lines.append(f"{PLAIN} / {peer} tokens/s: {ours / theirs:.2f}")
    return lines


def cell(value: object) -> str:
    """Format a figure for a table: two decimals, - for null."""
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.2f}"
        case list():
            return " ".join(f"{item:.2f}" for item in value)
        case dict():
            return " ".join(f"{name} {item:.2f}" for name, item in value.items()) or "-"
    return str(value)


def _paired(row: Row | None) -> str:
    if row is None or row.paired_speedup is None:
        return "-"
    low, high = row.paired_interval
    return f"{row.paired_speedup:.2f}x ({low:.2f}-{high:.2f})"


def _gain(row: Row | None) -> str:
    if row is None or row.speedup is None:
        return "-"
    length = row.mean_acceptance_length
    return f"{row.speedup:.2f}x" + ("" if length is None else f"  {length:.2f}")
