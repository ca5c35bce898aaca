"""Pictures of the experiments: the same file for the same values, on white, to go on any page."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import common
from benchmarks.paper.experiment import Experiment, Values

# Okabe and Ito's colours, which colour-blind people can tell apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
)  # fmt: skip
INK, FAINT, LINE = "#2b2b2b", "#777777", "#d9d9d9"


def save(experiment: Experiment, values: Values, path: Path) -> None:
    # The salt makes the ids of the same picture the same.
    with rc_context({"svg.hashsalt": experiment.name, "font.size": 9, "axes.edgecolor": FAINT}):
        figure = Figure(experiment.size, dpi=120, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        experiment.draw(figure, values)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
    common.note(f"wrote {path}")


def prepare(axes: Axes, title: str, x: str, y: str) -> None:
    """Titles, a faint grid and no box."""
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
