"""The model card of a trained drafter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from drafter_service.drafters.ngram_lm.table import NgramTable
from drafter_service.training.acceptance import HeldOutAcceptance
from drafter_service.training.config import CountOptions, LoopConfig
from drafter_service.training.curve import draw_curves
from drafter_service.training.data import TokenData
from drafter_service.training.loop import History
from specdec.bench import plots, provenance

_FILE = "README.md"
_TEMPLATE = """---
{{ card_data }}
---

# {{ card.method }} drafter for {{ card.target }}

{{ card.description }}

## Use

`specdec up --drafter {{ card.method }}:FOLDER`, with this folder.

## {{ heading }}

| | |
|---|---|
{%- for name, value in rows.items() %}
| {{ name }} | {{ value | replace("|", "\\\\|") }} |
{%- endfor %}

## Acceptance on held-out answers

{{ acceptance.num_answers }} answers, greedy, K = {{ acceptance.draft_depth }}, {{ acceptance.num_rounds }}
rounds. Acceptance length **{{ "%.2f" | format(acceptance.length) }}** tokens a round, the target's own
included.

| draft token |
{%- for _ in acceptance.per_position %} {{ loop.index }} |{% endfor %}
|---|
{%- for _ in acceptance.per_position %}---|{% endfor %}
| accepted, share of rounds |
{%- for share in acceptance.per_position %} {{ "%.2f" | format(share) }} |{% endfor %}
{%- if figure %}

![Held-out acceptance length and loss by answer tokens trained on]({{ figure }})
{%- endif %}

"""


@dataclass(frozen=True, slots=True)
class Card:
    """What a card says besides the run's history."""

    method: str
    """Family of the drafter."""
    target: str
    """Model id of the target."""
    description: str
    """What the drafter is, and how large."""
    data_source: str
    """Where the answers come from that it learned from."""
    started_from: str = ""
    """Name of the drafter whose weights the run began with; empty: the target's last layers."""
    library: str = "transformers"
    """Library that can load the drafter."""


def write_card(
    card: Card, config: LoopConfig, data: TokenData, history: History, acceptance: HeldOutAcceptance
) -> None:
    """Write README.md and, where matplotlib is installed, training.png into the output folder."""
    rows = _training_rows(card, config, data, history)
    figure = ""
    if plots.has_matplotlib():
        figure = "training.png"
        draw_curves({card.method: config.out}, config.out / figure)
    _model_card(card, "Training", rows, acceptance, figure).save(config.out / _FILE)


def write_table_card(
    card: Card,
    table: NgramTable,
    counted: CountOptions,
    data: TokenData,
    acceptance: HeldOutAcceptance,
    out: Path,
) -> None:
    """Write README.md of a counted table into the output folder."""
    rows = {
        **_data_rows(card, data),
        "held out": f"{acceptance.num_answers} of these answers, which were not counted",
        "contexts": f"{len(table.contexts)}, of 1 to {table.max_size} tokens; longer ones seen at least "
        f"{counted.min_count} times, which tell at least {counted.min_gain:g} nats beyond the shorter one "
        "over all occurrences",
        "listed tokens": str(len(table.token_ids)),
    }
    _model_card(card, "Counting", rows, acceptance).save(out / _FILE)


def _model_card(
    card: Card, heading: str, rows: Mapping[str, str], acceptance: HeldOutAcceptance, figure: str = ""
) -> ModelCard:
    metadata = ModelCardData(
        base_model=card.target, library_name=card.library, tags=["speculative-decoding", card.method]
    )
    made: ModelCard = ModelCard.from_template(
        metadata,
        template_str=_TEMPLATE,
        card=card,
        heading=heading,
        rows=rows,
        acceptance=acceptance,
        figure=figure,
    )
    return made


def _training_rows(card: Card, config: LoopConfig, data: TokenData, history: History) -> dict[str, str]:
    hardware = provenance.collect()["hardware"]
    rows = _data_rows(card, data)
    return {
        "command": rows.pop("command"),
        "seed": str(config.seed),
        **rows,
        "started from": _start(card),
        "steps": str(history.step),
        "answer tokens trained on": f"{history.num_tokens}, in {config.passes} passes over each",
        "time": f"{history.seconds / 60:.0f} minutes on {hardware['cores']} cores of {hardware['cpu']}",
        "learning rate": f"{config.learning_rate:g}, AdamW, cosine",
        "loss at the end": f"{history.losses[-1][1]:.3f}, moving average" if history.losses else "none",
    }


def _data_rows(card: Card, data: TokenData) -> dict[str, str]:
    return {
        "command": f"`{provenance.collect()['command']}`",
        "data": f"{card.data_source}: {len(data)} sequences, {data.num_response_tokens} answer tokens",
    }


def _start(card: Card) -> str:
    if card.started_from:
        return f"the drafter `{card.started_from}`, trained before on other steps than these"
    return "layers of the target"
