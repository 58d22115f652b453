"""Command line of the verifier service."""

from __future__ import annotations

import sys

import click

from specdec.config import config_options
from specdec.errors import SpecdecError
from specdec.runtime.loading import DTYPES, tune_process
from verifier_service.config import VerifierConfig


@click.command(context_settings={"show_default": True})
@config_options(VerifierConfig, choices={"dtype": DTYPES})
def main(**options: object) -> None:
    """Serve a target model: prefill prompts, verify drafts, pick tokens.

    Example: specdec-verifier --model google/gemma-4-31B-it --device cuda:0 --kv-cache-mib 16384
    """
    tune_process()
    from specdec.server import main_loop
    from specdec.telemetry import setup_logging, telemetry_from_environment
    from verifier_service.server import VerifierServer

    try:
        config = VerifierConfig(**options)  # type: ignore[arg-type]
    except SpecdecError as error:
        raise click.UsageError(error.message) from error
    setup_logging("specdec-verifier", config.log_level)

    async def serve() -> None:
        await VerifierServer(config, telemetry_from_environment("specdec-verifier")).run()

    sys.exit(main_loop(serve))
