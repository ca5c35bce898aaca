"""A model's report in pictures, by matplotlib and as SVG for the page, and its numbers in words."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from math import ceil, floor, inf, log10
from pathlib import Path
from typing import TYPE_CHECKING

from adaround_ext.report.text import _tail, as_percent, as_time

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from adaround_ext.report.model import LayerEntry, ModelReport

INK, FAINT, LINE, ACCENT = "#2b2b2b", "#777777", "#d9d9d9", "#0072B2"
_NAMED = 60  # more layers than this are numbered
# The page's chart, in pixels: its panels from top to bottom and the room between them.
_TOP, _ERROR, _BARS, _GAP, _AXIS = 22, 220, 56, 40, 58
_LETTER = 6.1  # width of a letter of a label


def draw(report: ModelReport, path: Path | None) -> Figure:
    """The report's figure, saved where a path is given; ImportError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            "plot needs matplotlib: install it, or adaround_ext with its extra 'demo'"
        ) from missing
    # Not pyplot: it would keep the figure, and choose a backend for the whole process.
    layers = report.layers
    named = len(layers) <= _NAMED
    width = min(24.0, max(7.5, 1.5 + 0.24 * len(layers)))
    height = 8.2 if named and layers else 6.4
    figure = Figure((width, height), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    error, flips, seconds = figure.subplots(3, 1, sharex=True, height_ratios=(3, 1, 1))
    _draw_errors(error, layers)
    places = range(1, len(layers) + 1)
    shares = [100 * entry.report.flipped for entry in layers]
    flips.bar(places, shares, width=0.7, color=ACCENT)
    seconds.bar(places, [e.report.seconds.get("total", 0.0) for e in layers], 0.7, color=ACCENT)
    for axes, title in (
        (error, "Relative output error"),
        (flips, "Codes moved, %"),
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
    if named and layers:
        labels = [_tail(entry.name, 44) for entry in layers]
        # A name is no formula, whatever dollars it has.
        seconds.set_xticks(list(places), labels, rotation=90, fontsize=7, parse_math=False)
    else:
        seconds.set_xlabel("Layer, in execution order", fontsize=9, color=INK)
    title = f"{report.model}, {report.average_bits:.2f} bits a weight"
    error.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, parse_math=False)
    if path is not None:
        figure.savefig(path)
    return figure


def _draw_errors(axes: Axes, layers: Sequence[LayerEntry]) -> None:
    """On a logarithmic axis; errors next to 0 lie on its lower end."""
    axes.set_yscale("log")
    low, high = _span(layers)
    axes.set_ylim(low, high)
    ticks = _log_ticks(low, high)
    axes.set_yticks(ticks, [as_percent(tick) for tick in ticks])
    axes.set_yticks([], minor=True)
    if not layers:
        return
    points = _errors(layers)
    places = range(1, len(layers) + 1)
    nearest, final = ([max(pair[i], low) for pair in points] for i in (0, 1))
    axes.vlines(list(places), final, nearest, color=LINE, linewidth=1.5, zorder=1.5)
    size = 5.5 if len(layers) <= 150 else 3
    axes.plot(places, nearest, "o", markersize=size, markerfacecolor="white", clip_on=False,
              markeredgecolor=FAINT, label="rounding to nearest", zorder=3)  # fmt: skip
    axes.plot(places, final, "o", markersize=size, color=ACCENT, clip_on=False, label="final",
              zorder=4)  # fmt: skip
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False, fontsize=8,
                labelcolor=INK)  # fmt: skip


def svg_chart(report: ModelReport) -> str:
    """The same as SVG: an axis that stays and the layers, which scroll where they are many."""
    layers = report.layers
    if not layers:
        return ""
    pitch = min(28.0, max(3.0, 900 / len(layers)))
    width = max(320.0, pitch * len(layers) + 8)
    named = len(layers) <= _NAMED
    labels = [_tail(short_name(entry), 30) for entry in layers]
    names = 16 + _LETTER * max(map(len, labels)) if named else 24
    tops = (_TOP, _TOP + _ERROR + _GAP, _TOP + _ERROR + 2 * _GAP + _BARS)
    bottom = tops[2] + _BARS
    height = bottom + names
    low, high = _span(layers)
    ratio = log10(high / low)

    def y_error(value: float) -> float:
        return tops[0] + (_ERROR * log10(high / value) / ratio if value > low else _ERROR)

    axis, lines = [], []
    ticks = [(y_error(tick), as_percent(tick)) for tick in _log_ticks(low, high)]
    if any(value < low for pair in _errors(layers) for value in pair):
        floor_at = tops[0] + _ERROR
        ticks = [(floor_at, "0"), *(tick for tick in ticks if floor_at - tick[0] > 13)]
    flips = [_finite(entry.report.flipped) for entry in layers]
    times = [_finite(entry.report.seconds.get("total", 0.0)) for entry in layers]
    most = [_round_up(max(values)) for values in (flips, times)]
    for top, text in zip(tops[1:], (as_percent(most[0]), f"{most[1]:g} s"), strict=True):
        ticks += [(top, text), (top + _BARS, "0")]
    for y, text in ticks:
        axis.append(f'<text x="{_AXIS - 6}" y="{y + 4:.1f}" class="tick end">{text}</text>')
        lines.append(f'<path class="grid" d="M0 {y:.1f}H{width:.1f}"/>')
    for top, text in zip(tops[1:], ("Codes moved", "Time"), strict=True):
        lines.append(f'<text x="2" y="{top - 9}" class="title">{text}</text>')

    radius = min(4.2, max(1.4, 0.3 * pitch))
    columns = []
    for i, (entry, (nearest, final)) in enumerate(zip(layers, _errors(layers), strict=True)):
        x = 4 + pitch * (i + 0.5)
        y_nearest, y_final = y_error(nearest), y_error(final)
        column = (
            f'<g class="layer"><title>{i + 1}. {escape(_describe(entry))}</title>'
            f'<rect class="hit" x="{x - pitch / 2:.1f}" y="{_TOP - 4}" width="{pitch:.1f}" '
            f'height="{bottom - _TOP + 4}"/>'
            f'<path class="stem" d="M{x:.1f} {y_nearest:.1f}V{y_final:.1f}"/>'
            f'<circle class="nearest" cx="{x:.1f}" cy="{y_nearest:.1f}" r="{radius:.1f}"/>'
            f'<circle class="final" cx="{x:.1f}" cy="{y_final:.1f}" r="{radius:.1f}"/>'
        )
        for top, value, scale in zip(tops[1:], (flips[i], times[i]), most, strict=True):
            bar = _BARS * value / scale
            column += (
                f'<rect class="bar" x="{x - 0.35 * pitch:.1f}" y="{top + _BARS - bar:.1f}" '
                f'width="{0.7 * pitch:.1f}" height="{bar:.1f}"/>'
            )
        columns.append(column + "</g>")
        if named:
            columns.append(
                f'<text class="tick end" transform="translate({x + 3.5:.1f} {bottom + 8}) '
                f'rotate(-90)">{escape(labels[i])}</text>'
            )
        elif (i + 1) % 50 == 0 or i == 0:
            anchor = "start" if i == 0 else "end" if i + 1 == len(layers) else "middle"
            columns.append(
                f'<text class="tick" text-anchor="{anchor}" x="{x:.1f}" '
                f'y="{bottom + 17}">{i + 1}</text>'
            )
    bands = _bands(layers, pitch, bottom)
    label = f"Relative output error, codes moved and time of {len(layers)} layers"
    return (
        f'<div class="chart" style="--axis:{_AXIS};--width:{width:.0f}">'
        f'<div class="axis"><svg viewBox="0 0 {_AXIS} {height:.0f}" aria-hidden="true">'
        f"{''.join(axis)}</svg></div>"
        f'<div class="plot" tabindex="0" role="group" aria-label="Chart, scrolls sideways">'
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{label}">'
        f"{''.join(bands + lines + columns)}</svg></div></div>"
    )


def _bands(layers: Sequence[LayerEntry], pitch: float, bottom: float) -> list[str]:
    """Every other block is shaded; they are named, in the longest way that fits half of them."""
    runs = [(block or "", len(list(run))) for block, run in groupby(layers, lambda e: e.block)]
    ways = [
        [".".join(block.split(".")[-parts:]) for block, _ in runs]
        for parts in (9, 2, 1)  # the last parts of their names
    ]

    def fits(name: str, count: int) -> bool:
        return not name.isdigit() and _LETTER * len(name) + 6 <= pitch * count

    counts = [count for _, count in runs]
    names = next(
        (way for way in ways if 2 * sum(map(fits, way, counts)) >= len(runs)), [""] * len(runs)
    )
    found, begin = [], 0
    for index, (name, count) in enumerate(zip(names, counts, strict=True)):
        x, width = 4 + pitch * begin, pitch * count
        begin += count
        if index % 2:
            found.append(
                f'<rect class="band" x="{x:.1f}" y="0" width="{width:.1f}" height="{bottom}"/>'
            )
        if name and fits(name, count):
            found.append(f'<text class="tick" x="{x + 3:.1f}" y="12">{escape(name)}</text>')
    return found


def _describe(entry: LayerEntry) -> str:
    relative = entry.report.relative
    return (
        f"{entry.name}\nerror {as_percent(relative['final'])}, nearest "
        f"{as_percent(relative['nearest'])}\ncodes moved {as_percent(entry.report.flipped)}, "
        f"{as_time(entry.report.seconds.get('total', 0.0))}"
    )


def _errors(layers: Sequence[LayerEntry]) -> list[tuple[float, float]]:
    """(nearest, final) of each layer."""
    found = [entry.report.relative for entry in layers]
    return [(_finite(r["nearest"]), _finite(r["final"])) for r in found]


def _span(layers: Sequence[LayerEntry]) -> tuple[float, float]:
    """The range of a logarithmic axis: all errors that are not next to 0, and some room."""
    values = [value for pair in _errors(layers) for value in pair if value > 0]
    low, high = min(values, default=0.01), max(values, default=0.1)
    low = max(low, 1e-8 * high)  # what float32 makes of an error of 0 would flatten all others
    room = max(1.25, (high / low) ** 0.06)
    return low / room, high * room


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    if log10(high / low) < 2.2:
        steps = (1, 1.5, 2, 3, 4, 5, 7) if high < 5 * low else (1, 2, 5)
        ticks = [step * 10.0**d for d in decades for step in steps]
    else:
        ticks = [10.0**d for d in decades][:: 1 + len(decades) // 9]
    return [tick for tick in ticks if low <= tick <= high]


def _round_up(value: float) -> float:
    """To 1, 2, 2.5 or 5 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** floor(log10(value))
    return next((s * power for s in (1, 2, 2.5, 5) if value <= s * power), 10 * power)


def _finite(value: float) -> float:
    return value if -inf < value < inf else 0.0


def short_name(entry: LayerEntry, name: str | None = None) -> str:
    """``name``, or the layer's own, within the layer's block."""
    return (name or entry.name).removeprefix(f"{entry.block}.")
