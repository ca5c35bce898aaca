"""What :func:`adaround_ext.quantize_` returns: every layer in numbers, for people and as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from math import exp, fsum, inf, isfinite, log, prod
from typing import TYPE_CHECKING, Any

from adaround_ext.config import AdaRoundConfig
from adaround_ext.files import check_keys, check_type, path_from, read_value, write_atomically
from adaround_ext.report.coverage import told_first
from adaround_ext.report.layer import LayerReport
from adaround_ext.report.text import (
    as_bytes,
    as_count,
    as_percent,
    as_shape,
    as_time,
    warning_lines,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT = "adaround_ext.model_report.1"
_SCALE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}


@dataclasses.dataclass(frozen=True)
class LayerEntry:
    """One quantized layer of a model.

    name: as in ``model.named_modules()``. kind: its class. shape: of the weight. calls: how often
    one forward of the model runs it. block: the block it belongs to. shared_inputs: other layers
    whose statistics it shares. tied: other modules that hold the same weight. config:
    ``AdaRoundConfig.to_dict()`` of this layer. report: what happened. rows: of the weight as a
    matrix, where the shape does not tell: a transposed convolution's with groups.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    calls: int
    block: str | None
    shared_inputs: tuple[str, ...]
    tied: tuple[str, ...]
    config: dict[str, Any]
    report: LayerReport
    rows: int | None = None

    @staticmethod
    def check_plain(values: Mapping[str, Any], where: str) -> None:
        """ValueError where the configuration, as JSON has it, has other settings."""
        known = {field.name for field in dataclasses.fields(AdaRoundConfig)}
        check_type(values["config"], Mapping, f"{where}.config", "a dict")
        check_keys(values["config"], known, f"{where}.config")

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return prod(self.shape)

    @property
    def storage_bits(self) -> int:
        """b weights + scales (scale_dtype's bits + b if asymmetric); 0 for an empty weight.

        There is a scale for each tensor, row, or run of group_size columns of a row.
        """
        bits = int(self.config["bits"])
        scales = 1
        if self.config["granularity"] == "per_group":
            scales = self.weights // int(self.config["group_size"])
        elif self.config["granularity"] == "per_channel":
            transposed = self.kind.startswith("ConvTranspose")
            scales = self.shape[1 if transposed else 0] if self.rows is None else self.rows
        each = _SCALE_BITS[self.config["scale_dtype"]] + (0 if self.config["symmetric"] else bits)
        return bits * self.weights + scales * each if self.weights else 0

    @property
    def granularity(self) -> str:
        """What has a scale: "tensor", "channel", or so many "columns"."""
        names = {"per_tensor": "tensor", "per_channel": "channel"}
        columns = f"{self.config['group_size']} columns"
        return names.get(self.config["granularity"], columns)

    def __repr__(self) -> str:
        return (
            f"LayerEntry({self.name}: {self.kind} {as_shape(self.shape)}, {self.config['bits']} "
            f"bits, a scale per {self.granularity}, {self.report.change})"
        )


@dataclasses.dataclass(frozen=True)
class ModelReport:
    """The result of a whole model in numbers.

    model: its class. mode: "sequential" or "parallel". layers: in execution order. skipped: module
    name to reason. parameters: of the whole model. passes: how often the calibration data went, in
    part, through the model. batches, samples: of the calibration data. notes: folded batch norms,
    equalized pairs, costs, anything unusual. seconds: of each part and "total". memory: bytes,
    "host_before", "host_peak", what was kept at most, "cache_memory" and "cache_file", and on CUDA
    "cache_device" and "device_peak". versions: of what ran. seed: of everything that was drawn.
    """

    model: str
    mode: str
    layers: tuple[LayerEntry, ...]
    skipped: dict[str, str]
    blocks: tuple[str, ...]
    parameters: int
    passes: int
    batches: int
    samples: int
    notes: tuple[str, ...]
    seconds: dict[str, float]
    memory: dict[str, int]
    versions: dict[str, str]
    seed: int

    @property
    def quantized_parameters(self) -> int:
        """Elements of the quantized weights; tied ones count once."""
        return sum(entry.weights for entry in self._stored())

    @property
    def average_bits(self) -> float:
        """Bits of codes, scales and zero points over quantized weights; 0.0 without any.

        A zero point takes as many bits as a code, and symmetric grids have none. Tied weights
        count once, biases not at all.
        """
        weights = self.quantized_parameters
        return sum(e.storage_bits for e in self._stored()) / weights if weights else 0.0

    @property
    def relative_error(self) -> float:
        """Geometric mean over the layers of the final loss over the energy of the outputs.

        Layers without error, final or of rounding to nearest, are left out; 0.0 if that is all.
        """
        return self._mean("final")

    @property
    def nearest_error(self) -> float:
        """The same for rounding to nearest."""
        return self._mean("nearest")

    @property
    def warning(self) -> str | None:
        """What to know first: most parameters were not quantized, and why; None if they were."""
        return told_first(self.notes, self.quantized_parameters, self.parameters)

    @property
    def flipped(self) -> float:
        """Share of the quantized weights whose code is not that of rounding to nearest."""
        weights = self.quantized_parameters
        moved = fsum(entry.report.flipped * entry.weights for entry in self._stored())
        return moved / weights if weights else 0.0

    def worst(self, count: int = 10) -> tuple[LayerEntry, ...]:
        """The ``count`` layers of highest relative final error, the highest first.

        Equal ones stay in execution order. ValueError for a count below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")

        def key(entry: LayerEntry) -> float:
            error = entry.report.relative["final"]
            return -error if isfinite(error) else -inf

        return tuple(sorted(self.layers, key=key)[:count])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, and the format's name."""
        values = dataclasses.asdict(self)
        for entry, plain in zip(self.layers, values["layers"], strict=True):
            plain["report"] = entry.report.to_dict()
        return {"format": _FORMAT} | values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelReport:
        """The inverse of :meth:`to_dict`; ValueError for keys or types that do not belong."""
        if not isinstance(values, Mapping) or values.get("format") != _FORMAT:
            got = repr(values.get("format")) if isinstance(values, Mapping) else repr(type(values))
            raise ValueError(f"values must be a dict of format {_FORMAT!r}, got {got}")
        plain = {name: value for name, value in values.items() if name != "format"}
        report: ModelReport = read_value(cls, plain, "report")
        return report

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file, whole or not at all."""
        write_atomically(path_from(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ModelReport:
        """Reads what :meth:`save` wrote; ValueError for any other file."""
        data = path_from(path).read_bytes()
        try:
            return cls.from_dict(json.loads(data))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} must be a file written by ModelReport.save: {error}"
            ) from error

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Error, share of codes moved and seconds of each layer; saved where a path is given.

        The path's suffix is the format. ImportError without matplotlib.
        """
        from adaround_ext.report.figure import draw

        return draw(self, None if path is None else path_from(path))

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A page that needs nothing else; written where a path is given, whole or not at all."""
        from adaround_ext.report.page import page

        text = page(self)
        if path is not None:
            write_atomically(path_from(path), text)
        return text

    def __repr__(self) -> str:
        return f"ModelReport({self._title()}, error {self._error_line()}; print it for more)"

    def _repr_html_(self) -> str:
        """For notebooks."""
        from adaround_ext.report.notebook import model_fragment

        return model_fragment(self)

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

    def _mean(self, name: str) -> float:
        found = [entry.report.relative for entry in self.layers]
        usable = [r for r in found if all(0 < r[key] < inf for key in ("nearest", "final"))]
        return exp(fsum(log(r[name]) for r in usable) / len(usable)) if usable else 0.0

    def _stored(self) -> Iterator[LayerEntry]:
        """The layers, of tied ones the first."""
        seen: set[str] = set()
        for entry in self.layers:
            if entry.name not in seen:
                seen |= {entry.name, *entry.tied}
                yield entry
