"""Commands about the system: start it, look at it, stop it."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from specdec.cli.numbers import integers, numbers
from specdec.cli.options import connection_options
from specdec.cli.render import console, info_tables
from specdec.cli.streams import report, show, show_json
from specdec.client import Client
from specdec.local.launcher import SystemConfig, default_drafters, prepare_models
from specdec.local.processes import warnings_in
from specdec.local.state_file import SystemState, how_to_stop, refuse_if_running
from specdec.local.up import run_detached, run_foreground, stop_running, stop_starting
from specdec.models.embedded import DEFAULT_MODEL
from specdec.service.config import MAX_THREADS

DETACH_MARGIN_S = 30.0
"""Seconds a detached supervisor has beyond its own timeout, for starting up itself."""


@click.command()
@click.option(
    "--model",
    default=DEFAULT_MODEL,
    show_default=True,
    help="Target model: folder, Hugging Face id, or `default`, the embedded SmolLM2-135M-Instruct.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Weight data type.",
)
@click.option("--device", default="cpu", show_default=True, help="Device of the target: cpu, cuda:0.")
@click.option(
    "--drafter",
    "drafters",
    multiple=True,
    help="Drafter to load, `ngram`, `ngram-lm[:MODEL]`, `mtp[:MODEL]`, `dflash[:MODEL]`, `causal-lm:MODEL`; "
    "may be repeated.  [default: ngram, and ngram-lm, mtp and dflash for the embedded model]",
)
@click.option(
    "--target-state",
    type=click.Choice(["auto", "handle", "stream"]),
    default="auto",
    show_default=True,
    help="How drafters read the target's hidden states and KV: mapped, or as a stream.",
)
@click.option(
    "--threads",
    type=integers(0, MAX_THREADS),
    default=0,
    help="CPU threads of verifier and drafter each; one is faster where other programs keep the cores busy.  "
    "[default: one per core that they may use]",
)
@click.option(
    "--kv-cache-mib",
    type=numbers(0, 2**24, above=True),
    help="Memory of the target's KV, MiB.  [default: the verifier's]",
)
@click.option(
    "--port",
    "gateway_port",
    type=integers(0, 65535),
    default=0,
    help="Port of the gateway on 127.0.0.1.  [default: a free one]",
)
@click.option(
    "--http-port",
    type=integers(0, 65535),
    default=0,
    help="Port of the gateway's OpenAI-compatible HTTP interface on 127.0.0.1.  [default: a free one, if the "
    "extra `http` is installed]",
)
@click.option("--detach", is_flag=True, help="Return once all services are ready; `specdec down` stops them.")
@click.option(
    "--timeout",
    "ready_timeout_s",
    type=numbers(0, 86_400, above=True),
    default=120.0,
    show_default=True,
    help="Seconds the services have to become ready.",
)
def up(detach: bool, **options: Any) -> None:
    """Start verifier, drafter and gateway on this machine.

    Services that die are started again; Ctrl-C stops all of them, once running answers
    have finished. The other commands find the gateway by themselves.

    \b
    Examples:
      specdec up
      specdec up --detach --port 50050
      specdec up --model ./my-model --drafter ngram --drafter causal-lm:./my-small-model
    """
    options["drafters"] = options["drafters"] or default_drafters(options["model"])
    # A verifier that dies comes back in its place, once it has loaded.
    config = SystemConfig(**options, extra_args={"gateway": ("--failover-wait-s", "60")})
    refuse_if_running()
    if detach:
        state = run_detached(
            _foreground_command(config),
            timeout_s=config.ready_timeout_s + DETACH_MARGIN_S,
            prepare=lambda: _prepare(config),
        )
        _announce(state, f"`{how_to_stop()}` stops it.")
    else:
        report("Starting verifier, drafter and gateway.")
        run_foreground(config, report=report, announce=lambda state: _announce(state, "Ctrl-C stops it."))


def _prepare(config: SystemConfig) -> None:
    prepare_models(config, report)
    report("Starting verifier, drafter and gateway.")


def _foreground_command(config: SystemConfig) -> list[str]:
    drafters = [argument for drafter in config.drafters for argument in ("--drafter", drafter)]
    kv_cache = () if config.kv_cache_mib is None else ("--kv-cache-mib", str(config.kv_cache_mib))
    # -P: a folder named specdec or gateway where the user stands is not meant.
    return [
        *(sys.executable, "-P", "-m", "specdec", "up"),
        *("--model", config.model, "--dtype", config.dtype, "--device", config.device, *drafters),
        *("--target-state", config.target_state, "--threads", str(config.threads), *kv_cache),
        *("--port", str(config.gateway_port), "--http-port", str(config.http_port)),
        *("--timeout", str(config.ready_timeout_s)),
    ]


def _announce(state: SystemState, hint: str) -> None:
    # Not the gateway's, which warns while it waits for the others.
    for name in ("verifier", "drafter"):
        for warning in warnings_in(Path(state.log_dir) / f"{name}.log"):
            report(f"warning: {name}: {warning}")
    http = f"  http {state.http}/v1" if state.http else ""
    show(f"gateway {state.gateway}  verifier {state.verifier}  drafter {state.drafter}{http}")
    report(f"Ready. Logs are in {state.log_dir}. {hint}")


@click.command()
def down() -> None:
    """Stop what `specdec up` started; running answers may finish."""
    if state := stop_running():
        report(f"Stopped the system with its gateway on {state.gateway}.")
    elif stop_starting():
        report("Stopped a system that was starting.")
    else:
        report("Nothing is running.")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@connection_options
def info(as_json: bool, gateway: str, timeout_s: float) -> None:
    """Show the model, the methods, and the replicas with their load."""
    with Client(gateway, timeout_s=timeout_s) as client:
        system = client.info()
    if as_json:
        show_json(asdict(system))
        return
    for table in info_tables(system):
        console(no_color=False).print(table)
