"""Print docs/configuration.md: every option of the services and of `specdec`, as the code has them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import click

SERVICES = ("specdec-gateway", "specdec-verifier", "specdec-drafter")
CLIENT = "specdec"

INTRODUCTION = """\
# Configuration

<!-- `make docs` writes this file from the code; change the help texts there. -->

You can give every option of a service on the command line or in the environment; the command line wins. In
the environment, an option that may be given several times takes a list separated by blanks. A service that is
given an unusable value does not start, and its message names the option. Each command prints its part of this
page with `--help`.

"""

VARIABLES = """\
## Environment variables

These variables have no option. The first seven are read by the commands and the Python client.

| variable | meaning |
|---|---|
| `SPECDEC_GATEWAY` | Address of the gateway, where none is given. |
| `SPECDEC_TOKEN` | Bearer token for the gateway ([security.md](security.md#callers)). |
| `SPECDEC_TLS_AUTHORITIES` | Authorities that must have signed the gateway's certificate, a PEM file. |
| `SPECDEC_TLS_CERTIFICATE` | Certificate that the client shows, a PEM file. |
| `SPECDEC_TLS_PRIVATE_KEY` | The certificate's private key, a PEM file. |
| `SPECDEC_TLS_SERVER_NAME` | Name that the gateway's certificate must carry. |
| `SPECDEC_STATE_DIR` | Folder where `specdec up` notes its gateway's address. Default: the user's own. |
| `SPECDEC_CACHE_DIR` | Folder of converted and exported models, and of digests. Default: the user's cache. |
| `OTEL_*` | Where services send traces and metrics ([serving.md](serving.md#telemetry)). |
"""


def render() -> str:
    """Return the whole document."""
    sections = ["## Services\n\n", *(section for name in SERVICES for section in _sections(name))]
    sections += ["## Commands\n\n", *_sections(CLIENT), VARIABLES]
    return INTRODUCTION + "".join(sections)


def program(name: str) -> click.Command:
    """Return the command that an installed program runs."""
    (entry_point,) = distribution("specdec").entry_points.select(group="console_scripts", name=name)
    command = entry_point.load()
    assert isinstance(command, click.Command), name
    return command


def leaves(
    name: str, command: click.Command, parent: click.Context | None = None
) -> Iterator[tuple[str, click.Context]]:
    """Yield the commands of a program that are not groups, by the words one types."""
    # Of its parent a command has the names of its option for help, which it keeps from the first context on.
    context = click.Context(command, parent, name, **command.context_settings)
    if not isinstance(command, click.Group):
        yield name, context
        return
    for child in command.list_commands(context):
        if found := command.get_command(context, child):
            yield from leaves(f"{name} {child}", found, context)


def _sections(name: str) -> Iterator[str]:
    for words, context in leaves(name, program(name)):
        usage = " ".join([words, *context.command.collect_usage_pieces(context)])
        yield f"### {words}\n\n{_description(context.command)}\n\n`{usage}`\n\n"
        yield from _table(context)


def _table(context: click.Context) -> Iterator[str]:
    options = [option for option in context.command.params if isinstance(option, click.Option)]
    if not options:
        return
    has_variables = bool(context.auto_envvar_prefix)
    columns = ["option", *(["environment variable"] if has_variables else []), "default", "meaning"]
    yield _row(columns) + "|" + "---|" * len(columns) + "\n"
    for option in options:
        variable = [f"`{context.auto_envvar_prefix}_{option.name}`".upper()] if has_variables else []
        default, meaning = _default_and_meaning(option, context)
        yield _row([_spelling(option, context), *variable, default, meaning])
    yield "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |\n"


def _description(command: click.Command) -> str:
    """Return a command's help without its examples."""
    paragraphs = inspect.cleandoc(command.help or "").partition("\b")[0].split("\n\n")
    kept = (" ".join(lines.split()) for lines in paragraphs if not lines.startswith("Example"))
    return "\n\n".join(paragraph for paragraph in kept if paragraph)


def _spelling(option: click.Option, context: click.Context) -> str:
    value = "" if option.is_flag else f" {option.make_metavar(context).removesuffix(' RANGE')}"
    return ", ".join(f"`{name}{value}`" for name in option.opts)


def _default_and_meaning(option: click.Option, context: click.Context) -> tuple[str, str]:
    """Separate the two: a default may be a value, words of the option's own, or the end of its help text."""
    meaning = " ".join((option.help or "").split())
    if written := re.search(r" \[default: (.+)\]$", meaning):
        return written[1], meaning[: written.start()]
    if isinstance(option.show_default, str):
        return option.show_default, meaning
    return "required" if option.required else _shown(option.get_default(context)), meaning


def _shown(default: object) -> str:
    """Return a default value as one types it, or an empty string if nothing is set."""
    if isinstance(default, (tuple, list)):
        return " ".join(map(_shown, default))
    if isinstance(default, float):
        return f"`{default:g}`"
    # click marks an option without a default by an object of its own.
    is_value = isinstance(default, (str, int, Path)) and default is not False and default != ""
    return f"`{default}`" if is_value else ""


if __name__ == "__main__":
    print(render(), end="")
