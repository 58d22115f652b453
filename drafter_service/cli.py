"""Command line of the drafter service."""

from __future__ import annotations

import click

from drafter_service.config import STREAM_FEATURES, DrafterConfig
from specdec.runtime.loading import DTYPES
from specdec.service.config import config_options, service_context
from specdec.service.tuning import tune_process


@click.command(context_settings=service_context("SPECDEC_DRAFTER"))
@config_options(DrafterConfig, choices={"dtype": DTYPES, "stream_features": STREAM_FEATURES})
def main(**options: object) -> None:
    """Serve drafters: each round, guess the tokens the target will pick next.

    Example: specdec-drafter --drafter ngram --drafter small=causal-lm:HuggingFaceTB/SmolLM2-135M-Instruct
    """
    tune_process()
    # Imported here: --help needs none of it.
    from drafter_service.server import DrafterServer
    from specdec.service.process import serve_from_command_line

    serve_from_command_line("specdec-drafter", DrafterConfig, options, DrafterServer)
