"""Picture of error over time, from the results of the benchmark quality.

python -m benchmarks quality_plot FILE.json PICTURE.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from benchmarks import common
from benchmarks.quality.methods import TITLES
from benchmarks.quality.summary import of_reference

# Okabe and Ito's colours, which colour-blind people can tell apart; the markers differ as well.
INK, FAINT, LINE = "#2b2b2b", "#777777", "#d9d9d9"
WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # hides grid lines behind
TIMES = "\N{MULTIPLICATION SIGN}"
STYLES = {
    "nearest": ("o", "#888888"),
    "floor": ("v", "#888888"),
    "ceil": ("^", "#888888"),
    "stochastic": ("s", "#888888"),
    "gptq": ("D", "#D55E00"),
    "gptq-ours": ("D", "#E69F00"),
    "descent": ("P", "#CC79A7"),
    "fast": ("o", "#56B4E9"),
    "balanced": ("o", "#0072B2"),
    "best": ("o", "#003f66"),
    "reference": ("X", "#009E73"),
}
OURS = ("fast", "balanced", "best")
# Where a label may go, in points from its marker: x, y, horizontal and vertical alignment.
PLACES = [
    (8, 0, "left", "center"),
    (-8, 0, "right", "center"),
    (0, 8, "center", "bottom"),
    (0, -8, "center", "top"),
    *((x, y, side, "center") for y in (10, -10, 20, -20, 30, -30) for x, side in
      ((8, "left"), (-8, "right"))),
]  # fmt: skip
# Beside the line through our methods, which falls to the right.
FIRST_PLACES = {
    "fast": [(-8, -9, "right", "center")],
    "balanced": [(8, 9, "left", "center"), (-8, -9, "right", "center")],
}


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Writes the picture, a panel for each number of bits; ValueError without such results."""
    points = _points(document["results"])
    if not points:
        raise ValueError("the picture needs results for MiniLM's layers with a scale a channel")
    with rc_context({"svg.hashsalt": "quality"}):  # the same file for the same results
        figure = Figure(figsize=(max(4.6 * len(points) + 0.9, 10), 5.6), dpi=160, facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(points), squeeze=False)[0]
        inches = figure.get_figwidth()
        figure.subplots_adjust(
            left=0.75 / inches, right=1 - 0.15 / inches, top=0.79, bottom=0.19, wspace=0.16
        )
        for axes, (bits, methods) in zip(panels, points.items(), strict=True):
            _draw_panel(axes, bits, methods)
        panels[0].set_ylabel("Relative output error, held-out text", fontsize=10, color=INK)
        _write_titles(figure, document, points)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata)
    common.note(f"wrote {path}")


def _points(results: Mapping[str, Any]) -> dict[int, dict[str, tuple[float, float]]]:
    """(seconds, error) by bits and method; the reference goes by its ratio to GPTQ."""
    points: dict[int, dict[str, tuple[float, float]]] = {}
    for row in results["means"]:
        if (row["family"], row["granularity"]) == ("minilm", "channel"):
            methods = points.setdefault(row["bits"], {})
            methods[row["method"]] = row["seconds"], row["held_out"]
    for bits, methods in points.items():
        ratios = [
            of_reference(results["reference"], key, "gptq", bits) for key in ("seconds", "held_out")
        ]
        if "gptq" in methods and None not in ratios:
            methods["reference"] = methods["gptq"][0] / ratios[0], methods["gptq"][1] / ratios[1]
    return points


def _draw_panel(axes: Axes, bits: int, points: dict[str, tuple[float, float]]) -> None:
    """Points far above rounding to nearest are named in words: they would flatten the others."""
    top = 1.5 * points["nearest"][1] if "nearest" in points else float("inf")
    shown = {method: point for method, point in points.items() if point[1] <= top}
    _prepare(axes, f"{bits} bits", shown)
    for method, (x, y) in shown.items():
        marker, color = STYLES[method]
        size = 10 if method in OURS else 7.5
        face = "white" if method == "reference" else color
        axes.plot(x, y, marker, markersize=size, markerfacecolor=face, markeredgecolor=color,
                  zorder=3)  # fmt: skip
    ours = [shown[method] for method in OURS if method in shown]
    if ours:
        axes.plot(*zip(*ours, strict=True), color="#bfd9ea", linewidth=3, zorder=1.5)
    _label(axes, shown, points.get("gptq"))
    beyond = [f"{TITLES[m]} {100 * points[m][1]:.3g} %" for m in points if m not in shown]
    if beyond:
        text = "above: " + ", ".join(beyond)
        axes.text(0.99, 0.985, text, transform=axes.transAxes, ha="right", va="top", fontsize=8,
                  color=FAINT, bbox=WHITE, zorder=1.8)  # fmt: skip


def _prepare(axes: Axes, title: str, points: dict[str, tuple[float, float]]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK, pad=8)
    axes.set_xlabel("Seconds a layer", fontsize=10, color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(FAINT)
    axes.grid(True, which="major", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=9, colors=FAINT)
    for axis, ticks, unit, factor in (
        (axes.xaxis, (1,), "{:g}", 1),
        (axes.yaxis, (1, 1.5, 2, 3, 4, 5, 7), "{:g} %", 100),
    ):
        axis.set_major_locator(LogLocator(10, subs=ticks, numticks=30))
        axis.set_major_formatter(
            FuncFormatter(lambda value, _, unit=unit, factor=factor: unit.format(factor * value))
        )
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(LogLocator(10, subs=()))
    xs, ys = zip(*points.values(), strict=True)
    axes.set_xlim(min(xs) / 2.5, max(xs) * 6)
    room = (max(ys) / min(ys)) ** 0.12 * 1.02
    axes.set_ylim(min(ys) / room, max(ys) * room)


def _label(
    axes: Axes, points: dict[str, tuple[float, float]], base: tuple[float, float] | None
) -> None:
    """Each label in the first place where it covers no marker and no other label."""
    renderer = axes.figure.canvas.get_renderer()
    pixels = axes.figure.dpi / 72
    taken = []
    for point in points.values():
        x, y = axes.transData.transform(point)
        half = 5.5 * pixels
        taken.append(Bbox([[x - half, y - half], [x + half, y + half]]))
    for method, (x, y) in sorted(points.items(), key=lambda item: item[0] not in OURS):
        text = TITLES[method]
        if base is not None and method != "gptq":
            text += f"  {y / base[1]:.2f}{TIMES}"
        label = axes.annotate(
            text,
            (x, y),
            xytext=(0, 0),
            textcoords="offset points",
            fontsize=9,
            fontweight="bold" if method in OURS else "normal",
            color=INK,
            bbox=WHITE,
            zorder=1.8,
        )
        for dx, dy, horizontal, vertical in [*FIRST_PLACES.get(method, ()), *PLACES]:
            label.set(ha=horizontal, va=vertical)
            label.set_position((dx, dy))
            box = label.get_window_extent(renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(label.get_window_extent(renderer))


def _write_titles(figure: Figure, document: Mapping[str, Any], points: Mapping[int, Any]) -> None:
    machine = document["machine"]
    threads = machine["torch_threads"]
    means = [
        row
        for row in document["results"]["means"]
        if (row["family"], row["granularity"]) == ("minilm", "channel")
    ]
    left = 0.2 / figure.get_figwidth()
    title = "Rounding error over time: lower left is better"
    figure.text(left, 0.935, title, fontsize=15, fontweight="bold", color=INK)
    about = (
        f"{means[0]['layers']} Linear layers of all-MiniLM-L6-v2, a scale for each channel, "
        f"geometric means; {threads} thread{'s' * (threads > 1)} of {machine['cpu']}"
    )
    figure.text(left, 0.88, about, fontsize=10, color=FAINT)
    note = f"{TIMES}: error over GPTQ's."
    if any("reference" in methods for methods in points.values()):
        note += (
            " AdaRound, reference: the paper's loop, 10,000 steps in plain PyTorch, placed by its "
            "ratio to GPTQ on rows of 4 layers,\nits time extrapolated."
        )
    figure.text(left, 0.065, note, fontsize=8.5, color=FAINT, va="top")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks quality_plot")
    parser.add_argument("results", type=Path, help="what python -m benchmarks quality wrote")
    parser.add_argument("picture", type=Path, help="SVG or PNG")
    options = parser.parse_args(arguments)
    draw(json.loads(options.results.read_text()), options.picture)
