"""The choice among methods: replayed on recorded traces it is nearly as fast as the best fixed choice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.rounds.controller import Controller, FixedSize
from gateway.rounds.option import Candidate
from gateway.rounds.vocabulary import PLAIN_SIZE, DraftSize, SizeControl
from specdec.bench.capacity_costs import DEFAULT_TRACE
from specdec.bench.trace import Trace
from tests.unit.replay import Replay

TRACES = [DEFAULT_TRACE, *sorted(Path(__file__).with_name("traces").glob("*.json"))]
CASES = [
    pytest.param(path, concurrency, id=f"{path.stem}-{concurrency}")
    for path in TRACES
    for concurrency in Trace.read(path).arms[0].costs
]
NUM_ANSWERS = 96
LONG = 400
"""Answers of the choice, which includes what finding out costs."""


class Replica:
    """Stands for a verifier."""


def chooser(replay: Replay) -> Callable[[], SizeControl]:
    """Return what makes the control of each session, over one gateway's knowledge."""
    controller, replica = Controller(), Replica()
    candidates = [
        Candidate(
            method,
            DraftSize(min(3, replay.depths[-1]), method=method),
            longest=replay.depths[-1],
            budgets=tuple(replay.budgets),
            shares_processor=False,
        )
        for method in replay.methods
    ]
    return lambda: controller.session(replica, candidates)


def fixed_sizes(replay: Replay) -> list[DraftSize]:
    return [
        PLAIN_SIZE,
        *(
            DraftSize(depth, budget, method=method)
            for method in replay.methods
            for budget in replay.budgets
            for depth in range(1, replay.depths[-1] + 1)
        ),
    ]


def fixed(size: DraftSize) -> Callable[[], SizeControl]:
    return lambda: FixedSize(size)


def test_there_are_traces() -> None:
    assert len(TRACES) >= 1


@pytest.mark.parametrize(("path", "concurrency"), CASES)
def test_the_choice_is_nearly_as_fast_as_the_best_in_hindsight(path: Path, concurrency: int) -> None:
    replay = Replay(Trace.read(path), concurrency)
    rates = {size: replay.run(fixed(size), NUM_ANSWERS) for size in fixed_sizes(replay)}
    best = max(rates, key=rates.__getitem__)
    found = replay.run(chooser(replay), LONG)
    assert found > 0.95 * rates[best], f"{best}: {rates[best]:.1f} tokens/s, chosen: {found:.1f}"
    assert found > 0.97 * rates[PLAIN_SIZE]
