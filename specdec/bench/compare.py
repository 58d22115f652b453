"""Puts two runs side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from specdec.bench.report import cell
from specdec.bench.stats import Row

_FIGURES = {
    "tokens_per_s": "tok/s",
    "tpot_ms_p50": "TPOT ms",
    "speedup": "speedup",
    "mean_acceptance_length": "accept. length",
}
_UNREMARKABLE = frozenset({"command", "started_at"})


def comparison_table(old: Sequence[Row], new: Sequence[Row]) -> Table:
    """Return a table of the rows of both runs, with each figure as `old -> new (new / old)`."""
    table = Table(title="old -> new (new / old)")
    for head in ("method", "conc.", "category"):
        table.add_column(head)
    for head in _FIGURES.values():
        table.add_column(head, justify="right")
    old_rows, new_rows = _by_key(old), _by_key(new)
    for key in dict.fromkeys([*old_rows, *new_rows]):
        before, after = old_rows.get(key), new_rows.get(key)
        table.add_row(
            *(escape(str(part)) for part in key), *(_change(before, after, name) for name in _FIGURES)
        )
    return table


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line for each entry of the provenance that differs, which warns that the runs may not compare.

    Nested entries have dotted names.
    """
    flat_old, flat_new = _flatten(old), _flatten(new)
    return [
        f"{name}: {flat_old.get(name)} -> {flat_new.get(name)}"
        for name in dict.fromkeys([*flat_old, *flat_new])
        if name not in _UNREMARKABLE and flat_old.get(name) != flat_new.get(name)
    ]


def _by_key(rows: Sequence[Row]) -> dict[tuple[str, int, str], Row]:
    return {(row.method, row.concurrency, row.category): row for row in rows}


def _change(old: Row | None, new: Row | None, name: str) -> str:
    before = getattr(old, name) if old else None
    after = getattr(new, name) if new else None
    if before is None and after is None:
        return "-"
    ratio = f" ({after / before:.2f})" if before and after else ""
    return f"{cell(before)} -> {cell(after)}{ratio}"


def _flatten(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
