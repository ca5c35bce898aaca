"""Which layers hurt at which bits, and the bits to give them: the numbers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from glob import escape
from math import fsum, inf
from typing import TYPE_CHECKING, Any

from adaround_ext.files import check_keys, path_from, read_value, write_atomically
from adaround_ext.mixed_precision.assign import assign_bits, check_budget
from adaround_ext.report.coverage import FEW
from adaround_ext.report.figure import FAINT, INK
from adaround_ext.report.text import as_count, as_percent, warning_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT = "adaround_ext.sensitivity.1"
_NAMED = 100  # more layers than this have no names in the plot
Errors = dict[str, dict[int, float]]
# As JSON has it: errors as lists, a number a bit width.
_PLAIN = {
    "model": str, "layers": tuple[str, ...], "weights": dict[str, int], "bits": tuple[int, ...],
    "local": dict[str, tuple[float, ...]], "network": dict[str, tuple[float, ...]],
    "average_bits": float | None, "batches": int, "notes": tuple[str, ...],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What quantizing one layer at a time costs, at several bit widths.

    model: its class. layers: names in execution order; of tied layers the first. weights: of each
    layer, how many. bits: ascending. local: by layer and bits, the layer's own relative output
    error, ``||W X - W_q X||^2 / ||W X||^2``. network: the same of all the model's outputs,
    ``||f(x; W_q) - f(x)||^2 / ||f(x)||^2``; infinity where outputs were not finite. average_bits:
    the budget that was asked for, or None. batches: that ``network`` was measured on.
    """

    model: str
    layers: tuple[str, ...]
    weights: dict[str, int]
    bits: tuple[int, ...]
    local: Errors
    network: Errors
    average_bits: float | None
    batches: int
    notes: tuple[str, ...]

    def suggest(self, average_bits: float | None = None) -> dict[str, int]:
        """Bits by layer, of lowest summed ``network`` error with at most so many on average.

        The average is over weights, of their codes alone. That errors of single layers add up is
        the usual first-order model: ZeroQ (Cai et al., CVPR 2020) and HAWQ-V2 (Dong et al., NeurIPS
        2020) choose bits by such a sum, HAWQ-V3 (Yao et al., ICML 2021) by an integer programme
        over one. It does not see how errors of several layers interact. See
        :func:`adaround_ext.mixed_precision.assign.assign_bits` for the method. None takes the
        budget that was given to :func:`sensitivity`; ValueError where there is none, and for one
        that is not within ``bits`` or cannot be met.
        """
        if average_bits is None:
            average_bits = self.average_bits
        if average_bits is None:
            raise ValueError("average_bits must be given, here or to sensitivity, got None")
        check_budget(average_bits, self.bits)
        return assign_bits(self.network, self.weights, average_bits)

    def overrides(self, average_bits: float | None = None) -> dict[str, dict[str, int]]:
        """:meth:`suggest` as ``quantize_(overrides=...)`` takes it.

        Names are escaped as patterns. Put it after overrides of your own: ``own | s.overrides(3)``.
        """
        found = self.suggest(average_bits)
        # A pattern also means all inside the module it names, and later ones win.
        outer_first = sorted(found, key=lambda name: name.count("."))
        return {escape(name): {"bits": found[name]} for name in outer_first}

    def predicted(self, assignment: Mapping[str, int]) -> float:
        """The sum of ``network`` errors; ValueError for other layers or bits than measured ones."""
        if set(assignment) != set(self.layers):
            different = sorted(set(assignment) ^ set(self.layers))
            raise ValueError(f"assignment must name exactly the layers, differs in {different}")
        for name, bits in assignment.items():
            if bits not in self.bits:
                raise ValueError(f"assignment must have bits of {self.bits}, got {bits} for {name}")
        return fsum(self.network[name][assignment[name]] for name in self.layers)

    def worst(self, count: int | None = None) -> tuple[str, ...]:
        """The ``count`` layers of highest ``network`` error at any width, highest first.

        None is all of them. Equal ones stay in execution order. ValueError for a count below 1.
        """
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return tuple(
            sorted(self.layers, key=lambda name: -max(self.network[name].values()))[:count]
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, and the format's name; errors as lists, in the order of ``bits``."""
        values = dataclasses.asdict(self)
        for kind in ("local", "network"):
            values[kind] = {n: [own[b] for b in self.bits] for n, own in values[kind].items()}
        return {"format": _FORMAT} | values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """The inverse of :meth:`to_dict`; ValueError for keys or types that do not belong."""
        if not isinstance(values, Mapping) or values.get("format") != _FORMAT:
            got = repr(values.get("format")) if isinstance(values, Mapping) else repr(type(values))
            raise ValueError(f"values must be a dict of format {_FORMAT!r}, got {got}")
        plain = {name: value for name, value in values.items() if name != "format"}
        check_keys(plain, set(_PLAIN), "sensitivity")
        read = {n: read_value(hint, plain[n], f"sensitivity.{n}") for n, hint in _PLAIN.items()}
        layers, bits = read["layers"], read["bits"]
        for kind in ("weights", "local", "network"):
            if list(read[kind]) != list(layers):
                raise ValueError(f"sensitivity.{kind} must have the layers as keys, in order")
        for kind in ("local", "network"):
            if any(len(own) != len(bits) for own in read[kind].values()):
                raise ValueError(f"sensitivity.{kind} must hold a number for each of {bits} bits")
            read[kind] = {n: dict(zip(bits, own, strict=True)) for n, own in read[kind].items()}
        return cls(**read)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file, whole or not at all."""
        write_atomically(path_from(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Reads what :meth:`save` wrote; ValueError for any other file."""
        data = path_from(path).read_bytes()
        try:
            return cls.from_dict(json.loads(data))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} must be a file written by Sensitivity.save: {error}"
            ) from error

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """A heat map of ``network``, layers by bits; saved where a path is given.

        The path's suffix is the format. ImportError without matplotlib.
        """
        return _draw(self, path)

    def __repr__(self) -> str:
        count, bits = len(self.layers), ", ".join(map(str, self.bits))
        return (
            f"Sensitivity({self.model}: {count} layer{'s' * (count != 1)} at {bits} bits; "
            "print it for more)"
        )

    def _repr_html_(self) -> str:
        """For notebooks."""
        from adaround_ext.report.notebook import sensitivity_fragment

        return sensitivity_fragment(self)

    def __str__(self) -> str:
        chosen = None if self.average_bits is None else self.suggest()
        rows = [["layer", "weights", *(f"{b} bits" for b in self.bits)]]
        for name in self.worst():
            errors = [as_percent(self.network[name][b]) for b in self.bits]
            rows.append([name, as_count(self.weights[name]), *errors])
        if chosen is not None:
            for row, cell in zip(rows, ["chosen", *(chosen[n] for n in self.worst())], strict=True):
                row.append(str(cell))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.model}: error of the outputs with one layer quantized, worst layers first"]
        few = [note for note in self.notes if note.startswith(FEW)]
        for note in few:
            lines += warning_lines(note)
        for name, *cells in rows:
            padded = (c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))
            lines.append("  ".join(["", name.ljust(widths[0]), *padded]))
        if chosen is not None:
            lines.append(
                f"  chosen for at most {self.average_bits:g} bits a weight: errors sum up to "
                f"{as_percent(self.predicted(chosen))}"
            )
        if len(self.notes) > len(few):
            lines.append(f"  notes: {len(self.notes)}, see its notes")
        return "\n".join(lines)


def _draw(result: Sensitivity, path: str | os.PathLike[str] | None) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
    except ImportError as missing:
        raise ImportError(
            "plot needs matplotlib: install it, or adaround_ext with its extra 'demo'"
        ) from missing
    # Not pyplot: it would keep the figure, and choose a backend for the whole process.
    count, named = len(result.layers), len(result.layers) <= _NAMED
    figure = Figure(
        (2.8 + 0.9 * len(result.bits) + 1.6 * named, 1.6 + 0.2 * min(count, _NAMED)),
        dpi=150, facecolor="white", layout="constrained",
    )  # fmt: skip
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rows = [[result.network[name][b] for b in result.bits] for name in result.layers]
    usable = [value for row in rows for value in row if 0 < value < inf] or [1.0]
    low, high = min(usable), max(usable)
    # What is 0 or infinite gets an end of the colours.
    shown = [[min(max(value, low), high) for value in row] for row in rows]
    norm = LogNorm(low, high if high > low else 10 * low)
    image = axes.imshow(shown, aspect="auto", cmap="viridis", norm=norm)
    if named:
        # A name is no formula, whatever dollars it has.
        axes.set_yticks(range(count), list(result.layers), parse_math=False)
        for y, row in enumerate(rows):
            for x, value in enumerate(row):
                dark = norm(shown[y][x]) < 0.6
                axes.text(x, y, as_percent(value), ha="center", va="center", fontsize=6,
                          color="white" if dark else INK)  # fmt: skip
    else:
        axes.set_ylabel("Layer, in execution order", fontsize=9, color=INK)
    axes.set_xticks(range(len(result.bits)), [f"{b} bits" for b in result.bits])
    axes.tick_params(labelsize=7, colors=INK, length=0)
    axes.set_title(f"{result.model}: error with one layer quantized", loc="left", fontsize=9,
                   color=INK, parse_math=False)  # fmt: skip
    bar = figure.colorbar(image, ax=axes)
    bar.set_label("Relative error of the outputs", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=7, colors=FAINT)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if path is not None:
        figure.savefig(path_from(path))
    return figure
