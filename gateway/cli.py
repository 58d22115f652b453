"""Command line of the gateway."""

from __future__ import annotations

import click

from gateway.config import GatewayConfig
from specdec.service.config import config_options, service_context


@click.command(context_settings=service_context("SPECDEC_GATEWAY"))
@config_options(GatewayConfig)
def main(**options: object) -> None:
    """Serve clients: tokenise, run the draft-verify loop over the services, stream text.

    Example: specdec-gateway --verifier dns:///verifier:50051 --drafter dns:///drafter:50052
    """
    # These are imported here because --help needs none of them.
    from gateway.server import GatewayServer
    from specdec.service.process import serve_from_command_line
    from specdec.service.tuning import return_freed_memory

    return_freed_memory()
    serve_from_command_line("specdec-gateway", GatewayConfig, options, GatewayServer)
