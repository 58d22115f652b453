"""Draws the plots of a run where matplotlib is installed (the `bench` extra)."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specdec.bench.records import METHOD_SEPARATOR
from specdec.bench.stats import OVERALL, Row
from specdec.contract.errors import FailedPreconditionError


def has_matplotlib() -> bool:
    """Return whether plots can be drawn."""
    return importlib.util.find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Refuse to go on where plots cannot be drawn.

    Raises:
        FailedPreconditionError: matplotlib is not installed.
    """
    if not has_matplotlib():
        raise FailedPreconditionError("Plots need matplotlib: pip install 'specdec[bench]'.")


def draw(rows: Sequence[Row], directory: Path) -> list[Path]:
    """Draw speedup.png, acceptance.png and profile.png at the lowest concurrency; return the files.

    A run over several categories gets acceptance_by_category.png as well, one with several K draft_time.png,
    and one with several concurrencies concurrency.png. A plot for which no method has figures is not drawn,
    such as acceptance in a run of `none` alone.

    Raises:
        ImportError: matplotlib is not installed.
    """
    lowest = min(row.concurrency for row in rows)
    at_lowest = [row for row in rows if row.concurrency == lowest]
    gains = [row for row in at_lowest if row.speedup is not None]
    drafted = [row for row in at_lowest if row.acceptance_per_position]
    drafts = [row for row in drafted if row.category == OVERALL]
    paths = []
    if gains:
        paths.append(_draw_speedup(gains, directory / "speedup.png"))
    if drafts:
        paths.append(_draw_acceptance(drafts, directory / "acceptance.png"))
    if len({row.category for row in drafted} - {OVERALL}) > 1:
        paths.append(_draw_acceptance_by_category(drafted, directory / "acceptance_by_category.png"))
    rounds = [row for row in at_lowest if row.category == OVERALL and row.verify_ms_p50 is not None]
    if rounds:
        paths.append(_draw_profile(rounds, directory / "profile.png"))
    if any(METHOD_SEPARATOR in row.method for row in drafts):
        paths.append(_draw_draft_times(drafts, directory / "draft_time.png"))
    overall = [row for row in rows if row.category == OVERALL and row.tokens_per_s is not None]
    if len({row.concurrency for row in overall}) > 1:
        paths.append(_draw_concurrency(overall, directory / "concurrency.png"))
    return paths


def _draw_concurrency(rows: Sequence[Row], path: Path) -> Path:
    """Draw tokens per second by concurrency, and beside it over those of `none`, with intervals."""
    figure, (speeds, ratios) = new_panels(2, num_columns=2)
    for index, method in enumerate(dict.fromkeys(row.method for row in rows)):
        own = sorted((row for row in rows if row.method == method), key=lambda row: row.concurrency)
        style: dict[str, Any] = {"marker": "o" if index < 10 else "s", "color": f"C{index % 10}"}
        numbers = [row.concurrency for row in own]
        speeds.plot(numbers, [row.tokens_per_s for row in own], label=method, **style)
        paired = [(row.concurrency, row.paired_speedup, row.paired_interval) for row in own if row.num_pairs]
        if paired:
            places, medians, intervals = zip(*paired, strict=True)
            below = [median - low for median, (low, _) in zip(medians, intervals, strict=True)]
            above = [high - median for median, (_, high) in zip(medians, intervals, strict=True)]
            ratios.errorbar(places, medians, yerr=[below, above], capsize=3, **style)
    ticks = sorted({row.concurrency for row in rows})
    for axes, label in ((speeds, "tokens/s"), (ratios, "tokens/s over none")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(number) for number in ticks])
        axes.set_xlabel("requests at a time")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    ratios.axhline(1.0, color="black", linewidth=0.8)
    figure.legend(loc="outside right upper")
    figure.savefig(path)
    return path


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
    methods = list(dict.fromkeys(row.method for row in rows))
    _plot_positions(axes, rows, methods)
    axes.set_title(f"Concurrency {rows[0].concurrency}")
    axes.legend()
    figure.savefig(path)
    return path


def _draw_acceptance_by_category(rows: Sequence[Row], path: Path) -> Path:
    """Draw acceptance by position with a panel for each category; a method has one colour in all of them."""
    categories = list(dict.fromkeys(row.category for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    figure, panels = new_panels(len(categories), num_columns=4)
    for axes, category in zip(panels, categories, strict=True):
        _plot_positions(axes, [row for row in rows if row.category == category], methods)
        axes.set_title("all prompts" if category == OVERALL else category, parse_math=False)
    lines = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside right upper")
    figure.suptitle(f"Concurrency {rows[0].concurrency}")
    figure.savefig(path)
    return path


def _plot_positions(axes: Any, rows: Sequence[Row], methods: Sequence[str]) -> None:
    """Plot a line for each row: the share of draft tokens that was accepted, by their position."""
    longest = max(len(row.acceptance_per_position) for row in rows)
    axes.set_xticks(range(1, longest + 1))
    for row in rows:
        index = methods.index(row.method)
        axes.plot(
            range(1, len(row.acceptance_per_position) + 1),
            row.acceptance_per_position,
            marker="o" if index < 10 else "s",
            color=f"C{index % 10}",
            label=row.method,
        )
    axes.set_xlabel("position in the draft")
    axes.set_ylabel("accepted / drafted")
    axes.set_ylim(0.0, 1.0)


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
    figure = _figure(width_in, 4.0)
    return figure, figure.subplots()


def new_panels(count: int, *, num_columns: int) -> tuple[Any, list[Any]]:
    """Return an empty figure and the axes of its panels, which fill it row by row."""
    num_columns = min(num_columns, count)
    num_rows = math.ceil(count / num_columns)
    figure = _figure(4.0 * num_columns + 1.0, 3.5 * num_rows)
    return figure, [figure.add_subplot(num_rows, num_columns, index + 1) for index in range(count)]


def _figure(width_in: float, height_in: float) -> Any:
    # Without pyplot there is no global state, and no display is needed.
    return importlib.import_module("matplotlib.figure").Figure(
        figsize=(width_in, height_in), dpi=120, layout="constrained"
    )
