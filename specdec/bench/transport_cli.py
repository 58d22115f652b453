"""`specdec bench transport`."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from specdec.bench import geometry, transport, transport_report
from specdec.bench.services import verifier_at
from specdec.bench.terminal import CommaList, out_option, progress_bar, shown_in, table_console
from specdec.cli.numbers import integers, numbers
from specdec.contract.errors import InvalidArgumentError

_DEFAULTS = transport.TransportConfig(model="default")


@click.command("transport")
@click.option(
    "--verifier",
    help="Address of a running, idle verifier on this host, whose model --models names.  "
    "[default: start a verifier for each model]",
)
@click.option(
    "--models",
    type=CommaList(str),
    default=",".join((_DEFAULTS.model, *geometry.GEOMETRIES)),
    show_default=True,
    help="Models, separated by commas; gemma4-31b-geometry is made for the run, with random weights and with "
    "state as large as that of Gemma 4 31B.",
)
@click.option("--dtype", default="bfloat16", show_default=True, help="Data type of the models to start.")
@click.option("--device", default="cpu", show_default=True, help="Device of the verifier and the reader.")
@click.option(
    "--kv-cache-mib",
    type=numbers(0, above=True),
    default=512.0,
    show_default=True,
    help="Memory for the KV pool of a verifier to start, MiB.",
)
@click.option(
    "--shared-dir",
    default=_DEFAULTS.shared_dir,
    show_default=True,
    help="Memory-backed directory of the handles.",
)
@click.option(
    "--prefill-tokens",
    type=integers(1),
    default=_DEFAULTS.prefill_tokens,
    show_default=True,
    help="Number of tokens in the prompt.",
)
@click.option(
    "--round-tokens",
    type=integers(1),
    default=_DEFAULTS.round_tokens,
    show_default=True,
    help="Number of new tokens in a round: its whole draft and the bonus.",
)
@click.option(
    "--prefills",
    type=integers(1),
    default=_DEFAULTS.prefills,
    show_default=True,
    help="Number of new readers for each row; each gets the state of the whole prompt.",
)
@click.option(
    "--repeats",
    type=integers(1),
    default=_DEFAULTS.repeats,
    show_default=True,
    help="Number of rounds for each row.",
)
@out_option("transport.json and transport.md")
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
    rows: list[transport_report.TransportRow] = []
    for name in models:
        with geometry.prepared_model(name) as model:
            config = transport.TransportConfig(model=model, **settings)
            with (
                verifier_at(verifier, model, dtype, config.device, verifier_args) as address,
                progress_bar() as progress,
            ):
                on_progress = shown_in(progress, progress.add_task(f"Rows of {name}", total=None))
                rows += asyncio.run(transport.measure(address, config, on_progress))
    transport_report.write(directory, rows, {"models": models, "dtype": dtype, **settings})
    table = transport_report.table(
        rows, round_tokens=settings["round_tokens"], prefill_tokens=settings["prefill_tokens"]
    )
    table_console().print(table)
