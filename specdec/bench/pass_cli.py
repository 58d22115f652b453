"""`specdec bench pass`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from specdec.bench import verify_pass
from specdec.bench.peers.engines import require_usable
from specdec.bench.services import verifier_at
from specdec.bench.terminal import (
    CommaList,
    device_option,
    dtype_option,
    lines_above,
    out_option,
    progress_bar,
    shown_in,
    table_console,
)
from specdec.cli.numbers import integers
from specdec.contract.errors import InvalidArgumentError


@click.command("pass")
@click.option("--verifier", help="Address of a running, idle verifier.  [default: start one for the run]")
@click.option("--model", default="default", show_default=True, help="Model to start.")
@dtype_option
@device_option
@click.option(
    "--tokens",
    "sizes",
    type=CommaList(int),
    default="1,2,4,8,9,16,32",
    show_default=True,
    help="Tokens in a pass, K + 1 each; the others are compared with the first.",
)
@click.option(
    "--context",
    "context_tokens",
    type=integers(1),
    default=256,
    show_default=True,
    help="Number of tokens in the KV cache at the start.",
)
@click.option(
    "--repeats",
    type=integers(1),
    default=50,
    show_default=True,
    help="Number of rounds for each size.",
)
@click.option("--trees", "with_trees", is_flag=True, help="Measure each size as a draft tree as well.")
@click.option(
    "--peers",
    type=CommaList(str),
    default="",
    help="Engines that take turns with passes of the same sizes over --model: transformers, openvino or "
    "both, separated by a comma.",
)
@out_option("pass.json and pass.png")
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
    require_usable(peers)
    with verifier_at(verifier, model, dtype, device) as address, progress_bar() as progress:
        figures = verify_pass.measure(
            address,
            **settings,
            model=model,
            peers=peers,
            on_progress=shown_in(progress, progress.add_task("Turns", total=None)),
            report=lines_above(progress),
        )
    started_with = {"model": model, "dtype": dtype, "device": device, "peers": figures.peers}
    verify_pass.write(directory, figures.rows, started_with | settings)
    table_console().print(verify_pass.table(figures.rows))
