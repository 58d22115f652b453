"""The command line of the verifier service."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from specdec.runtime.loading import DTYPES
from specdec.service.config import config_options, service_context
from specdec.service.tuning import tune_process
from verifier_service.config import VerifierConfig

if TYPE_CHECKING:
    from specdec.service.telemetry import Telemetry
    from verifier_service.server import VerifierServer


@click.command(context_settings=service_context("SPECDEC_VERIFIER"))
@config_options(VerifierConfig, choices={"dtype": DTYPES})
def main(**options: object) -> None:
    """Serve a target model: prefill prompts, verify drafts, pick tokens.

    Example: specdec-verifier --model google/gemma-4-31B-it --device cuda:0 --kv-cache-mib 16384
    """
    tune_process()
    # This import is slow and --help does not need it.
    from specdec.service.process import serve_from_command_line

    serve_from_command_line("specdec-verifier", VerifierConfig, options, _make_server)


def _make_server(config: VerifierConfig, telemetry: Telemetry) -> VerifierServer:
    # Imported here: it imports torch, and where that is missing, the process says so in its log.
    from verifier_service.server import VerifierServer

    return VerifierServer(config, telemetry)
