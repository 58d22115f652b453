"""The model card of a trained drafter, and its loss curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from drafter_service.training.config import LoopConfig
from drafter_service.training.data import TokenData
from drafter_service.training.loop import Acceptance, History
from specdec.bench import plots, provenance


@dataclass(frozen=True, slots=True)
class Card:
    """What a card says besides the run's history."""

    method: str
    target: str
    description: str
    """The drafter's architecture, one sentence."""
    data_source: str
    num_parameters: int
    started_from: str
    """Name of the drafter whose weights the run began with; empty: the target's last layers."""


def write_card(
    card: Card, config: LoopConfig, data: TokenData, history: History, acceptance: Acceptance
) -> None:
    """Write README.md and, where matplotlib is installed, loss.png into the output folder."""
    figure = _draw(history, config.out / "loss.png") if plots.has_matplotlib() else ""
    (config.out / "README.md").write_text(_text(card, config, data, history, acceptance) + figure)


def _text(card: Card, config: LoopConfig, data: TokenData, history: History, acceptance: Acceptance) -> str:
    source = provenance.collect()
    hardware = source["hardware"]
    loss = f"{history.losses[-1][1]:.3f}" if history.losses else "none"
    return f"""---
base_model: {card.target}
library_name: transformers
tags: [speculative-decoding, {card.method}]
---

# {card.method} drafter for {card.target}

{card.description} {card.num_parameters / 1e6:.1f} million parameters in bf16.

## Use

`specdec up --drafter {card.method}:FOLDER`, with this folder.

## Training

| | |
|---|---|
| command | `{source["command"]}` |
| seed | {config.seed} |
| data | {card.data_source}: {len(data)} sequences, {data.num_response_tokens} answer tokens |
| started from | {_start(card)} |
| steps | {history.step} |
| answer tokens trained on | {history.num_tokens}, in {config.passes} passes over each |
| time | {history.seconds / 60:.0f} minutes on {hardware["cores"]} cores of {hardware["cpu"]} |
| learning rate | {config.learning_rate:g}, AdamW, cosine |
| loss at the end | {loss}, moving average |

## Acceptance on held-out answers

{acceptance.num_answers} answers, greedy, K = {acceptance.num_draft_tokens}, {acceptance.num_rounds} rounds.
Acceptance length **{acceptance.length:.2f}** tokens a round, the target's own included.

{_positions(acceptance.per_position)}
"""


def _start(card: Card) -> str:
    if card.started_from:
        return f"the drafter `{card.started_from}`, trained before on other steps than these"
    return "layers of the target"


def _positions(shares: Sequence[float]) -> str:
    numbers = " | ".join(str(index + 1) for index in range(len(shares)))
    values = " | ".join(f"{share:.2f}" for share in shares)
    return (
        f"| draft token | {numbers} |\n|---|{'---|' * len(shares)}\n| accepted, share of rounds | {values} |"
    )


def _draw(history: History, path: Path) -> str:
    figure, axes = plots.new_figure(width_in=6.0)
    axes.plot(*zip(*history.losses, strict=True), label="loss (moving average)")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    if history.acceptance:
        right = axes.twinx()
        right.plot(*zip(*history.acceptance, strict=True), "o-", color="tab:orange", label="acceptance")
        right.set_ylabel("held-out acceptance length")
    figure.savefig(path)
    return f"\n![Loss and held-out acceptance by step]({path.name})\n"
