"""`specdec bench trace`."""

from __future__ import annotations

from pathlib import Path

import click

from specdec.bench.experiment import BenchConfig
from specdec.bench.run_cli import run_shown
from specdec.bench.terminal import CommaList, gateway_option, out_option, temperature_option
from specdec.bench.trace import TRACE_FILE, make_trace
from specdec.cli.numbers import integers
from specdec.cli.streams import report
from specdec.contract.errors import InvalidArgumentError

_DEFAULTS = BenchConfig()


@click.command("trace")
@click.option(
    "--methods",
    type=CommaList(str),
    required=True,
    help="Methods to record, separated by commas, such as ngram-lm,dflash+ngram-lm.",
)
@click.option(
    "--draft-depth",
    type=CommaList(int, 1),
    default="2,6",
    show_default=True,
    help="Draft tokens in a row per round (K), at least two values: costs between them are a straight line.",
)
@click.option(
    "--draft-nodes",
    type=CommaList(int),
    default="0,7,15,31",
    show_default=True,
    help="Most tokens of a draft tree; 0 is a chain.",
)
@click.option(
    "--concurrency",
    "concurrencies",
    type=CommaList(int, 1),
    default="1,4,8",
    show_default=True,
    help="Requests under way at a time; costs are recorded for each.",
)
@click.option("--limit", type=integers(1), default=6, show_default=True, help="Number of prompts.")
@click.option(
    "--max-new-tokens", type=integers(2), default=48, show_default=True, help="Most tokens of an answer."
)
@temperature_option
@gateway_option
@out_option("trace.json and the files of `bench run`")
def trace_command(
    methods: tuple[str, ...],
    draft_depth: tuple[int, ...],
    draft_nodes: tuple[int, ...],
    concurrencies: tuple[int, ...],
    limit: int,
    max_new_tokens: int,
    temperature: float,
    gateway: str | None,
    directory: Path,
) -> None:
    """Record what drafts cost and how far they are accepted, for every method and size.

    Whoever changes how the gateway chooses what to draft can replay the choice on the trace.
    """
    if len(set(draft_depth)) < 2 or len(set(draft_nodes)) < 2:
        raise InvalidArgumentError("Give at least two values of draft-depth and of draft-nodes.")
    config = BenchConfig(
        methods=methods,
        draft_depth=draft_depth,
        draft_nodes=draft_nodes,
        concurrencies=concurrencies,
        limit=limit,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )
    config.validate()
    outcome = run_shown(config, directory, gateway)
    make_trace(outcome.provenance, outcome.records).write(directory / TRACE_FILE)
    report(f"The trace is {directory / TRACE_FILE}.")
