"""Command line of the gateway."""

from __future__ import annotations

import sys

import click

from gateway.config import GatewayConfig
from specdec.config import config_options
from specdec.errors import SpecdecError


@click.command(context_settings={"show_default": True})
@config_options(GatewayConfig)
def main(**options: object) -> None:
    """Serve clients: tokenise, run the draft-verify loop over the services, stream text.

    Example: specdec-gateway --verifier dns:///verifier:50051 --drafter dns:///drafter:50052
    """
    from gateway.server import GatewayServer
    from specdec.server import main_loop
    from specdec.telemetry import setup_logging, telemetry_from_environment

    try:
        config = GatewayConfig(**options)  # type: ignore[arg-type]
    except SpecdecError as error:
        raise click.UsageError(error.message) from error
    setup_logging("specdec-gateway", config.log_level)

    async def serve() -> None:
        await GatewayServer(config, telemetry_from_environment("specdec-gateway")).run()

    sys.exit(main_loop(serve))
