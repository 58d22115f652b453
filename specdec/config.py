"""Service configuration: a frozen dataclass is checked here and becomes command-line options."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import Any, TypeVar

import click

from specdec.errors import InvalidArgumentError

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def config_options(
    config_type: type[Any], *, choices: Mapping[str, Sequence[str]] | None = None
) -> Callable[[CommandT], CommandT]:
    """Add one option per field: `max_sessions` is --max-sessions, its default and its docstring are the help.

    Fields whose default is a tuple may be given several times.
    """
    docs = _field_docs(config_type)

    def decorate(command: CommandT) -> CommandT:
        for entry in reversed(fields(config_type)):
            default = entry.default_factory() if entry.default_factory is not MISSING else entry.default
            kind: Any = type(default[0] if isinstance(default, tuple) and default else default)
            if choices and entry.name in choices:
                kind = click.Choice(list(choices[entry.name]))
            command = click.option(
                f"--{entry.name.replace('_', '-')}",
                entry.name,
                type=str if kind is tuple else kind,
                default=default,
                multiple=isinstance(default, tuple),
                help=docs.get(entry.name, ""),
            )(command)
        return command

    return decorate


def require_positive(config: object, *names: str) -> None:
    """Refuse fields that are not more than 0.

    Raises:
        InvalidArgumentError: naming the option.
    """
    for name in names:
        _require(getattr(config, name) > 0, config, name, "more than 0")


def require_not_negative(config: object, *names: str) -> None:
    """Refuse fields that are less than 0.

    Raises:
        InvalidArgumentError: naming the option.
    """
    for name in names:
        _require(getattr(config, name) >= 0, config, name, "0 or more")


def _require(is_right: bool, config: object, name: str, expected: str) -> None:
    if not is_right:
        option = f"--{name.replace('_', '-')}"
        raise InvalidArgumentError(f"{option} is {getattr(config, name)}; it must be {expected}.", field=name)


def _field_docs(config_type: type[Any]) -> dict[str, str]:
    """The string literal under each field, which Python itself does not keep."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(config_type)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    docs = {}
    for field_node, doc_node in pairwise(body):
        if (
            isinstance(field_node, ast.AnnAssign)
            and isinstance(field_node.target, ast.Name)
            and isinstance(doc_node, ast.Expr)
            and isinstance(doc_node.value, ast.Constant)
        ):
            docs[field_node.target.id] = " ".join(str(doc_node.value.value).split())
    return docs
