"""`specdec bench telemetry`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from specdec.bench import telemetry_cost, telemetry_report
from specdec.bench.telemetry_cost import TelemetryConfig
from specdec.bench.telemetry_report import CONTROL, OFF, ON, SERVICES
from specdec.bench.terminal import out_option
from specdec.bench.workload import load_prompts, select_round_robin
from specdec.cli.numbers import integers, numbers
from specdec.cli.streams import report, show
from specdec.local.launcher import SystemConfig, prepare_models

_DEFAULTS = TelemetryConfig()


@click.command("telemetry")
@click.option("--model", default=_DEFAULTS.model, show_default=True, help="Model to start.")
@click.option("--dtype", default=_DEFAULTS.dtype, show_default=True, help="Data type of the model.")
@click.option("--device", default=_DEFAULTS.device, show_default=True, help="Device of the model.")
@click.option(
    "--method", default=_DEFAULTS.method, show_default=True, help="Method that all requests ask for."
)
@click.option(
    "--draft-depth",
    type=integers(1),
    default=_DEFAULTS.draft_depth,
    show_default=True,
    help="Number of draft tokens in a round (K).",
)
@click.option(
    "--max-new-tokens",
    type=integers(2),
    default=_DEFAULTS.max_new_tokens,
    show_default=True,
    help="Number of tokens in an answer.",
)
@click.option(
    "--prompts",
    "num_prompts",
    type=integers(1),
    default=12,
    show_default=True,
    help="Number of prompts after each start, round-robin over the categories.",
)
@click.option(
    "--restarts",
    type=integers(1),
    default=_DEFAULTS.restarts,
    show_default=True,
    help="How often all systems are started.",
)
@click.option(
    "--scrape-interval-s",
    type=numbers(0.1),
    default=_DEFAULTS.scrape_interval_s,
    show_default=True,
    help="Time between two scrapes, seconds.",
)
@out_option("telemetry.json")
def telemetry_command(num_prompts: int, directory: Path, **settings: Any) -> None:
    """Measure what telemetry costs: TPOT with traces, metrics and scrapes over TPOT without, and the CPU time
    of each service.

    Three systems run side by side and answer the same prompts in turn, one request at a time: one with
    telemetry and two without. The ratio of these two shows what is chance. On a busy machine the result means
    nothing.
    """
    config = TelemetryConfig(**settings)
    prepare_models(SystemConfig(model=config.model, drafters=config.drafters), report)
    prompts = [replace(prompt, later_turns=()) for prompt in select_round_robin(load_prompts(), num_prompts)]
    samples, costs = telemetry_cost.measure(
        config, prompts, lambda done, total: report(f"Start {done} of {total} done")
    )
    telemetry_report.write(directory, samples, costs, asdict(config) | {"num_prompts": len(prompts)})
    for arm, name in ((CONTROL, "off again"), (ON, "on")):
        found = telemetry_report.ratio(samples, arm)
        show(
            f"TPOT, telemetry {name} / off: {found.median:.4f} (95 % interval {found.low:.4f} to "
            f"{found.high:.4f}, {found.num_pairs} pairs)"
        )
    tpot_ms = telemetry_report.median_tpot_ms(samples, OFF)
    for service in SERVICES:
        off, again, on = (
            telemetry_report.cpu_ms_per_token(costs, arm, service) for arm in (OFF, CONTROL, ON)
        )
        share = (on - (off + again) / 2) / tpot_ms
        show(
            f"CPU ms a token, {service}: {off:.3f} off, {again:.3f} off again, {on:.3f} on "
            f"({share:+.2%} of a TPOT of {tpot_ms:.1f} ms)"
        )
