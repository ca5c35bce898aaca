"""Figures by matplotlib, for files that any program shows: a model's chart, a heat map."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from adaround_ext.report.chart import MOST_NAMED, Series, series_of
from adaround_ext.report.records import ModelNumbers
from adaround_ext.report.text import as_percent, tail

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT, LINE, ACCENT = "#2b2b2b", "#777777", "#d9d9d9", "#0072B2"
_MOST_ROWS_NAMED = 100  # of a heat map


def draw(report: ModelNumbers, path: Path | None) -> Figure:
    """The chart of a report's page as a figure, saved where a path is given.

    Args:
        report: What to draw.
        path: Its suffix is the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    layers, series = report.layers, series_of(report.layers)
    named = 0 < len(layers) <= MOST_NAMED
    width = min(24.0, max(7.5, 1.5 + 0.24 * len(layers)))
    figure = _new_figure(width, 8.2 if named else 6.4)
    error, moved, seconds = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    _draw_errors(error, series)
    places = range(1, len(layers) + 1)
    moved.bar(places, [100 * share for share in series.moved], width=0.7, color=ACCENT)
    seconds.bar(places, series.seconds, width=0.7, color=ACCENT)
    for axes, title in (
        (error, "Relative output error"),
        (moved, "Codes moved, %"),
        (seconds, "Seconds"),
    ):
        axes.set_ylabel(title, fontsize=9, color=INK)
        axes.grid(True, axis="y", color=LINE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(which="both", labelsize=8, colors=FAINT)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        for side in ("bottom", "left"):
            axes.spines[side].set_color(FAINT)
    seconds.set_xlim(0.4, max(len(layers), 1) + 0.6)
    if named:
        labels = [tail(entry.name, 44) for entry in layers]
        # A name is no formula, whatever dollars it has.
        seconds.set_xticks(list(places), labels, rotation=90, fontsize=7, parse_math=False)
    else:
        seconds.set_xlabel("Layer, in execution order", fontsize=9, color=INK)
    title = f"{report.model}, {report.average_bits:.2f} bits a weight"
    error.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    if path is not None:
        figure.savefig(path)
    return figure


def heat_map(
    rows: Sequence[Sequence[float]],
    names: Sequence[str],
    columns: Sequence[str],
    title: str,
    path: Path | None,
) -> Figure:
    """Relative errors as colours on a logarithmic scale, saved where a path is given.

    Args:
        rows: Errors; what is 0 or infinite gets an end of the colours.
        names: Of the rows.
        columns: Their titles.
        title: Of the whole.
        path: Its suffix is the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    named = len(names) <= _MOST_ROWS_NAMED
    height = 1.6 + 0.2 * min(len(names), _MOST_ROWS_NAMED)
    figure = _new_figure(2.8 + 0.9 * len(columns) + 1.6 * named, height)
    from matplotlib.colors import LogNorm

    axes = figure.subplots()
    usable = [value for row in rows for value in row if 0 < value < inf] or [1.0]
    low, high = min(usable), max(usable)
    colours = [[min(max(value, low), high) for value in row] for row in rows]
    norm = LogNorm(low, high if high > low else 10 * low)
    image = axes.imshow(colours, aspect="auto", cmap="viridis", norm=norm)
    if named:
        axes.set_yticks(range(len(names)), list(names), parse_math=False)
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                colour = "white" if norm(colours[y][x]) < 0.6 else INK
                text = as_percent(value)
                axes.text(x, y, text, ha="center", va="center", fontsize=6, color=colour)
    else:
        axes.set_ylabel("Layer, in execution order", fontsize=9, color=INK)
    axes.set_xticks(range(len(columns)), list(columns))
    axes.tick_params(labelsize=7, colors=INK, length=0)
    axes.set_title(title, loc="left", fontsize=9, color=INK, parse_math=False)
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("Relative error of the outputs", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=FAINT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if path is not None:
        figure.savefig(path)
    return figure


def _new_figure(width: float, height: float) -> Figure:
    """Not pyplot's: it would keep the figure, and choose a backend for the whole process."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            "plot needs matplotlib: install it, or adaround_ext with its extra 'demo'"
        ) from missing
    figure = Figure((width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw_errors(axes: Axes, series: Series) -> None:
    """On a logarithmic axis; errors next to 0 lie on its lower end."""
    axes.set_yscale("log")
    low, high = series.span
    axes.set_ylim(low, high)
    axes.set_yticks(*zip(*series.ticks, strict=True))
    axes.set_yticks([], minor=True)
    count = len(series.final)
    if not count:
        return
    places = range(1, count + 1)
    nearest, final = ([max(e, low) for e in errors] for errors in (series.nearest, series.final))
    axes.vlines(list(places), final, nearest, color=LINE, linewidth=1.5, zorder=1.5)
    size = 5.5 if count <= 150 else 3
    axes.plot(places, nearest, "o", markersize=size, markerfacecolor="white", clip_on=False,
              markeredgecolor=FAINT, label="rounding to nearest", zorder=3)  # fmt: skip
    axes.plot(places, final, "o", markersize=size, color=ACCENT, clip_on=False, label="final",
              zorder=4)  # fmt: skip
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=8,
                labelcolor=INK)  # fmt: skip
