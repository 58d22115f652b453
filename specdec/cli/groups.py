"""How the command line finds its commands and shows what goes wrong."""

from __future__ import annotations

import sys
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any, cast

import click

from specdec.cli.streams import report, standard_streams
from specdec.contract.errors import InvalidArgumentError, NotFoundError, SpecdecError
from specdec.models.extra import models_extra


class ErrorGroup(click.Group):
    """A group that shows what goes wrong as one clear message and an exit code."""

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run the program on streams that take any text; exit code 1 where a file cannot be used."""
        with standard_streams():
            try:
                return super().main(*args, **settings)
            except OSError as error:
                report(f"error: {error.filename or 'A file'} cannot be used: {error.strerror or error}.")
                sys.exit(1)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit code 2 for bad input, 1 for everything else that goes wrong."""
        try:
            with models_extra():
                return super().invoke(ctx)
        except SpecdecError as error:
            report(describe_error(error))
            ctx.exit(2 if isinstance(error, (InvalidArgumentError, NotFoundError)) else 1)


COMMAND_GROUP = "specdec.commands"
"""Entry points that name groups of commands, by their name on the command line."""


class LazyGroup(click.Group):
    """A group of commands behind an entry point of its name, loaded when one of them is asked for."""

    @cached_property
    def _group(self) -> click.Group:
        sources = entry_points(group=COMMAND_GROUP, name=self.name or "")
        if not sources:
            raise NotFoundError(
                f"`specdec {self.name}` is not installed here: no entry point {self.name!r} in "
                f"{COMMAND_GROUP!r}. Install the package anew: pip install --editable '.[models]'",
                reason="COMMAND_NOT_INSTALLED",
            )
        return cast(click.Group, next(iter(sources)).load())

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the module's commands."""
        return self._group.list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the module's command of that name."""
        return self._group.get_command(ctx, cmd_name)


def describe_error(error: SpecdecError) -> str:
    """Return what is shown of an error."""
    retry = f" Try again in {error.retry_after_s:g} s." if error.retry_after_s is not None else ""
    request = f" (request {error.request_id})" if error.request_id else ""
    return f"error: {error.message}{retry}{request}"
