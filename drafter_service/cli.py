"""Command line of the drafter service."""

from __future__ import annotations

import sys

import click

from drafter_service.config import DrafterConfig
from specdec.config import config_options
from specdec.errors import SpecdecError
from specdec.runtime.loading import DTYPES, tune_process


@click.command(context_settings={"show_default": True})
@config_options(DrafterConfig, choices={"dtype": DTYPES})
def main(**options: object) -> None:
    """Serve drafters: each round, guess the tokens the target will pick next.

    Example: specdec-drafter --drafter ngram --drafter small=causal-lm:HuggingFaceTB/SmolLM2-135M-Instruct
    """
    tune_process()
    from drafter_service.server import DrafterServer
    from specdec.server import main_loop
    from specdec.telemetry import setup_logging, telemetry_from_environment

    try:
        config = DrafterConfig(**options)  # type: ignore[arg-type]
    except SpecdecError as error:
        raise click.UsageError(error.message) from error
    setup_logging("specdec-drafter", config.log_level)

    async def serve() -> None:
        await DrafterServer(config, telemetry_from_environment("specdec-drafter")).run()

    sys.exit(main_loop(serve))
