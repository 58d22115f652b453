"""Learning curves: the acceptance of held-out answers, and the loss, over the tokens trained on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drafter_service.training.log import LOG_FILE, read_log
from specdec.bench import plots

_FIGURES = {"acceptance_length": "held-out acceptance length", "loss": "loss, moving average"}
"""What is drawn of the lines of a log, and what it is called."""


def draw_curves(folders: Mapping[str, Path], path: Path) -> None:
    """Draw the logs of training runs, one line for each.

    Args:
        folders: the runs' folders, by the names that the plot shows.

    Raises:
        InvalidArgumentError: a folder has no training log.
        ImportError: matplotlib is not installed.
    """
    logs = {name: read_log(folder / LOG_FILE) for name, folder in folders.items()}
    figure, panels = plots.new_panels(len(_FIGURES), num_columns=len(_FIGURES))
    for axes, (key, label) in zip(panels, _FIGURES.items(), strict=True):
        for name, lines in logs.items():
            points = _points(lines, key)
            marker = "o" if key == "acceptance_length" else ""
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, label=name)
        axes.set_xlabel("answer tokens trained on, thousands")
        axes.set_xlim(left=0)
        axes.set_ylabel(label)
    if len(logs) > 1:
        panels[0].legend()
    figure.savefig(path)


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return the thousands of tokens trained on, and the figure, of each line that has it."""
    return [(line["num_tokens"] / 1e3, line[key]) for line in lines if key in line]
