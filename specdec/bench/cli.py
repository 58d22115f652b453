"""`specdec bench`: compare methods on a workload, and runs with each other."""

from __future__ import annotations

from pathlib import Path

import click

from specdec.bench import noise_cost
from specdec.bench.capacity_check_cli import check_command
from specdec.bench.capacity_cli import capacity_command
from specdec.bench.compare import comparison_table, differences
from specdec.bench.load_cli import load_command
from specdec.bench.pass_cli import pass_command
from specdec.bench.report import read_rows
from specdec.bench.run_cli import run_command
from specdec.bench.telemetry_cli import telemetry_command
from specdec.bench.terminal import EXISTING_FILE, table_console
from specdec.bench.trace_cli import trace_command
from specdec.bench.transport_cli import transport_command
from specdec.cli.groups import ErrorGroup
from specdec.cli.numbers import integers
from specdec.cli.streams import show


@click.group(cls=ErrorGroup)
def bench() -> None:
    """Measure methods against plain decoding."""


for _command in (
    run_command,
    load_command,
    trace_command,
    pass_command,
    transport_command,
    telemetry_command,
    capacity_command,
    check_command,
):
    bench.add_command(_command)


@bench.command("noise")
@click.option(
    "--positions",
    type=integers(1),
    default=9,
    show_default=True,
    help="Number of positions: K + 1 of a round.",
)
@click.option(
    "--vocab-size",
    type=integers(1),
    default=49152,
    show_default=True,
    help="Number of values at each position.",
)
@click.option("--repeats", type=integers(1), default=100, show_default=True, help="Number of measurements.")
def noise_command(positions: int, vocab_size: int, repeats: int) -> None:
    """Measure what the picks of a sampled round cost, beside those of a greedy round."""
    greedy_ms, sampled_ms = noise_cost.measure(
        num_positions=positions, vocab_size=vocab_size, repeats=repeats
    )
    show(
        f"{positions} positions x {vocab_size} tokens: greedy {greedy_ms:.2f} ms, "
        f"sampled {sampled_ms:.2f} ms (medians of {repeats})"
    )


@bench.command("compare")
@click.argument("old", type=EXISTING_FILE)
@click.argument("new", type=EXISTING_FILE)
def compare_command(old: Path, new: Path) -> None:
    """Put the rows of two results.json files side by side."""
    (old_provenance, old_rows), (new_provenance, new_rows) = read_rows(old), read_rows(new)
    console = table_console()
    console.print(comparison_table(old_rows, new_rows))
    for line in differences(old_provenance, new_provenance):
        console.print(line, markup=False, highlight=False)
