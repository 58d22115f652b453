"""What the commands of `specdec bench` share on the command line and the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from specdec.cli.files import OutputFolder
from specdec.cli.numbers import integers
from specdec.contract.bounds import MAX_NUMBER, bound_passed

EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_TABLE_WIDTH = 160
"""Width of a table in characters where the output is not a terminal with a width of its own."""


class CommaList(click.ParamType[Any]):
    """Values separated by commas, each of the same type; blanks are dropped.

    Args:
        low: the least of numbers; the largest is MAX_NUMBER.
    """

    def __init__(self, item: type[str] | type[int] | type[float], low: int = 0) -> None:
        self._item = item
        self._low = low
        self.name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the values as a tuple."""
        if isinstance(value, tuple):
            return value
        try:
            items = tuple(self._item(part.strip()) for part in value.split(",") if part.strip())
        except ValueError:
            kind = "integers such as 1,4,8" if self._item is int else "numbers such as 0.5,1,2"
            self.fail(f"{value!r} is not a list of {kind}.", param, ctx)
        for item in items:
            if not isinstance(item, str) and (passed := bound_passed(item, self._low, MAX_NUMBER)):
                self.fail(f"{item} must be {passed}.", param, ctx)
        return items


def out_option(files: str) -> Callable[..., Any]:
    """Return the option --out: the folder for a command's files."""
    return click.option(
        "--out",
        "directory",
        type=OutputFolder(),
        required=True,
        help=f"Folder for {files}.",
    )


gateway_option = click.option(
    "--gateway", help="Address of a running gateway.  [default: start the services for the run]"
)
"""The option --gateway of commands that start services where it is left out."""

dtype_option = click.option(
    "--dtype", default="bfloat16", show_default=True, help="Data type of the model to start."
)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="Device of the model to start."
)

limit_option = click.option(
    "--limit",
    type=integers(1),
    help="Number of prompts to use, round-robin over the categories.  [default: all]",
)

temperature_option = click.option(
    "--temperature", type=float, default=0.0, show_default=True, help="Softmax temperature; 0 is greedy."
)


def max_new_tokens_option(default: int) -> Callable[..., Any]:
    """Return the option --max-new-tokens."""
    return click.option(
        "--max-new-tokens",
        type=integers(1),
        default=default,
        show_default=True,
        help="Most tokens of an answer.",
    )


def progress_bar() -> Progress:
    """Return a progress bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))


def lines_above(progress: Progress) -> Callable[[str], None]:
    """Return a callback that prints a line above a progress bar that is shown."""
    return lambda line: progress.console.print(line, soft_wrap=True, markup=False, highlight=False)


def shown_in(progress: Progress, task: TaskID, description: str | None = None) -> Callable[[int, int], None]:
    """Return a callback that shows what is done, and of how much, in a bar.

    Args:
        description: what the bar says from the first call on; None: what it said before.
    """

    def on_progress(done: int, total: int) -> None:
        progress.update(task, description=description, completed=done, total=total)

    return on_progress


def table_console() -> Console:
    """Return the console for tables: stdout."""
    console = Console()
    return console if console.is_terminal else Console(width=_TABLE_WIDTH)
