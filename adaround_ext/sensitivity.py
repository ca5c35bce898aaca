"""Which layers of a model hurt at which bit widths, and widths for all within a budget."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from glob import escape
from itertools import islice
from math import ceil, fsum, inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from adaround_ext.apply import swapped
from adaround_ext.assignment import assign_bits, check_budget
from adaround_ext.blocks import block_calls, find_blocks
from adaround_ext.cache import ActivationCache
from adaround_ext.calibration import Calibration, ForwardFn, PaddingMask
from adaround_ext.capture import Replay, Watch
from adaround_ext.collect import Collector, Unit, make_units, parallel_segments
from adaround_ext.config import AdaRoundConfig, check_int, make_config
from adaround_ext.fitting import _of_calls
from adaround_ext.model import _device
from adaround_ext.model_report import _check_keys, _read, _write
from adaround_ext.plan import FilterFn, Overrides, Target, make_plan
from adaround_ext.precision import full_precision
from adaround_ext.prepare import BatchNorm, prepare_
from adaround_ext.report_plot import FAINT, INK, as_count, as_percent
from adaround_ext.result import LayerResult, QuantizedWeight
from adaround_ext.solve import solve
from adaround_ext.trace import evaluation, tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT = "adaround_ext.sensitivity.1"
_MEMORY_BUDGET = 1 << 29  # bytes, before files are used
_SAMPLES = 64  # that the network's error is measured on, about
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
        :func:`adaround_ext.assignment.assign_bits` for the method. None takes the budget that was
        given to :func:`sensitivity`; ValueError where there is none, and for one that is not within
        ``bits`` or cannot be met.
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
        _check_keys(plain, set(_PLAIN), "sensitivity")
        read = {n: _read(hint, plain[n], f"sensitivity.{n}") for n, hint in _PLAIN.items()}
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
        _write(Path(path), json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sensitivity:
        """Reads what :meth:`save` wrote; ValueError for any other file."""
        data = Path(path).read_bytes()
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
        for name, *cells in rows:
            padded = (c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))
            lines.append("  ".join(["", name.ljust(widths[0]), *padded]))
        if chosen is not None:
            lines.append(
                f"  chosen for at most {self.average_bits:g} bits a weight: errors sum up to "
                f"{as_percent(self.predicted(chosen))}"
            )
        return "\n".join(lines)


def sensitivity(
    model: nn.Module,
    calibration: Iterable[Any],
    bits: Iterable[int] = (2, 3, 4, 8),
    config: AdaRoundConfig | None = None,
    *,
    average_bits: float | None = None,
    filter_fn: FilterFn | None = None,
    overrides: Overrides | None = None,
    forward_fn: ForwardFn | None = None,
    padding_mask: PaddingMask = "attention_mask",
    batch_norm: BatchNorm = "fold",
    batches: int | None = None,
    progress: bool = True,
    **settings: Any,
) -> Sensitivity:
    """Measures what each layer's quantization costs at each bit width; the model is unchanged.

    Every layer that :func:`quantize_` would quantize is quantized alone, on full-precision inputs,
    at each of ``bits``; statistics are collected once for all. Then the model runs with one layer
    quantized: ``network[layer][b] = ||f(x; W_q) - f(x)||^2 / ||f(x)||^2`` over all floating-point
    tensors that it (or ``forward_fn``) returns, without padding where they are [batch, tokens, ...]
    and without what is not finite in f(x).

    bits: widths from 2 to 8. config and settings: as for :func:`quantize_`, but without a config
    the preset is "fast"; the widths are ``bits`` whatever config says. average_bits: a budget for
    :meth:`Sensitivity.suggest`. filter_fn, overrides, forward_fn, padding_mask, batch_norm: as for
    :func:`quantize_`, but overrides must not set bits; folded batch norms are taken out of their
    layers again. batches: the first so many calibration batches are measured on, None for about 64
    samples.

    Cost: the statistics, a solution for each layer and width, and 1 + layers x widths whole
    forwards of every measured batch. Codes of all layers and widths, a byte a weight each, wait in
    memory up to 512 MiB and beyond it in temporary files.

    Raises TypeError and ValueError that name the argument, the rule and what came: also where the
    model returns no floating-point tensor, none but zeros, or other shapes when it is quantized.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    widths = _widths(bits)
    config = make_config(AdaRoundConfig(preset="fast") if config is None else config, settings)
    if average_bits is not None:
        check_budget(average_bits, widths)
    if batches is not None:
        check_int("batches", batches, 1)
    _check_overrides(overrides)
    if batch_norm not in ("fold", "keep"):
        raise ValueError(f"batch_norm must be fold or keep, got {batch_norm!r}")
    with (
        ActivationCache(_MEMORY_BUDGET) as cache,
        evaluation(model, config.seed),
        ExitStack() as undo,
    ):
        data = Calibration(model, calibration, forward_fn, padding_mask, cache, _device(model))
        prepared = prepare_(model, lambda: data.run(0), undo, batch_norm, False)
        seen = prepared.trace
        plan = make_plan(model, seen, config, overrides, filter_fn, False)
        if not plan.targets:
            why = "; ".join(f"{n}: {reason}" for n, reason in islice(plan.skipped.items(), 3))
            raise ValueError(f"model must have layers to quantize, got none: {why or 'no layers'}")
        if batches is None:
            batches = ceil(_SAMPLES * data.batches / max(data.samples, data.batches))
        batches = min(batches, data.batches)
        units = make_units(plan.targets)
        with ActivationCache(_MEMORY_BUDGET) as recordings:
            calls = block_calls(model, seen, find_blocks(model, seen, None))
            replay = Replay(model, data, calls, recordings, 0, config.seed)
            local = _quantized(replay, data, units, widths, cache, progress)
        network = _measured(data, plan.targets, widths, cache, batches, config.seed, progress)
    layers = tuple(target.name for target in plan.targets)
    return Sensitivity(
        model=type(model).__name__,
        layers=layers,
        weights={target.name: target.matrix.weight.numel() for target in plan.targets},
        bits=widths,
        local={name: local[name] for name in layers},
        network=network,
        average_bits=average_bits,
        batches=batches,
        notes=tuple(data.notes + prepared.notes + plan.notes),
    )


def _widths(bits: object) -> tuple[int, ...]:
    if isinstance(bits, (str, bytes)) or not isinstance(bits, Iterable):
        raise TypeError(f"bits must be integers from 2 to 8, got {bits!r}")
    widths = list(bits)
    for width in widths:
        check_int("bits", width, 2, 8)
    if not widths or len(set(widths)) < len(widths):
        raise ValueError(f"bits must be at least one width, without repeats, got {widths}")
    return tuple(sorted(widths))


def _check_overrides(overrides: Overrides | None) -> None:
    for key, value in overrides.items() if isinstance(overrides, Mapping) else ():
        if isinstance(value, Mapping) and "bits" in value:
            raise ValueError(f"overrides[{key!r}] must not set bits: they are what is measured")


def _quantized(
    replay: Replay,
    data: Calibration,
    units: list[Unit],
    widths: tuple[int, ...],
    cache: ActivationCache,
    progress: bool,
) -> Errors:
    """Local errors; weights and biases at all widths go to ``cache``."""
    local: Errors = {target.name: {} for unit in units for target in unit.targets}
    waiting = {m for unit in units for target in unit.targets for m in target.modules}
    with tqdm(total=len(local), disable=not progress, desc="quantizing", unit="layer") as bar:
        for segment in parallel_segments(units, _MEMORY_BUDGET):
            collectors = [Collector(unit, None) for unit in segment]
            _collect(collectors, replay, data, waiting)
            while collectors:
                unit, found = collectors[0].unit, _solutions(collectors.pop(0), widths)
                for target, width, result in found:
                    parts = (result.codes, result.scale, result.zero_point, result.bias)
                    cache.put((target.name, width), parts)
                    local[target.name][width] = result.report.relative["final"]
                waiting.difference_update(m for target in unit.targets for m in target.modules)
                bar.update(len(unit.targets))
    return local


def _collect(
    collectors: list[Collector], replay: Replay, data: Calibration, waiting: set[nn.Module]
) -> None:
    first = [collector.unit.targets[0] for collector in collectors]
    watch = Watch(inputs=frozenset(module for target in first for module in target.modules))
    counts = {call.module: call.index + 1 for target in first for call in target.calls}
    for batch in replay.sweep(waiting, counts, {"full": (watch, nullcontext)}):
        mask = data.mask(batch)
        for collector, target in zip(collectors, first, strict=True):
            collector.add(batch, _of_calls(target, watch.taken["full"]), None, mask)


def _solutions(
    collector: Collector, widths: tuple[int, ...]
) -> Iterator[tuple[Target, int, LayerResult]]:
    """Every target at every width, each problem posed once."""
    owners = {target.matrix: target for target in collector.unit.targets}
    device = collector.unit.layers[0].weight.device
    for part, problems in collector.problems():
        config = collector.unit.targets[part[0]].config
        for problem in problems:
            for width in widths:
                with full_precision(device):
                    results = solve(problem, dataclasses.replace(config, bits=width))
                for layer, result in zip(problem.layers, results, strict=True):
                    yield owners[layer], width, result


def _measured(
    data: Calibration,
    targets: list[Target],
    widths: tuple[int, ...],
    cache: ActivationCache,
    batches: int,
    seed: int,
    progress: bool,
) -> Errors:
    """Relative errors of the model's outputs."""
    energy = 0.0
    missed: Errors = {target.name: dict.fromkeys(widths, 0.0) for target in targets}
    total = batches * len(targets) * len(widths)
    with tqdm(total=total, disable=not progress, desc="measuring", unit="run") as bar:
        for batch in range(batches):
            mask = data.mask(batch)
            wanted = _outputs(data, batch, mask, seed)
            energy += sum(_energy(y, torch.zeros_like(y)) for y in wanted)
            for target in targets:
                for width in widths:
                    codes, scale, zero_point, bias = cache.get((target.name, width))
                    quantized = QuantizedWeight(codes, scale, zero_point, width)
                    weight = quantized.dequantize(target.matrix)
                    with swapped([(target, weight, bias)]):
                        outputs = _outputs(data, batch, mask, seed)
                    if [y.shape for y in outputs] != [y.shape for y in wanted]:
                        raise ValueError(
                            "model must return tensors of the same shapes when it is quantized, "
                            f"got others with {target.name} at {width} bits: give a forward_fn "
                            "that returns what is to be compared"
                        )
                    pairs = zip(wanted, outputs, strict=True)
                    missed[target.name][width] += sum(_energy(y, z) for y, z in pairs)
                    bar.update()
    if energy == 0:
        raise ValueError("model must return other outputs than zeros on calibration, got only them")
    return {
        name: {width: e / energy if isfinite(e) else inf for width, e in own.items()}
        for name, own in missed.items()
    }


def _outputs(data: Calibration, batch: int, mask: Tensor | None, seed: int) -> list[Tensor]:
    """The floating-point tensors that the model returns, without padding, at least float32."""
    torch.manual_seed(seed + batch)  # the same draws in every run
    returned = data.run(batch)
    found = [t for t in tensors(returned) if t.is_floating_point()]
    if not found:
        rule = "model must return floating-point tensors, or forward_fn must"
        raise ValueError(f"{rule}, got {type(returned).__name__} without any")
    if mask is not None:
        found = [t[mask.to(t.device)] if t.shape[:2] == mask.shape else t for t in found]
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in found]


def _energy(wanted: Tensor, outputs: Tensor) -> float:
    """||wanted - outputs||^2, where wanted is finite."""
    difference = torch.where(wanted.isfinite(), wanted - outputs, 0.0)
    return float(difference.square().sum(dtype=torch.float64))


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
        figure.savefig(path)
    return figure
