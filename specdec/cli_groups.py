"""How the command line finds its commands and shows what goes wrong."""

from __future__ import annotations

import importlib
from functools import cached_property
from typing import Any, cast

import click

from specdec.errors import InvalidArgumentError, NotFoundError, SpecdecError


class ErrorGroup(click.Group):
    """A group that shows the project's errors as one clear message and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; exit code 2 for bad input, 1 for everything else that goes wrong."""
        try:
            return super().invoke(ctx)
        except SpecdecError as error:
            click.echo(describe_error(error), err=True)
            ctx.exit(2 if isinstance(error, (InvalidArgumentError, NotFoundError)) else 1)


class LazyGroup(click.Group):
    """A group of a module that is imported only when one of its commands is asked for."""

    def __init__(self, *args: Any, source: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._source = source

    @cached_property
    def _group(self) -> click.Group:
        module, _, name = self._source.partition(":")
        return cast(click.Group, getattr(importlib.import_module(module), name))

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the module's commands."""
        return self._group.list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The module's command of that name."""
        return self._group.get_command(ctx, cmd_name)


def describe_error(error: SpecdecError) -> str:
    """What is shown of an error."""
    retry = f" Try again in {error.retry_after_s:g} s." if error.retry_after_s is not None else ""
    return f"error: {error.message}{retry}"
