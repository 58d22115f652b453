"""`specdec bench telemetry`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from specdec.bench import telemetry_cost
from specdec.bench.telemetry_cost import CONTROL, OFF, ON, SERVICES, TelemetryConfig
from specdec.bench.workload import load_prompts, select_round_robin
from specdec.local.launcher import SystemConfig, prepare_models

_DEFAULTS = TelemetryConfig()


@click.command("telemetry")
@click.option("--model", default=_DEFAULTS.model, show_default=True, help="Model to start.")
@click.option("--dtype", default=_DEFAULTS.dtype, show_default=True, help="Data type of the model.")
@click.option("--device", default=_DEFAULTS.device, show_default=True, help="Device of the model.")
@click.option("--method", default=_DEFAULTS.method, show_default=True, help="Method of the requests.")
@click.option(
    "--draft-depth",
    type=click.IntRange(min=1),
    default=_DEFAULTS.draft_depth,
    show_default=True,
    help="Draft tokens per round (K).",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=2),
    default=_DEFAULTS.max_new_tokens,
    show_default=True,
    help="Tokens per answer.",
)
@click.option(
    "--prompts",
    "num_prompts",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="Prompts per start, round-robin over the categories.",
)
@click.option(
    "--restarts",
    type=click.IntRange(min=1),
    default=_DEFAULTS.restarts,
    show_default=True,
    help="Starts of all systems.",
)
@click.option(
    "--scrape-interval-s",
    type=click.FloatRange(min=0.1),
    default=_DEFAULTS.scrape_interval_s,
    show_default=True,
    help="Time between two scrapes, seconds.",
)
@click.option(
    "--out",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder for telemetry.json.",
)
def telemetry_command(num_prompts: int, directory: Path, **settings: Any) -> None:
    """Measure what telemetry costs: TPOT with traces, metrics and scrapes over TPOT without, and the CPU time
    of each service.

    Three systems run side by side and answer the same prompts in turn, one request at a time: one with
    telemetry and two without. The ratio of these two shows what is chance. On a busy machine the result means
    nothing.
    """
    config = TelemetryConfig(**settings)
    prepare_models(SystemConfig(model=config.model, drafters=config.drafters), _report)
    prompts = select_round_robin(load_prompts(), num_prompts)
    samples, costs = telemetry_cost.measure(
        config, prompts, lambda done, total: _report(f"Start {done} of {total} done")
    )
    telemetry_cost.write(directory, samples, costs, asdict(config) | {"num_prompts": len(prompts)})
    for arm, name in ((CONTROL, "off again"), (ON, "on")):
        one = telemetry_cost.ratio(samples, arm)
        click.echo(
            f"TPOT, telemetry {name} / off: {one.median:.4f} (95 % interval {one.low:.4f} to {one.high:.4f}, "
            f"{one.num_pairs} pairs)"
        )
    tpot_ms = telemetry_cost.median_tpot_ms(samples, OFF)
    for service in SERVICES:
        off, again, on = (telemetry_cost.cpu_ms_per_token(costs, arm, service) for arm in (OFF, CONTROL, ON))
        share = (on - (off + again) / 2) / tpot_ms
        click.echo(
            f"CPU ms a token, {service}: {off:.3f} off, {again:.3f} off again, {on:.3f} on "
            f"({share:+.2%} of a TPOT of {tpot_ms:.1f} ms)"
        )


def _report(line: str) -> None:
    click.echo(line, err=True)
