"""`specdec bench load`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from specdec.bench import load_report, plots
from specdec.bench.load import LoadConfig
from specdec.bench.load_run import names_of, run_load
from specdec.bench.services import gateway_at
from specdec.bench.terminal import (
    EXISTING_FILE,
    CommaList,
    device_option,
    dtype_option,
    gateway_option,
    limit_option,
    max_new_tokens_option,
    out_option,
    progress_bar,
    shown_in,
    table_console,
    temperature_option,
)
from specdec.cli.files import read_text
from specdec.cli.numbers import integers, numbers
from specdec.cli.streams import report
from specdec.cli.tokens import make_token
from specdec.contract.errors import InvalidArgumentError

_DEFAULTS = LoadConfig()


@click.command("load")
@click.option(
    "--multiples",
    type=CommaList(float),
    default=",".join(f"{multiple:g}" for multiple in _DEFAULTS.multiples),
    show_default=True,
    help="Loads to offer, as multiples of the capacity, which is measured first.",
)
@click.option(
    "--rates",
    type=CommaList(float),
    default="",
    help="Loads to offer, requests per second, in place of --multiples.",
)
@click.option(
    "--bound-s",
    type=numbers(0, above=True),
    default=_DEFAULTS.bound_s,
    show_default=True,
    help="Deadline of each request, seconds. An answer that comes later is worth nothing.",
)
@click.option(
    "--duration-s",
    type=numbers(0, above=True),
    default=_DEFAULTS.duration_s,
    show_default=True,
    help="How long each load is measured, seconds. For --bound-s before that, requests come as well, but "
    "only fill the system.",
)
@click.option(
    "--concurrency",
    type=integers(1),
    default=_DEFAULTS.concurrency,
    show_default=True,
    help="Requests under way at a time while the capacity is measured: each is followed by another.",
)
@click.option(
    "--callers",
    "num_callers",
    type=integers(1),
    default=_DEFAULTS.num_callers,
    show_default=True,
    help="Number of callers. Services that are started for the run give each a token, so that the gateway "
    "tells them apart; a running gateway does so with --tokens.",
)
@click.option(
    "--heavy-share",
    type=numbers(0, 1),
    default=_DEFAULTS.heavy_share,
    show_default=True,
    help="Share of all requests that the first caller makes. The others share the rest evenly.",
)
@click.option(
    "--tokens",
    "tokens_file",
    type=EXISTING_FILE,
    help="File with a bearer token of the running gateway in each line. Each is a caller.",
)
@click.option("--method", default=_DEFAULTS.method, show_default=True, help="Method of all requests.")
@click.option(
    "--prompts",
    "prompts_paths",
    type=EXISTING_FILE,
    multiple=True,
    default=_DEFAULTS.prompts_paths,
    show_default="48 prompts in six categories",
    help="File of prompts, as `specdec bench run` takes it; the first turn of each is asked. May be given "
    "several times.",
)
@limit_option
@max_new_tokens_option(_DEFAULTS.max_new_tokens)
@temperature_option
@click.option(
    "--seed",
    type=int,
    default=_DEFAULTS.seed,
    show_default=True,
    help="Seed of the times at which requests come, and of the sampling noise.",
)
@gateway_option
@click.option("--model", default="default", show_default=True, help="Model to start.")
@dtype_option
@device_option
@click.option(
    "--drafter",
    "drafters",
    multiple=True,
    default=("ngram",),
    show_default=True,
    help="Drafter to start; may be given several times.",
)
@click.option(
    "--max-waiting",
    type=integers(0),
    default=256,
    show_default=True,
    help="Most requests that wait in the gateway to start.",
)
@out_option("results.json, requests.jsonl, table.md and load.png")
def load_command(
    tokens_file: Path | None,
    gateway: str | None,
    model: str,
    dtype: str,
    device: str,
    drafters: tuple[str, ...],
    max_waiting: int,
    directory: Path,
    **settings: Any,
) -> None:
    """Offer more and more load, and measure how much of it is answered in time.

    Requests come at random times (a Poisson process), whether or not those before them have ended, as
    requests of many users do. Each load runs for --bound-s and then --duration-s, of which the latter is
    measured. Goodput is the tokens per second of answers that ended within --bound-s. It should rise with
    the load up to the capacity, and stay there: a system that begins more than it can end in time loses it.

    \b
    What to look at:
      goodput        at the largest load, over its peak: 1.0 is best
      late (begun)   work in vain: answers that began, and did not end in time
      refused        whoever is told when to come back can go elsewhere meanwhile
      callers        one makes most requests; the others should be answered all the same

    The capacity is the number of answers per second while --concurrency requests are always under way.

    \b
    Example:
      specdec bench load --bound-s 20 --duration-s 60 --out DIR
      specdec bench load --gateway HOST:PORT --tokens FILE --rates 1,2,4,8 --out DIR
    """
    config = LoadConfig(**settings)
    config.validate()
    if tokens_file and not gateway:
        raise InvalidArgumentError("--tokens are those of a running gateway; name it with --gateway.")
    with _callers(tokens_file, gateway, config.num_callers) as (tokens, gateway_args):
        gateway_args = (*gateway_args, "--max-waiting", str(max_waiting))
        services = gateway_at(gateway, model, dtype, device, drafters, gateway_args=gateway_args)
        with services as address, progress_bar() as progress:
            task = progress.add_task("Starting", total=None)
            outcome = run_load(
                config,
                address,
                directory,
                tokens,
                lambda what, done, total: shown_in(progress, task, what)(done, total),
            )
    _show(outcome, directory)


@contextmanager
def _callers(
    tokens_file: Path | None, gateway: str | None, num_callers: int
) -> Iterator[tuple[list[str], tuple[str, ...]]]:
    """Yield the callers' tokens, and the arguments of a gateway to start that knows them."""
    if gateway:
        text = read_text(tokens_file, "The file of tokens") if tokens_file else ""
        yield text.split(), ()
        return
    made = [make_token(name) for name in names_of(num_callers)]
    with tempfile.TemporaryDirectory(prefix="specdec-") as folder:
        path = Path(folder, "tokens.toml")
        path.write_text("\n".join(entry for _, entry in made), encoding="utf-8")
        yield [secret for secret, _ in made], ("--auth-tokens", str(path))


def _show(outcome: load_report.LoadOutcome, directory: Path) -> None:
    console = table_console()
    for table in load_report.tables(outcome):
        console.print(table)
    if outcome.capacity:
        console.print(
            f"Capacity: {outcome.capacity.answers_per_s:.2f} answers/s, "
            f"{outcome.capacity.tokens_per_s:.1f} tok/s",
            highlight=False,
        )
    for line in load_report.verdicts(outcome):
        console.print(line, highlight=False)
    if plots.has_matplotlib():
        load_report.draw(outcome, directory)
    else:
        report("The plot was skipped: matplotlib is not installed (pip install 'specdec[bench]').")
    report(f"Results are in {directory}.")
