"""`specdec bench`: compare methods on a workload, and runs with each other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from specdec.bench import geometry, noise_cost, plots, transport, verify_pass
from specdec.bench.backends import TRANSFORMERS
from specdec.bench.compare import comparison_table, differences
from specdec.bench.experiment import BenchConfig, Outcome, run_experiment
from specdec.bench.records import RequestRecord
from specdec.bench.report import category_table, parts_table, peer_ratios, read_rows, speed_table
from specdec.bench.telemetry_cli import telemetry_command
from specdec.bench.workload import Prompt
from specdec.cli.groups import ErrorGroup
from specdec.contract.errors import InvalidArgumentError, UnavailableError
from specdec.contract.methods import drafters_of

_DEFAULTS = BenchConfig()
_TRANSPORT_DEFAULTS = transport.TransportConfig(model=_DEFAULTS.model)
_EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_TABLE_WIDTH = 160
"""Characters of a table where the output is no terminal and has no width of its own."""


class _CommaList(click.ParamType[Any]):
    """Values separated by commas, each of one type; blanks are dropped."""

    def __init__(self, item: type[str] | type[int]) -> None:
        self._item = item
        self.name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(self._item(part.strip()) for part in value.split(",") if part.strip())
        except ValueError:
            self.fail(f"{value!r} is not a list of integers such as 1,4,8.", param, ctx)


@click.group(cls=ErrorGroup)
def bench() -> None:
    """Measure methods against plain decoding."""


bench.add_command(telemetry_command)


@bench.command("run")
@click.option(
    "--methods",
    type=_CommaList(str),
    default="ngram",
    show_default=True,
    help="Methods to compare, separated by commas, such as ngram,dflash+ngram; `none` is always run.",
)
@click.option(
    "--prompts",
    "prompts_path",
    type=_EXISTING_FILE,
    default=_DEFAULTS.prompts_path,
    show_default="48 prompts in six categories",
    help="Workload: question_id, category and turns per line; the first turn is used.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Prompts to use, round-robin over the categories.")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=_DEFAULTS.max_new_tokens,
    show_default=True,
    help="Most tokens per answer.",
)
@click.option(
    "--temperature",
    type=float,
    default=_DEFAULTS.temperature,
    show_default=True,
    help="Softmax temperature; 0 is greedy.",
)
@click.option(
    "--seed", type=int, default=_DEFAULTS.seed, show_default=True, help="Seed of the sampling noise."
)
@click.option(
    "--draft-depth",
    type=_CommaList(int),
    default="",
    show_default="chosen by the gateway",
    help="Draft tokens in a row per round (K). With several, such as 3,7,15, every method runs with each.",
)
@click.option(
    "--draft-nodes",
    type=_CommaList(int),
    default="",
    show_default="with a K one chain per drafter, without it the gateway chooses",
    help="Most tokens of a draft tree; 0 is one chain per drafter. With several, such as 0,15,31, every "
    "method runs with each.",
)
@click.option(
    "--concurrency",
    "concurrencies",
    type=_CommaList(int),
    default="1",
    show_default=True,
    help="Requests under way at a time. With several, such as 1,4,8, the workload is run with each.",
)
@click.option(
    "--peers",
    type=_CommaList(str),
    default="",
    help="Engines to compare with on the same weights: transformers.",
)
@click.option(
    "--warmup",
    "num_warmup_prompts",
    type=click.IntRange(min=0),
    default=_DEFAULTS.num_warmup_prompts,
    show_default=True,
    help="Prompts that each method answers first, without a record.",
)
@click.option("--gateway", help="Address of a running gateway.  [default: start the services for the run]")
@click.option(
    "--model", default=_DEFAULTS.model, show_default=True, help="Model to start, and the peers' model."
)
@click.option("--dtype", default="bfloat16", show_default=True, help="Data type of the model to start.")
@click.option("--device", default="cpu", show_default=True, help="Device of the model to start.")
@click.option(
    "--drafter",
    "drafters",
    multiple=True,
    help="Drafter to start; may be given several times.  [default: one for each drafter of the methods]",
)
@click.option(
    "--out",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for results.json, requests.jsonl, table.md and plots.",
)
def run_command(
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
    prompts = config.load_prompts()
    named = dict.fromkeys(name for method in config.methods for name in drafters_of(method))
    drafters = drafters or tuple(named) or ("ngram",)
    with _services(gateway, config.model, dtype, device, drafters) as address:
        outcome = _run_with_progress(config, prompts, address, directory)
    _show(outcome, config, directory)
    _judge(outcome.records)


@bench.command("pass")
@click.option("--verifier", help="Address of a running, idle verifier.  [default: start one for the run]")
@click.option("--model", default=_DEFAULTS.model, show_default=True, help="Model to start.")
@click.option("--dtype", default="bfloat16", show_default=True, help="Data type of the model to start.")
@click.option("--device", default="cpu", show_default=True, help="Device of the model to start.")
@click.option(
    "--tokens",
    "sizes",
    type=_CommaList(int),
    default="1,2,4,8,9,16,32",
    show_default=True,
    help="Tokens in a pass, K + 1 each; the others are compared with the first.",
)
@click.option(
    "--context",
    "context_tokens",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    help="Tokens in the KV cache at the start.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=50, show_default=True, help="Rounds per size.")
@click.option("--trees", "with_trees", is_flag=True, help="Measure each size as a draft tree as well.")
@click.option(
    "--peers",
    type=_CommaList(str),
    default="",
    help="Engines that take turns with passes of the same sizes over --model: transformers.",
)
@click.option(
    "--out",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for pass.json and pass.png.",
)
def pass_command(
    verifier: str | None,
    model: str,
    dtype: str,
    device: str,
    peers: tuple[str, ...],
    directory: Path,
    **settings: Any,
) -> None:
    """Measure what a verify pass costs against the tokens in it, and against a plain forward pass."""
    if not settings["sizes"] or min(settings["sizes"]) < 1:
        raise InvalidArgumentError("--tokens must be a list of integers >= 1, such as 1,9.")
    if unknown := [peer for peer in peers if peer != TRANSFORMERS]:
        raise InvalidArgumentError(f"There is no peer {unknown[0]!r}; there is {TRANSFORMERS}.")
    with _verifier(verifier, model, dtype, device) as address, _progress() as progress:
        task = progress.add_task("Turns", total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        peer_model = model if peers else None
        rows = verify_pass.measure(address, **settings, peer_model=peer_model, on_progress=on_progress)
    started_with = {"model": model, "dtype": dtype, "device": device, "peers": peers}
    verify_pass.write(directory, rows, started_with | settings)
    _console().print(verify_pass.table(rows))


@bench.command("transport")
@click.option(
    "--verifier",
    help="Address of a running, idle verifier on this host; --models then names its model.  "
    "[default: start one per model]",
)
@click.option(
    "--models",
    type=_CommaList(str),
    default=",".join((_DEFAULTS.model, *geometry.GEOMETRIES)),
    show_default=True,
    help="Models, separated by commas; gemma4-31b-geometry is made for the run, with random weights and "
    "state of the size of Gemma 4 31B's.",
)
@click.option("--dtype", default="bfloat16", show_default=True, help="Data type of the models to start.")
@click.option("--device", default="cpu", show_default=True, help="Device of verifier and reader.")
@click.option(
    "--kv-cache-mib",
    type=float,
    default=512.0,
    show_default=True,
    help="KV pool of the models to start, MiB.",
)
@click.option(
    "--shared-dir",
    default=_TRANSPORT_DEFAULTS.shared_dir,
    show_default=True,
    help="Memory-backed directory of the handles.",
)
@click.option(
    "--prefill-tokens",
    type=click.IntRange(min=1),
    default=_TRANSPORT_DEFAULTS.prefill_tokens,
    show_default=True,
    help="Tokens of the prompt.",
)
@click.option(
    "--round-tokens",
    type=click.IntRange(min=1),
    default=_TRANSPORT_DEFAULTS.round_tokens,
    show_default=True,
    help="New tokens of a round, its whole draft and the bonus.",
)
@click.option(
    "--prefills",
    type=click.IntRange(min=1),
    default=_TRANSPORT_DEFAULTS.prefills,
    show_default=True,
    help="New readers per row; each gets the state of the whole prompt.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=_TRANSPORT_DEFAULTS.repeats,
    show_default=True,
    help="Rounds per row.",
)
@click.option(
    "--out",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for transport.json and transport.md.",
)
def transport_command(
    verifier: str | None,
    models: tuple[str, ...],
    dtype: str,
    kv_cache_mib: float,
    directory: Path,
    **settings: Any,
) -> None:
    """Measure what it costs a drafter to get at target state, by handle and by stream.

    The run drives a real verifier and reads its state with the code of the drafter service, in this process.
    The time of a round lasts from the arrival of the verifier's answer until there is a view of the new
    positions. The time of a prompt lasts until a new reader has a view of the whole prompt, and includes
    mapping the memory, or connecting and opening the stream. A view by handle refers to the verifier's
    memory; the reading itself is measured apart, for both. A difference between the two fails the run.
    """
    if not models or (verifier and len(models) > 1):
        raise InvalidArgumentError("--models must name one model or more, exactly one with --verifier.")
    verifier_args = ("--kv-cache-mib", str(kv_cache_mib), "--shared-dir", settings["shared_dir"])
    rows: list[transport.TransportRow] = []
    for name in models:
        with geometry.prepared_model(name) as model:
            config = transport.TransportConfig(model=model, **settings)
            with (
                _verifier(verifier, model, dtype, settings["device"], verifier_args) as address,
                _progress() as progress,
            ):
                task = progress.add_task(f"Rows of {name}", total=None)

                def on_progress(
                    done: int, total: int, progress: Progress = progress, task: TaskID = task
                ) -> None:
                    progress.update(task, completed=done, total=total)

                rows += asyncio.run(transport.measure(address, config, on_progress))
    transport.write(directory, rows, {"models": models, "dtype": dtype, **settings})
    _console().print(
        transport.table(
            rows, round_tokens=settings["round_tokens"], prefill_tokens=settings["prefill_tokens"]
        )
    )


@bench.command("noise")
@click.option(
    "--positions", type=click.IntRange(min=1), default=9, show_default=True, help="Rows, K + 1 of a round."
)
@click.option(
    "--vocab-size", type=click.IntRange(min=1), default=49152, show_default=True, help="Values per row."
)
@click.option("--repeats", type=click.IntRange(min=1), default=100, show_default=True, help="Measurements.")
def noise_command(positions: int, vocab_size: int, repeats: int) -> None:
    """Measure what the noise of a sampled round costs."""
    median_ms = noise_cost.measure(num_positions=positions, vocab_size=vocab_size, repeats=repeats)
    click.echo(f"{positions} positions x {vocab_size} tokens: {median_ms:.2f} ms (median of {repeats})")


@bench.command("compare")
@click.argument("old", type=_EXISTING_FILE)
@click.argument("new", type=_EXISTING_FILE)
def compare_command(old: Path, new: Path) -> None:
    """Put the rows of two results.json files side by side."""
    (old_provenance, old_rows), (new_provenance, new_rows) = read_rows(old), read_rows(new)
    console = _console()
    console.print(comparison_table(old_rows, new_rows))
    for line in differences(old_provenance, new_provenance):
        console.print(line, markup=False, highlight=False)


def _verifier(
    verifier: str | None, model: str, dtype: str, device: str, arguments: Sequence[str] = ()
) -> AbstractContextManager[str]:
    if verifier:
        return nullcontext(verifier)
    return _local_services(model, dtype, device, ("ngram",), service="verifier", verifier_args=arguments)


def _services(
    gateway: str | None, model: str, dtype: str, device: str, drafters: Sequence[str]
) -> AbstractContextManager[str]:
    return nullcontext(gateway) if gateway else _local_services(model, dtype, device, drafters)


@contextmanager
def _local_services(
    model: str,
    dtype: str,
    device: str,
    drafters: Sequence[str],
    service: str = "gateway",
    verifier_args: Sequence[str] = (),
) -> Iterator[str]:
    # Imported here: a run against a gateway elsewhere needs nothing of it.
    from specdec.local.launcher import LocalSystem

    started = time.monotonic()
    extra_args = {"verifier": verifier_args}
    with LocalSystem(
        model, dtype=dtype, device=device, drafters=drafters, extra_args=extra_args, report=_report
    ) as system:
        _report(f"Services ready in {time.monotonic() - started:.1f} s")
        yield system.verifier if service == "verifier" else system.gateway
        peaks = ", ".join(f"{name} {_peak_mib(pid):.0f} MiB" for name, pid in system.pids.items())
        _report(f"Peak resident memory: {peaks}")


def _peak_mib(pid: int) -> float:
    """Largest resident set of a process so far, MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _report(line: str) -> None:
    click.echo(line, err=True)


def _run_with_progress(
    config: BenchConfig, prompts: Sequence[Prompt], address: str, directory: Path
) -> Outcome:
    with _progress() as progress:
        task = progress.add_task("Warming up", total=None)

        def on_progress(done: int, total: int) -> None:
            progress.update(task, description="Requests", completed=done, total=total)

        return run_experiment(config, prompts, address, directory, on_progress)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def _show(outcome: Outcome, config: BenchConfig, directory: Path) -> None:
    console = _console()
    for table in (speed_table, parts_table, category_table):
        console.print(table(outcome.rows))
    for line in peer_ratios(outcome.rows, config.peers):
        console.print(line, highlight=False)
    if plots.has_matplotlib():
        plots.draw(outcome.rows, directory)
    else:
        click.echo(
            "Plots were skipped: matplotlib is not installed (pip install 'specdec[bench]').", err=True
        )
    click.echo(f"Results are in {directory}.", err=True)


def _judge(records: Sequence[RequestRecord]) -> None:
    """Warn of failed requests; fail if there is nothing else."""
    failed = [record for record in records if record.answer is None]
    if len(failed) == len(records):
        raise UnavailableError(f"All {len(records)} requests failed; the first: {failed[0].error}")
    for method in dict.fromkeys(record.method for record in failed):
        errors = [record.error for record in failed if record.method == method]
        num_requests = sum(record.method == method for record in records)
        click.echo(f"{method}: {len(errors)} of {num_requests} requests failed; first: {errors[0]}", err=True)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=_TABLE_WIDTH)
