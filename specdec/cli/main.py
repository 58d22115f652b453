"""The command line, `specdec`: one module per group of commands, put together here."""

from __future__ import annotations

import click

from specdec.cli.answers import chat, compare, generate
from specdec.cli.doctor import doctor
from specdec.cli.groups import ErrorGroup, LazyGroup
from specdec.cli.system import down, info, up
from specdec.cli.tokens import token


@click.group(
    cls=ErrorGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(package_name="specdec")
def main() -> None:
    """Speculative decoding as services: a drafter guesses, the target verifies, the text is the target's own.

    \b
    Start the three services here, ask something, look, stop:
      specdec up --detach
      specdec generate "Write a haiku about rivers."
      specdec compare "List the primes below 50." --methods none,ngram
      specdec info
      specdec down
    """


for command in (up, down, info, doctor, generate, compare, chat, token):
    main.add_command(command)
main.add_command(
    LazyGroup(
        "bench",
        help="Measure methods on a set of prompts: `specdec bench run --methods ngram --out results`.",
    )
)
main.add_command(
    LazyGroup(
        "train",
        help="Train a drafter for a model from its own answers: `specdec train mtp --out my-drafter`.",
    )
)
