"""`specdec bench capacity-check`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from specdec.bench import capacity_check
from specdec.bench.provenance import collect
from specdec.bench.terminal import CommaList, out_option, progress_bar, shown_in, table_console
from specdec.cli.numbers import integers

_CHECK = capacity_check.CheckConfig()
_RESULTS_FILE = "capacity-check.json"


@click.command("capacity-check")
@click.option("--model", default=_CHECK.model, show_default=True, help="Model to start.")
@click.option("--dtype", default=_CHECK.dtype, show_default=True, help="Data type of the model.")
@click.option(
    "--methods",
    type=CommaList(str),
    default=",".join(_CHECK.methods),
    show_default=True,
    help="Methods to compare beside `none`.",
)
@click.option(
    "--draft-depth",
    type=integers(1),
    default=_CHECK.draft_depth,
    show_default=True,
    help="Draft tokens of a round in a row (K).",
)
@click.option(
    "--concurrency",
    "concurrencies",
    type=CommaList(int, 1),
    default=",".join(map(str, _CHECK.concurrencies)),
    show_default=True,
    help="Numbers of requests under way at a time, beside 1.",
)
@click.option("--limit", type=integers(2), default=_CHECK.limit, show_default=True, help="Number of prompts.")
@click.option(
    "--max-new-tokens",
    type=integers(2),
    default=_CHECK.max_new_tokens,
    show_default=True,
    help="Most tokens of an answer.",
)
@click.option(
    "--repeats",
    type=integers(1),
    default=_CHECK.repeats,
    show_default=True,
    help="How often costs and speeds are measured, in turn.",
)
@out_option("capacity-check.json and the files of `bench run`")
def check_command(directory: Path, **settings: Any) -> None:
    """Compare the capacity model with measurements on this machine.

    A verifier runs on one core; two drafters and two gateways run on another one, with one thread each. The
    model gets what rounds cost with one request and one drafter, and predicts the speed with several requests
    and with two drafters. On a busy machine the result means nothing.
    """
    config = capacity_check.CheckConfig(**settings)
    with progress_bar() as progress:
        on_progress = shown_in(progress, progress.add_task("Repeats", total=config.repeats))
        rows = capacity_check.check(config, directory, on_progress)
    result = {"provenance": collect() | asdict(config), "rows": [asdict(row) for row in rows]}
    (directory / _RESULTS_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    table_console().print(capacity_check.table(rows))
