"""Draws the plots of a run where matplotlib is installed (the `bench` extra)."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.bench.records import METHOD_SEPARATOR
from specdec.bench.stats import OVERALL, Row


def has_matplotlib() -> bool:
    """Return whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def draw(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Draw speedup.png, acceptance.png and profile.png at the lowest concurrency; return the files.

    A run with several K gets draft_time.png as well. A plot for which no method has figures is not drawn,
    such as acceptance in a run of `none` alone.

    Raises:
        ImportError: matplotlib is not installed.
    """
    lowest = min(row.concurrency for row in rows)
    at_lowest = [row for row in rows if row.concurrency == lowest]
    gains = [row for row in at_lowest if row.speedup is not None]
    drafts = [row for row in at_lowest if row.category == OVERALL and row.acceptance_per_position]
    paths = []
    if gains:
        paths.append(_draw_speedup(gains, directory / "speedup.png"))
    if drafts:
        paths.append(_draw_acceptance(drafts, directory / "acceptance.png"))
    rounds = [row for row in at_lowest if row.category == OVERALL and row.verify_ms_p50 is not None]
    if rounds:
        paths.append(_draw_profile(rounds, directory / "profile.png"))
    if any(METHOD_SEPARATOR in row.method for row in drafts):
        paths.append(_draw_draft_times(drafts, directory / "draft_time.png"))
    return paths


def _draw_speedup(rows: Sequence[Row], path: Path) -> Path:
    categories = list(dict.fromkeys(row.category for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    figure, axes = new_figure(width_in=2.0 + 1.2 * len(categories))
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        own = {row.category: row.speedup for row in rows if row.method == method}
        places = [i + (index - (len(methods) - 1) / 2) * width for i in range(len(categories))]
        axes.bar(
            places,
            [own.get(category) or 0.0 for category in categories],
            width,
            label=method,
            color=f"C{index % 10}",
            hatch="///" if index >= 10 else None,
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    labels = [name.replace("_", "\n") for name in categories]
    axes.set_xticks(range(len(categories)), labels, parse_math=False)
    axes.set_ylabel("speedup over none (TPOT)")
    axes.set_title(f"Concurrency {rows[0].concurrency}")
    # Beside the bars: many methods would hide them.
    figure.legend(loc="outside right upper")
    figure.savefig(path)
    return path


def _draw_acceptance(rows: Sequence[Row], path: Path) -> Path:
    figure, axes = new_figure(width_in=6.0)
    longest = max(len(row.acceptance_per_position) for row in rows)
    axes.set_xticks(range(1, longest + 1))
    for row in rows:
        positions = range(1, len(row.acceptance_per_position) + 1)
        axes.plot(positions, row.acceptance_per_position, marker="o", label=row.method)
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("accepted / drafted")
    axes.set_ylim(0.0, 1.0)
    axes.set_title(f"Concurrency {rows[0].concurrency}")
    axes.legend()
    figure.savefig(path)
    return path


def _draw_profile(rows: Sequence[Row], path: Path) -> Path:
    """Draw where the time of a round goes: a bar for each method, with its parts on top of each other."""
    figure, axes = new_figure(width_in=2.0 + 1.2 * len(rows))
    methods = [row.method for row in rows]
    bottom = [0.0] * len(rows)
    for part in ("verify", "draft", "transport", "gateway"):
        times_ms = [getattr(row, f"{part}_ms_p50") or 0.0 for row in rows]
        axes.bar(methods, times_ms, 0.6, bottom=bottom, label=part)
        bottom = [below + time_ms for below, time_ms in zip(bottom, times_ms, strict=True)]
    for place, (row, height_ms) in enumerate(zip(rows, bottom, strict=True)):
        if row.mean_acceptance_length:
            label = f"{row.mean_acceptance_length:.2f} tokens"
            axes.text(place, height_ms, label, ha="center", va="bottom")
    axes.set_ylabel("one round, median ms")
    axes.set_title(f"Concurrency {rows[0].concurrency}")
    axes.margins(y=0.15)
    axes.legend()
    figure.savefig(path)
    return path


def _draw_draft_times(rows: Sequence[Row], path: Path) -> Path:
    """Draw what a draft costs against its length: a line for each method."""
    figure, axes = new_figure(width_in=6.0)
    times_ms: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        method, _, draft_depth = row.method.rpartition(METHOD_SEPARATOR)
        if method and row.draft_ms_p50 is not None:
            times_ms.setdefault(method, []).append((int(draft_depth), row.draft_ms_p50))
    for method, points in times_ms.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=method)
    axes.set_xlabel("draft tokens a round (K)")
    axes.set_ylabel("draft, median ms a round")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path)
    return path


def new_figure(width_in: float) -> tuple[Any, Any]:
    """Return an empty figure, 4 inches high, and its axes."""
    # Without pyplot there is no global state, and no display is needed.
    figure = importlib.import_module("matplotlib.figure").Figure(
        figsize=(width_in, 4.0), dpi=120, layout="constrained"
    )
    return figure, figure.subplots()
