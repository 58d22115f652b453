"""The command line of the verifier service."""

from __future__ import annotations

import click

from specdec.runtime.loading import DTYPES
from specdec.service.config import config_options
from specdec.service.tuning import tune_process
from verifier_service.config import VerifierConfig


@click.command(context_settings={"show_default": True, "auto_envvar_prefix": "SPECDEC_VERIFIER"})
@config_options(VerifierConfig, choices={"dtype": DTYPES})
def main(**options: object) -> None:
    """Serve a target model: prefill prompts, verify drafts, pick tokens.

    Example: specdec-verifier --model google/gemma-4-31B-it --device cuda:0 --kv-cache-mib 16384
    """
    tune_process()
    # These imports are slow and --help does not need them.
    from specdec.service.process import serve_from_command_line
    from verifier_service.server import VerifierServer

    serve_from_command_line("specdec-verifier", VerifierConfig, options, VerifierServer)
