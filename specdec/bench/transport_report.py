"""The rows of `specdec bench transport`, and the files and tables they become."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from specdec.bench.provenance import collect

RESULTS_FILE = "transport.json"
TABLE_FILE = "transport.md"
CAPTION = (
    "us/round: from the verifier's answer until the drafter's reader returned a view of the new positions. "
    "read us: copying their rows out of the view afterwards. ms/prefill: from the answer to the open until a "
    "new reader returned a view of the whole prompt: it maps the memory, or connects, opens the stream and "
    "receives. again ms: the same for a second session of that reader. Bytes are of state that became "
    "readable: by handle none is sent, by stream all, some of it while the answer is still under way."
)
"""Explanation of the table's columns."""


@dataclass(frozen=True, slots=True)
class TransportRow:
    """Figures of one kind of state of a model, read in one way. Sizes are of state that became readable."""

    model: str
    """Id of the model."""
    state: str
    """"MTP", "DFlash" or "DFlash projected"."""
    transport: str
    """"handle" or "stream"."""
    bytes_per_token: int
    """State of a token of the prompt, bytes."""
    bytes_per_round: int
    """State of a round's new tokens, bytes."""
    round_us_p50: float
    """Median time from the verifier's answer until a view of the new positions was there, microseconds."""
    round_us_p90: float
    """90th percentile of this time, microseconds."""
    read_us_p50: float
    """Median time of copying the new positions' rows out of that view, microseconds."""
    prefill_bytes: int
    """State of the whole prompt, bytes."""
    prefill_ms_p50: float
    """Median time until a new reader had a view of the whole prompt, milliseconds: it maps the memory, or
    connects, opens the stream and receives."""
    again_ms_p50: float
    """Median time of the same for a second session of that reader, milliseconds."""
    num_rounds: int
    """Number of measured rounds."""
    num_compared_bytes: int
    """Number of bytes that the other transport gave as well; 0 where there is no other."""


def write(directory: Path, rows: Sequence[TransportRow], settings: dict[str, Any]) -> None:
    """Write transport.json, with provenance, and transport.md."""
    directory.mkdir(parents=True, exist_ok=True)
    result = {"provenance": collect() | settings, "rows": [asdict(row) for row in rows]}
    (directory / RESULTS_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    (directory / TABLE_FILE).write_text(markdown(rows), encoding="utf-8")


_HEADS = (
    "model",
    "state",
    "transport",
    "B/token",
    "B/round",
    "us/round p50",
    "p90",
    "read us",
    "B/prefill",
    "ms/prefill",
    "again ms",
)
_NUM_TEXT_COLUMNS = 3


def _cells(row: TransportRow) -> list[str]:
    return [
        row.model,
        row.state,
        row.transport,
        str(row.bytes_per_token),
        str(row.bytes_per_round),
        f"{row.round_us_p50:.0f}",
        f"{row.round_us_p90:.0f}",
        f"{row.read_us_p50:.0f}",
        str(row.prefill_bytes),
        f"{row.prefill_ms_p50:.2f}",
        f"{row.again_ms_p50:.2f}",
    ]


def table(rows: Sequence[TransportRow], *, round_tokens: int, prefill_tokens: int) -> Table:
    """Return the rows as a table."""
    title = f"Target state: rounds of {round_tokens} new tokens, prefill of {prefill_tokens}"
    result = Table(title=title, caption=CAPTION, caption_justify="left")
    for index, head in enumerate(_HEADS):
        result.add_column(head, justify="left" if index < _NUM_TEXT_COLUMNS else "right")
    for row in rows:
        result.add_row(*_cells(row))
    return result


def markdown(rows: Sequence[TransportRow]) -> str:
    """Return the rows as a Markdown table."""
    rules = ["---"] * _NUM_TEXT_COLUMNS + ["---:"] * (len(_HEADS) - _NUM_TEXT_COLUMNS)
    lines = [list(_HEADS), rules, *(_cells(row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{CAPTION}\n"
