"""Picture of the memory's bandwidth that the ops reach, from the results of the benchmark ops.

A roofline with one roof, since no op does enough arithmetic a byte for another: the bytes that an
op must move, over its time, beside a copy of the same working set.

python -m benchmarks bandwidth_plot FILE.json PICTURE.svg
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

from benchmarks import common
from benchmarks.ops.candidates import COMPILED, EAGER, OURS
from benchmarks.quality.plot import FAINT, INK, LINE

# What there is for every op, in Okabe and Ito's colours.
_CURVES = {
    OURS: ("o", "#0072B2", "this package"),
    COMPILED: ("s", "#D55E00", "torch.compile"),
    EAGER: ("^", "#888888", "eager PyTorch"),
}


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Writes the picture, a panel an op; float32."""
    ops = list(dict.fromkeys(row["op"] for row in document["results"]))
    with rc_context({"svg.hashsalt": "bandwidth"}):  # the same file for the same results
        figure = Figure(figsize=(3.1 * len(ops), 3.8), dpi=160, facecolor="white")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(ops), sharey=True, squeeze=False)[0]
        for axes, op in zip(panels, ops, strict=True):
            rows = sorted(
                (row for row in document["results"] if row["op"] == op), key=lambda row: _numel(row)
            )
            _draw_panel(axes, op, rows)
        panels[0].set_ylabel("GB/s of what must be moved", color=INK)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
        machine = document["machine"]
        title = f"{machine['gpu'] or machine['cpu'] + ', ' + machine['instruction_set']}"
        figure.suptitle(f"{title}, torch {machine['torch']}", fontsize=10, color=FAINT)
        figure.tight_layout(rect=(0, 0.08, 1, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    common.note(f"wrote {path}")


def _numel(row: Mapping[str, Any]) -> int:
    return int(row["shape"][0] * row["shape"][1])


def _draw_panel(axes: Axes, op: str, rows: list[dict[str, Any]]) -> None:
    weights = [_numel(row) for row in rows]
    copy = [row["copy_bandwidth"] / 1e9 for row in rows]
    axes.plot(weights, copy, color=INK, linewidth=1.5, label="a copy, same working set")
    for family, (marker, color, label) in _CURVES.items():
        speeds = [row["bytes_per_weight"] / row["ns_per_weight"][family] for row in rows]
        axes.plot(weights, speeds, marker=marker, color=color, label=label)
    axes.set(xscale="log", yscale="log")
    axes.set_title(f"{op}\n{rows[0]['bytes_per_weight']} bytes a weight", fontsize=9, color=INK)
    axes.set_xlabel("weights", color=INK)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks bandwidth_plot")
    parser.add_argument("results", type=Path, help="what python -m benchmarks ops wrote")
    parser.add_argument("picture", type=Path, help="SVG or PNG")
    options = parser.parse_args(arguments)
    draw(json.loads(options.results.read_text()), options.picture)
