"""The demo's picture: error and seconds, layer by layer, from what demo.json holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's colours, which colour-blind people can tell apart; the markers differ as well.
INK, FAINT, LINE = "#2b2b2b", "#777777", "#d9d9d9"
TIMES = "\N{MULTIPLICATION SIGN}"
STYLES = {
    "nearest": ("rounding to nearest", "o", "#888888"),
    "paper": ("AdaRound by the paper, plain PyTorch", "D", "#D55E00"),
    "ours": ("adaround_ext.optimize_layer", "o", "#0072B2"),
}


def draw(facts: Mapping[str, Any], path: Path) -> None:
    """Writes the picture as PNG."""
    rows = facts["rows"]
    figure = Figure(figsize=(11, 6.6), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    errors, seconds = figure.subplots(1, 2, sharey=True, width_ratios=(1.1, 1))
    figure.subplots_adjust(left=0.185, right=0.975, top=0.77, bottom=0.115, wspace=0.05)

    places = _places(rows)
    _prepare(errors, "Relative output error on held-out text", (1, 2, 5), "{:g} %", 100)
    _prepare(seconds, "Time for one layer", (1,), "{:g} s", 1)
    for place, row in zip(places, rows, strict=True):
        _draw_errors(errors, place, row)
        _draw_seconds(seconds, place, row)
    _label_rows(errors, places, rows)
    errors.set_ylim(max(places) + 0.8, -1.4)
    _leave_room(errors)
    _leave_room(seconds)
    _write_titles(figure, facts)
    figure.savefig(path)


def _places(rows: list[dict[str, Any]]) -> list[float]:
    """Heights, top down, with a gap for a heading before each bit width."""
    places: list[float] = []
    for index, row in enumerate(rows):
        new = index > 0 and row["bits"] != rows[index - 1]["bits"]
        places.append(places[-1] + (2.2 if new else 1.0) if places else 0.0)
    return places


def _prepare(axes: Axes, title: str, ticks: tuple[int, ...], unit: str, factor: float) -> None:
    axes.set_xscale("log")
    axes.set_title(title, loc="left", fontsize=11, color=INK, pad=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(True, axis="x", which="major", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0, labelsize=10, colors=INK)
    axes.tick_params(axis="x", which="both", labelsize=9, colors=FAINT)
    axes.xaxis.set_major_locator(LogLocator(10, subs=ticks, numticks=30))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: unit.format(factor * value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _dot(axes: Axes, x: float, y: float, method: str, *, filled: bool = True) -> None:
    _, marker, color = STYLES[method]
    size = 9 if marker == "o" else 7.5
    face = color if filled else "white"
    axes.plot(x, y, marker, markersize=size, markerfacecolor=face, markeredgecolor=color, zorder=3)


def _span(axes: Axes, low: float, high: float, y: float) -> None:
    axes.plot([low, high], [y, y], color="#bfd9ea", linewidth=3, zorder=2, solid_capstyle="round")


def _draw_errors(axes: Axes, y: float, row: Mapping[str, Any]) -> None:
    _span(axes, row["error"], row["nearest_error"], y)
    _dot(axes, row["nearest_error"], y, "nearest")
    if row["paper_error"] is not None:
        _dot(axes, row["paper_error"], y, "paper")
    _dot(axes, row["error"], y, "ours")
    _note(axes, row["nearest_error"], y, f"{row['nearest_error'] / row['error']:.1f}{TIMES} less")


def _draw_seconds(axes: Axes, y: float, row: Mapping[str, Any]) -> None:
    ran = row["paper_error"] is not None
    _span(axes, row["seconds"], row["paper_seconds"], y)
    _dot(axes, row["paper_seconds"], y, "paper", filled=ran)
    _dot(axes, row["seconds"], y, "ours")
    _note(axes, row["paper_seconds"], y, f"{'' if ran else '≈ '}{row['speedup']:.0f}{TIMES} faster")


def _note(axes: Axes, x: float, y: float, text: str) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},  # hides the grid line behind
    )


def _label_rows(axes: Axes, places: list[float], rows: list[dict[str, Any]]) -> None:
    labels = [f"{row['layer']}  {row['shape'][0]}{TIMES}{row['shape'][1]}" for row in rows]
    axes.set_yticks(places, labels)
    seen = set()
    for place, row in zip(places, rows, strict=True):
        if row["bits"] not in seen:
            seen.add(row["bits"])
            axes.annotate(
                f"{row['bits']} bits",
                (0, place - 0.85),
                xycoords=("axes fraction", "data"),
                xytext=(-8, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=11,
                fontweight="bold",
                color=INK,
            )


def _leave_room(axes: Axes) -> None:
    """For the notes at the right of the last dots."""
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** 0.28)


def _write_titles(figure: Figure, facts: Mapping[str, Any]) -> None:
    rows, machine = facts["rows"], facts["machine"]
    gains = sorted(row["nearest_error"] / row["error"] for row in rows)
    figure.text(
        0.02,
        0.945,
        f"Learned rounding: {gains[0]:.1f} to {gains[-1]:.1f} times less output error, "
        f"in {min(row['seconds'] for row in rows):.1f} to "
        f"{max(row['seconds'] for row in rows):.1f} seconds a layer",
        fontsize=15,
        fontweight="bold",
        color=INK,
    )
    figure.text(
        0.02,
        0.905,
        f"Linear layers of {facts['model']}, {facts['calibration_tokens']:,} calibration tokens; "
        f"{machine['torch_threads']} threads of {machine['cpu']}",
        fontsize=10,
        color=FAINT,
    )
    handles = [
        Line2D([], [], marker=marker, linestyle="", markersize=8, color=color, label=label)
        for label, marker, color in STYLES.values()
    ]
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.002, 0.893),
        ncols=3,
        frameon=False,
        fontsize=10,
        handletextpad=0.2,
        columnspacing=1.8,
        labelcolor=INK,
    )
    if any(row["paper_error"] is None for row in rows):
        note = "Open diamonds: time of all steps extrapolated from 50, the error was not computed. "
    else:
        note = ""
    figure.text(
        0.02,
        0.022,
        f"{note}query, key and value are one call of optimize_layer, a third of its time each.",
        fontsize=8.5,
        color=FAINT,
    )
