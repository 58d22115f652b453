"""The figures of `specdec bench telemetry`: samples, their ratios with intervals, and the file of them."""

from __future__ import annotations

import json
import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from specdec.bench.provenance import collect
from specdec.bench.workload import QuestionId

OFF, CONTROL, ON = "off", "control", "on"
SERVICES = ("gateway", "drafter", "verifier")
_NUM_RESAMPLES = 5000
_CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class RequestTime:
    """The time of one request."""

    restart: int
    """Index of the start of the systems, from 0."""
    arm: str
    """The system that answered: off, control or on."""
    question_id: QuestionId
    """Id of the prompt."""
    tpot_ms: float
    """Mean time per output token after the first, milliseconds."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The CPU time of one service over all requests to its system."""

    restart: int
    """Index of the start of the systems, from 0."""
    arm: str
    """The system: off, control or on."""
    service: str
    """The service: gateway, drafter or verifier."""
    cpu_ms_per_token: float
    """CPU time of the service's process per output token, milliseconds. It depends far less on chance than
    TPOT does."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """TPOT of one system over another's."""

    median: float
    """Median over pairs of requests."""
    low: float
    """Lower end of the median's 95 % interval."""
    high: float
    """Upper end of the median's 95 % interval."""
    num_pairs: int
    """Number of pairs: requests of the same prompt after the same start."""


def ratio(samples: Sequence[RequestTime], arm: str, base: str = OFF) -> Ratio:
    """Compare the TPOT of `arm` with that of `base`, prompt by prompt.

    The interval comes from a bootstrap that draws restarts, then pairs of each: pairs of one restart are
    alike.
    """
    tpot_ms = {(sample.restart, sample.question_id, sample.arm): sample.tpot_ms for sample in samples}
    by_restart: dict[int, list[float]] = defaultdict(list)
    for restart, question_id, name in tpot_ms:
        if name == arm:
            pair = tpot_ms[restart, question_id, arm] / tpot_ms[restart, question_id, base]
            by_restart[restart].append(math.log(pair))
    groups = list(by_restart.values())
    draw = random.Random(0)
    medians = sorted(median(_resampled(groups, draw)) for _ in range(_NUM_RESAMPLES))
    tail = int((1 - _CONFIDENCE) / 2 * _NUM_RESAMPLES)
    pairs = [value for group in groups for value in group]
    return Ratio(math.exp(median(pairs)), math.exp(medians[tail]), math.exp(medians[-1 - tail]), len(pairs))


def _resampled(groups: Sequence[Sequence[float]], draw: random.Random) -> list[float]:
    """Draw as many groups as there are, with replacement, and as many values of each as it has, likewise."""
    drawn = draw.choices(groups, k=len(groups))
    return [value for group in drawn for value in draw.choices(group, k=len(group))]


def median_tpot_ms(samples: Sequence[RequestTime], arm: str) -> float:
    """Return the median TPOT of a system over its answers."""
    return median(sample.tpot_ms for sample in samples if sample.arm == arm)


def cpu_ms_per_token(costs: Sequence[Cost], arm: str, service: str) -> float:
    """Return the median CPU time of a service per token over the restarts, milliseconds."""
    return median(cost.cpu_ms_per_token for cost in costs if (cost.arm, cost.service) == (arm, service))


def write(
    directory: Path, samples: Sequence[RequestTime], costs: Sequence[Cost], settings: Mapping[str, Any]
) -> None:
    """Write telemetry.json: provenance, settings, ratios, every sample and every cost."""
    directory.mkdir(parents=True, exist_ok=True)
    results = {
        "provenance": collect() | dict(settings),
        "on_over_off": asdict(ratio(samples, ON)),
        "control_over_off": asdict(ratio(samples, CONTROL)),
        "samples": [asdict(sample) for sample in samples],
        "costs": [asdict(cost) for cost in costs],
    }
    (directory / "telemetry.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
