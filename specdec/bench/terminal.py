"""What the commands of `specdec bench` share on the command line and the terminal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from specdec.cli.files import OutputFolder
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
