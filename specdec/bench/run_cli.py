"""`specdec bench run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from specdec.bench import plots
from specdec.bench.experiment import BenchConfig, Outcome, run_experiment
from specdec.bench.peers.engines import names_of, require_usable
from specdec.bench.records import RequestRecord
from specdec.bench.report import category_table, pair_table, parts_table, peer_ratios, speed_table, turn_table
from specdec.bench.services import gateway_at
from specdec.bench.terminal import (
    EXISTING_FILE,
    CommaList,
    device_option,
    dtype_option,
    gateway_option,
    limit_option,
    lines_above,
    max_new_tokens_option,
    out_option,
    progress_bar,
    shown_in,
    table_console,
    temperature_option,
)
from specdec.cli.numbers import integers
from specdec.cli.streams import report
from specdec.contract.errors import InvalidArgumentError, UnavailableError
from specdec.contract.methods import drafters_of

_DEFAULTS = BenchConfig()
_MEMORY_TOKENS = 200_000
"""Tokens of earlier answers that a drafter service remembers, where it is started for a run with memory."""


@click.command("run")
@click.option(
    "--methods",
    type=CommaList(str),
    default="ngram",
    show_default=True,
    help="Methods to compare, separated by commas, such as ngram,dflash+ngram; `none` is always run.",
)
@click.option(
    "--prompts",
    "prompts_paths",
    type=EXISTING_FILE,
    multiple=True,
    default=_DEFAULTS.prompts_paths,
    show_default="48 prompts in six categories",
    help="File of prompts: a JSON object with question_id, category and turns per line. May be given several "
    "times; two files may have the same question_id.",
)
@click.option(
    "--turns",
    "num_turns",
    type=integers(1),
    default=_DEFAULTS.num_turns,
    show_default=True,
    help="Most turns of a prompt that are asked. Each turn comes after the conversation so far, with the "
    "model's own answers. A prompt that has fewer turns ends with its last one.",
)
@click.option(
    "--asks",
    "num_asks",
    type=integers(1),
    default=_DEFAULTS.num_asks,
    show_default=True,
    help="How often every prompt is asked, with all its turns. All prompts are asked once before any of them "
    "is asked again.",
)
@click.option(
    "--memory",
    is_flag=True,
    help="Run every method once more as METHOD:memory, which also drafts from its answers to earlier "
    "requests. Only the drafters ngram and ngram-lm remember answers. With --gateway, the drafter service "
    "there must have been started with --ngram-memory.",
)
@limit_option
@max_new_tokens_option(_DEFAULTS.max_new_tokens)
@temperature_option
@click.option(
    "--seed", type=int, default=_DEFAULTS.seed, show_default=True, help="Seed of the sampling noise."
)
@click.option(
    "--draft-depth",
    type=CommaList(int, 1),
    default="",
    show_default="chosen by the gateway",
    help="Draft tokens in a row per round (K). With several, such as 3,7,15, every method runs with each.",
)
@click.option(
    "--draft-nodes",
    type=CommaList(int),
    default="",
    show_default="with a K one chain per drafter, without it the gateway chooses",
    help="Most tokens of a draft tree; 0 is one chain per drafter. With several, such as 0,15,31, every "
    "method runs with each.",
)
@click.option(
    "--concurrency",
    "concurrencies",
    type=CommaList(int, 1),
    default="1",
    show_default=True,
    help="Requests under way at a time. With several, such as 1,4,8, the workload is run with each.",
)
@click.option(
    "--peers",
    type=CommaList(str),
    default="",
    help="Engines to compare with on the same weights, each plain and with prompt lookup: transformers, "
    "openvino or both, separated by a comma.",
)
@click.option(
    "--warmup",
    "num_warmup_prompts",
    type=integers(0),
    default=_DEFAULTS.num_warmup_prompts,
    show_default=True,
    help="Prompts that each method answers first, without a record.",
)
@gateway_option
@click.option(
    "--model", default=_DEFAULTS.model, show_default=True, help="Model to start; the peers run it as well."
)
@dtype_option
@device_option
@click.option(
    "--drafter",
    "drafters",
    multiple=True,
    help="Drafter to start; may be given several times.  [default: one for each drafter of the methods]",
)
@out_option("results.json, requests.jsonl, table.md and plots")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on where a run that was interrupted left off in the folder of --out: what it measured is not "
    "measured again. All other settings must be the same. Where there is nothing yet, the run begins.",
)
def run_command(
    resume: bool,
    gateway: str | None,
    dtype: str,
    device: str,
    drafters: tuple[str, ...],
    directory: Path,
    **settings: Any,
) -> None:
    """Run every method on the same prompts against the same services, taking turns prompt by prompt."""
    config = BenchConfig(**settings)
    config.validate()
    if resume and config.memory:
        raise InvalidArgumentError(
            "A run with --memory cannot go on: the services have forgotten its earlier answers; leave out "
            "--resume.",
            field="resume",
        )
    require_usable(config.peers)
    try:
        outcome = run_shown(
            config, directory, gateway, dtype=dtype, device=device, drafters=drafters, resume=resume
        )
    except KeyboardInterrupt:
        report(f"What was measured is in {directory}; the same command with --resume goes on from there.")
        raise
    _show(outcome, config, directory)
    _judge(outcome.records)


def run_shown(
    config: BenchConfig,
    directory: Path,
    gateway: str | None,
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    drafters: tuple[str, ...] = (),
    resume: bool = False,
) -> Outcome:
    """Run an experiment under a progress bar, against a gateway or services started for it (None).

    Args:
        drafters: drafters to start; empty: one for each drafter of the methods.
        resume: whether to go on where a run with the same settings was interrupted in that folder.
    """
    prompts = config.load_prompts()
    named = dict.fromkeys(name for method in config.methods for name in drafters_of(method))
    drafters = drafters or tuple(named) or ("ngram",)
    memory = ("--ngram-memory", str(_MEMORY_TOKENS)) if config.memory else ()
    services = gateway_at(gateway, config.model, dtype, device, drafters, drafter_args=memory)
    with services as address, progress_bar() as progress:
        task = progress.add_task("Warming up", total=None)
        on_progress = shown_in(progress, task, "Requests")
        return run_experiment(
            config, prompts, address, directory, on_progress, lines_above(progress), resume=resume
        )


def _show(outcome: Outcome, config: BenchConfig, directory: Path) -> None:
    console = table_console()
    for table in (speed_table, parts_table, category_table, pair_table):
        console.print(table(outcome.rows))
    if outcome.turn_rows:
        console.print(turn_table(outcome.turn_rows))
    for line in peer_ratios(outcome.rows, names_of(config.peers)):
        console.print(line, highlight=False)
    if plots.has_matplotlib():
        plots.draw(outcome.rows, directory)
    else:
        report("Plots were skipped: matplotlib is not installed (pip install 'specdec[bench]').")
    report(f"Results are in {directory}.")


def _judge(records: Sequence[RequestRecord]) -> None:
    """Warn of failed requests.

    Raises:
        UnavailableError: all requests failed.
    """
    failed = [record for record in records if record.answer is None]
    if len(failed) == len(records):
        raise UnavailableError(f"All {len(records)} requests failed; the first: {failed[0].error}")
    for method in dict.fromkeys(record.method for record in failed):
        errors = [record.error for record in failed if record.method == method]
        num_requests = sum(record.method == method for record in records)
        report(f"{method}: {len(errors)} of {num_requests} requests failed; first: {errors[0]}")
