"""Records of a quantized model: numbers of layers, of the whole, and what they add up to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from math import exp, fsum, inf, isfinite, log, prod
from typing import Any

from adaround_ext.config import AdaRoundConfig
from adaround_ext.files import check_keys, check_type
from adaround_ext.report.coverage import told_first
from adaround_ext.report.layer import LayerReport
from adaround_ext.report.text import as_shape

_SCALE_BITS = {"float32": 32, "float16": 16, "bfloat16": 16}


@dataclasses.dataclass(frozen=True)
class LayerEntry:
    """One quantized layer of a model.

    Attributes:
        name: The module's, as in ``model.named_modules()``.
        kind: Its class.
        shape: Of the weight.
        calls: How often one forward of the model runs it.
        block: The block it belongs to.
        shared_inputs: Other layers whose statistics it shares.
        tied: Other modules that hold the same weight.
        config: ``AdaRoundConfig.to_dict()`` of this layer.
        report: What happened.
        rows: Of the weight as a matrix, where the shape does not tell: a transposed convolution's
            with groups.
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
        """Checks the configuration, as JSON has it.

        Args:
            values: The fields of an entry.
            where: Their place, for the message.

        Raises:
            ValueError: It is no dict of exactly the settings that there are.
        """
        known = {field.name for field in dataclasses.fields(AdaRoundConfig)}
        check_type(values["config"], Mapping, f"{where}.config", "a dict")
        check_keys(values["config"], known, f"{where}.config")

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return prod(self.shape)

    @property
    def storage_bits(self) -> int:
        """Bits of codes, scales and zero points; 0 for an empty weight.

        ``b weights + scales (s + b)`` with b bits a code, s bits of ``scale_dtype``, and without
        the last b where the grid is symmetric. There is a scale for each tensor, row, or run of
        group_size columns of a row.
        """
        bits = int(self.config["bits"])
        scales = 1
        if self.config["granularity"] == "per_group":
            scales = self.weights // int(self.config["group_size"])
        elif self.config["granularity"] == "per_channel":
            transposed = self.kind.startswith("ConvTranspose")
            scales = self.shape[1 if transposed else 0] if self.rows is None else self.rows
        zero_point = 0 if self.config["symmetric"] else bits
        bits_per_scale = _SCALE_BITS[self.config["scale_dtype"]] + zero_point
        return bits * self.weights + scales * bits_per_scale if self.weights else 0

    @property
    def granularity(self) -> str:
        """That which has a scale, "tensor", "channel", or so many "columns"."""
        names = {"per_tensor": "tensor", "per_channel": "channel"}
        columns = f"{self.config['group_size']} columns"
        return names.get(self.config["granularity"], columns)

    def __repr__(self) -> str:
        return (
            f"LayerEntry({self.name}: {self.kind} {as_shape(self.shape)}, {self.config['bits']} "
            f"bits, a scale per {self.granularity}, {self.report.change})"
        )


@dataclasses.dataclass(frozen=True)
class ModelNumbers:
    """A quantized model in numbers, as charts, pages and text need them.

    :class:`adaround_ext.ModelReport`, which is one, describes the fields.
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
        """Bits of codes, scales and zero points a quantized weight; 0.0 without any.

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
        """The same as ``relative_error`` for rounding to nearest."""
        return self._mean("nearest")

    @property
    def warning(self) -> str | None:
        """That most parameters were not quantized, and why; None if they were."""
        return told_first(self.notes, self.quantized_parameters, self.parameters)

    @property
    def flipped(self) -> float:
        """Share of the quantized weights whose code is not that of rounding to nearest."""
        weights = self.quantized_parameters
        moved = fsum(entry.report.flipped * entry.weights for entry in self._stored())
        return moved / weights if weights else 0.0

    def worst(self, count: int = 10) -> tuple[LayerEntry, ...]:
        """The layers of highest relative final error, the highest first.

        Equal ones stay in execution order, and errors that are not finite come first.

        Args:
            count: How many, at most; at least 1.

        Raises:
            ValueError: ``count`` is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")

        def key(entry: LayerEntry) -> float:
            error = entry.report.relative["final"]
            return -error if isfinite(error) else -inf

        return tuple(sorted(self.layers, key=key)[:count])

    def _mean(self, name: str) -> float:
        """Geometric mean of one of the relative errors, "nearest" or "final"."""
        errors = [entry.report.relative for entry in self.layers]
        usable = [e for e in errors if all(0 < e[key] < inf for key in ("nearest", "final"))]
        return exp(fsum(log(e[name]) for e in usable) / len(usable)) if usable else 0.0

    def _stored(self) -> Iterator[LayerEntry]:
        """The layers, of tied ones the first."""
        seen: set[str] = set()
        for entry in self.layers:
            if entry.name not in seen:
                seen |= {entry.name, *entry.tied}
                yield entry
