"""Sensitivity: which layers hurt at which bits, in numbers, and the bits to give them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from glob import escape
from math import fsum
from typing import TYPE_CHECKING, Any

from adaround_ext.files import JsonFile, check_keys, path_from, read_value
from adaround_ext.mixed_precision.assign import assign_bits, check_budget
from adaround_ext.report.coverage import FEW
from adaround_ext.report.text import as_count, as_percent, warning_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT = "adaround_ext.sensitivity.1"
Errors = dict[str, dict[int, float]]
# As JSON has it: errors as lists, a number a bit width.
_PLAIN = {
    "model": str, "layers": tuple[str, ...], "weights": dict[str, int], "bits": tuple[int, ...],
    "local": dict[str, tuple[float, ...]], "network": dict[str, tuple[float, ...]],
    "average_bits": float | None, "batches": int, "notes": tuple[str, ...],
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sensitivity(JsonFile):
    """What quantizing one layer at a time costs, at several bit widths.

    Attributes:
        model: Its class.
        layers: Names in execution order; of tied layers the first.
        weights: Of each layer, how many.
        bits: The widths, ascending.
        local: By layer and bits, the layer's own relative output error,
            ``||W X - W_q X||^2 / ||W X||^2``.
        network: The same of all the model's outputs, ``||f(x; W_q) - f(x)||^2 / ||f(x)||^2``;
            infinity where outputs were not finite.
        average_bits: The budget that was asked for, or None.
        batches: That ``network`` was measured on.
        notes: What was unusual.
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
        """Chooses bits by layer: the least sum of ``network`` errors for so many bits on average.

        The average is over weights, of their codes alone. That errors of single layers add up is
        the usual first-order model: ZeroQ (Cai et al., CVPR 2020) and HAWQ-V2 (Dong et al., NeurIPS
        2020) choose bits by such a sum, HAWQ-V3 (Yao et al., ICML 2021) by an integer programme
        over one. It does not see how errors of several layers interact. See
        ``adaround_ext.mixed_precision.assign`` for the method.

        Args:
            average_bits: Bits a weight. None takes the budget that was given to
                :func:`sensitivity`.

        Returns:
            Bits by layer's name.

        Raises:
            ValueError: There is no budget, or it is not within ``bits`` or cannot be met.
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

        Args:
            average_bits: As of :meth:`suggest`.

        Returns:
            ``{"bits": ...}`` by pattern.

        Raises:
            ValueError: As :meth:`suggest`.
        """
        bits = self.suggest(average_bits)
        # A pattern also means all inside the module it names, and later ones win.
        outer_first = sorted(bits, key=lambda name: name.count("."))
        return {escape(name): {"bits": bits[name]} for name in outer_first}

    def predicted(self, assignment: Mapping[str, int]) -> float:
        """The sum of ``network`` errors.

        Args:
            assignment: Bits by layer's name, of all layers.

        Raises:
            ValueError: Layers or bits are not those that were measured.
        """
        if set(assignment) != set(self.layers):
            different = sorted(set(assignment) ^ set(self.layers))
            raise ValueError(f"assignment must name exactly the layers, differs in {different}")
        for name, bits in assignment.items():
            if bits not in self.bits:
                raise ValueError(f"assignment must have bits of {self.bits}, got {bits} for {name}")
        return fsum(self.network[name][assignment[name]] for name in self.layers)

    def worst(self, count: int | None = None) -> tuple[str, ...]:
        """The layers of highest ``network`` error at any width, highest first.

        Equal ones stay in execution order.

        Args:
            count: How many, at most; at least 1. None is all of them.

        Raises:
            ValueError: ``count`` is below 1.
        """
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return tuple(
            sorted(self.layers, key=lambda name: -max(self.network[name].values()))[:count]
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, and the format's name; errors in the order of ``bits``."""
        values = dataclasses.asdict(self)
        for kind in ("local", "network"):
            errors = values[kind]
            values[kind] = {n: [by_bits[b] for b in self.bits] for n, by_bits in errors.items()}
        return {"format": _FORMAT} | values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """The inverse of :meth:`to_dict`.

        Args:
            values: A dict that :meth:`to_dict` made, also after a way through JSON.

        Raises:
            ValueError: Its format is another, or keys, types or lengths do not belong.
        """
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
            if any(len(errors) != len(bits) for errors in read[kind].values()):
                raise ValueError(f"sensitivity.{kind} must hold a number for each of {bits} bits")
            read[kind] = {
                n: dict(zip(bits, errors, strict=True)) for n, errors in read[kind].items()
            }
        return cls(**read)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """A heat map of ``network``, layers by bits.

        Args:
            path: A file to save it in, whose suffix is the format: .png, .svg, .pdf or another
                that matplotlib writes.

        Returns:
            The figure, which belongs to no backend.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from adaround_ext.report.figure import heat_map

        rows = [[self.network[name][b] for b in self.bits] for name in self.layers]
        columns = [f"{b} bits" for b in self.bits]
        title = f"{self.model}: error with one layer quantized"
        return heat_map(
            rows, self.layers, columns, title, None if path is None else path_from(path)
        )

    def __repr__(self) -> str:
        count, bits = len(self.layers), ", ".join(map(str, self.bits))
        return (
            f"Sensitivity({self.model}: {count} layer{'s' * (count != 1)} at {bits} bits; "
            "print it for more)"
        )

    def _repr_html_(self) -> str:
        """For notebooks."""
        from adaround_ext.report.templates import table_in_cell

        head, *rows = self._table()
        return table_in_cell(self._title(), head, rows, self.notes, code=True)

    def _title(self) -> str:
        return f"{self.model}: error of the outputs with one layer quantized, worst layers first"

    def _table(self) -> list[list[str]]:
        """A row of titles, and one a layer."""
        rows = [["layer", "weights", *(f"{b} bits" for b in self.bits)]]
        for name in self.worst():
            errors = [as_percent(self.network[name][b]) for b in self.bits]
            rows.append([name, as_count(self.weights[name]), *errors])
        if self.average_bits is not None:
            chosen = self.suggest()
            for row, cell in zip(rows, ["chosen", *(chosen[n] for n in self.worst())], strict=True):
                row.append(str(cell))
        return rows

    def __str__(self) -> str:
        rows = self._table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self._title()]
        few = [note for note in self.notes if note.startswith(FEW)]
        for note in few:
            lines += warning_lines(note)
        for name, *cells in rows:
            padded = (c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))
            lines.append("  ".join(["", name.ljust(widths[0]), *padded]))
        if self.average_bits is not None:
            lines.append(
                f"  chosen for at most {self.average_bits:g} bits a weight: errors sum up to "
                f"{as_percent(self.predicted(self.suggest()))}"
            )
        if len(self.notes) > len(few):
            lines.append(f"  notes: {len(self.notes)}, see its notes")
        return "\n".join(lines)
