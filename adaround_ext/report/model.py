"""Model report: what :func:`adaround_ext.quantize_` returns, as text, JSON, page and figure."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from adaround_ext.files import JsonFile, path_from, read_value, write_atomically
from adaround_ext.report.records import LayerEntry, ModelNumbers
from adaround_ext.report.text import as_bytes, as_count, as_percent, as_time, warning_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayerEntry", "ModelReport"]  # the first: pickles of earlier versions name it here
_FORMAT = "adaround_ext.model_report.1"


class ModelReport(ModelNumbers, JsonFile):
    """The result of a whole model in numbers.

    Attributes:
        model: Its class.
        mode: "sequential" or "parallel".
        layers: The quantized ones, in execution order.
        skipped: Reasons by module name.
        blocks: Names of the modules that were carried forward, in execution order.
        parameters: Of the whole model.
        passes: How often the calibration data went, in part, through the model.
        batches: Of the calibration data.
        samples: Of the calibration data.
        notes: Folded batch norms, equalized pairs, costs, anything unusual.
        seconds: Of each part and "total".
        memory: Bytes: "host_before", "host_peak"; what was stored at most, "cache_memory" and
            "cache_file"; and on CUDA "cache_device" and "device_peak".
        versions: Of what ran.
        seed: Of everything that was drawn.
    """

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, and the format's name."""
        values = dataclasses.asdict(self)
        for entry, plain in zip(self.layers, values["layers"], strict=True):
            plain["report"] = entry.report.to_dict()
        return {"format": _FORMAT} | values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelReport:
        """The inverse of :meth:`to_dict`.

        Args:
            values: A dict that :meth:`to_dict` made, also after a way through JSON.

        Raises:
            ValueError: Its format is another, or keys or types do not belong.
        """
        if not isinstance(values, Mapping) or values.get("format") != _FORMAT:
            got = repr(values.get("format")) if isinstance(values, Mapping) else repr(type(values))
            raise ValueError(f"values must be a dict of format {_FORMAT!r}, got {got}")
        plain = {name: value for name, value in values.items() if name != "format"}
        report: ModelReport = read_value(cls, plain, "report")
        return report

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """The chart of :meth:`to_html` as a figure: error, share of codes moved, seconds by layer.

        Args:
            path: A file to save it in, whose suffix is the format: .png, .svg, .pdf or another
                that matplotlib writes.

        Returns:
            The figure, which belongs to no backend.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from adaround_ext.report.figure import draw

        return draw(self, None if path is None else path_from(path))

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """The report as a page that needs no other file.

        Args:
            path: A file to write it to, whole or not at all.

        Returns:
            The page's text.

        Raises:
            OSError: The file cannot be written.
        """
        from adaround_ext.report.page import page

        text = page(self)
        if path is not None:
            write_atomically(path_from(path), text)
        return text

    def __repr__(self) -> str:
        return f"ModelReport({self._title()}, error {self._error_line()}; print it for more)"

    def _repr_html_(self) -> str:
        """For notebooks."""
        from adaround_ext.report.page import cell

        return cell(self)

    def _title(self) -> str:
        count = len(self.layers)
        return (
            f"{self.model}: {count} layer{'s' * (count != 1)} at {self.average_bits:.2f} bits a "
            f"weight"
        )

    def __str__(self) -> str:
        stored = sum(entry.storage_bits for entry in self._stored())
        lines = [f"{self._title()} ({self.mode}, seed {self.seed})"]
        if self.warning is not None:
            lines += warning_lines(self.warning)
        lines += [
            f"  weights      {as_count(self.quantized_parameters)} of "
            f"{as_count(self.parameters)} parameters, {as_bytes(stored / 8)} with scales",
            f"  calibration  {self.samples} samples in {self.batches} batches, "
            f"{self.passes} passes",
        ]
        if self.layers:
            lines.append(f"  error        {self._error_line()}")
            lines.append(f"  codes moved  {as_percent(self.flipped)}")
        total = self.seconds.get("total")
        if total is not None:
            parts = [(value, name) for name, value in self.seconds.items() if name != "total"]
            most = [f"{name} {as_time(value)}" for value, name in sorted(parts, reverse=True)[:3]]
            inside = f" ({', '.join(most)})" if most else ""
            lines.append(f"  time         {as_time(total)}{inside}")
        peaks = [
            f"{name.removesuffix('_peak')} {as_bytes(self.memory[name])}"
            for name in ("host_peak", "device_peak")
            if name in self.memory
        ]
        if peaks:
            lines.append(f"  peak memory  {', '.join(peaks)}")
        for index, entry in enumerate(self.worst(3)):
            relative = entry.report.relative
            lines.append(
                f"  {'' if index else 'worst':<11}  {entry.name}: {as_percent(relative['final'])} "
                f"(nearest {as_percent(relative['nearest'])})"
            )
        if self.skipped:
            lines.append(f"  skipped      {len(self.skipped)}, see report.skipped")
        if self.notes:
            lines.append(f"  notes        {len(self.notes)}, see report.notes")
        return "\n".join(lines)

    def _error_line(self) -> str:
        error, nearest = self.relative_error, self.nearest_error
        if not nearest:
            return "none"
        return (
            f"{as_percent(error)} of the outputs' energy, {error / nearest:.2f} times nearest's "
            f"{as_percent(nearest)} (geometric means)"
        )
