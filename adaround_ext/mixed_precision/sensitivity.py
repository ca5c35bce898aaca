"""Sensitivity: which layers hurt at which bits, measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from math import ceil
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from adaround_ext.checks import check_devices, check_int, check_module
from adaround_ext.config import AdaRoundConfig, make_config
from adaround_ext.distributed import ALONE
from adaround_ext.export.goal.goal import Goal
from adaround_ext.linalg.precision import full_precision
from adaround_ext.mixed_precision.assign import check_budget
from adaround_ext.mixed_precision.network_errors import network_errors
from adaround_ext.mixed_precision.result import Errors, Sensitivity
from adaround_ext.model.collector import Collector
from adaround_ext.model.solve_units import alike_batches, problems_of
from adaround_ext.model.sweep import sweep
from adaround_ext.model.units import parallel_passes
from adaround_ext.model.workspace import Analysis, Workspace, WorkspaceOptions, opened
from adaround_ext.planning.candidates import FilterFn
from adaround_ext.planning.overrides import Overrides, check_overrides
from adaround_ext.planning.plan import Target
from adaround_ext.process.turns import one_caller
from adaround_ext.replay.cache import MEMORY_BUDGET, ActivationCache
from adaround_ext.replay.calibration import ForwardFn
from adaround_ext.replay.census import NewCalls, batches_to_trace
from adaround_ext.report.coverage import few_quantized
from adaround_ext.result import LayerResult
from adaround_ext.rounding.solve import solve
from adaround_ext.tracing.padding import PaddingMask
from adaround_ext.transforms.batch_norm import BatchNorm

_SAMPLES = 64  # that the network's error is measured on, about


@dataclasses.dataclass(frozen=True)
class _Local:
    """Every layer alone: relative errors by layer and width, and notes of the walk."""

    analysis: Analysis
    errors: Errors
    notes: list[str]

    @property
    def targets(self) -> list[Target]:
        """Those that rows came to."""
        return [target for target in self.analysis.plan.targets if self.errors[target.name]]


@one_caller()  # seeds and precisions are the process's
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

    Cost: the statistics, a solution for each layer and width, and 1 + layers x widths whole
    forwards of every measured batch. Codes of all layers and widths, a byte a weight each, wait in
    memory up to 256 MiB and beyond it in temporary files.

    Args:
        model: as for :func:`quantize_`.
        calibration: as for :func:`quantize_`.
        bits: widths from 2 to 8.
        config: as for :func:`quantize_`, but without one the preset is "fast"; the widths are
            ``bits`` whatever it says.
        average_bits: a budget for :meth:`Sensitivity.suggest`.
        filter_fn: as for :func:`quantize_`.
        overrides: as for :func:`quantize_`, but they must not set bits.
        forward_fn: as for :func:`quantize_`.
        padding_mask: as for :func:`quantize_`.
        batch_norm: as for :func:`quantize_`; folded batch norms are taken out of their layers
            again.
        batches: the first so many calibration batches are measured on, None for about 64 samples.
        progress: show bars.
        **settings: as for :func:`quantize_`.

    Returns:
        The errors of each layer at each width, of its own outputs and of the model's.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came: also where the model
            returns no floating-point tensor, none but zeros, or other shapes when it is quantized.
    """
    check_module(model)
    check_devices(model)
    widths = _widths(bits)
    if config is None:
        config = AdaRoundConfig(preset="fast")
    config = make_config(config, settings, sensitivity)
    if average_bits is not None:
        check_budget(average_bits, widths)
    if batches is not None:
        check_int("batches", batches, 1)
    _check_overrides(overrides)
    check_overrides(overrides, config, model)
    if batch_norm not in ("fold", "keep"):
        raise ValueError(f"batch_norm must be fold or keep, got {batch_norm!r}")
    options = WorkspaceOptions(
        config, overrides, filter_fn, forward_fn, batch_norm=batch_norm, padding_mask=padding_mask,
        device_budget=0, quantizers_off=False,
    )  # fmt: skip
    with (
        opened(model, calibration, options, Goal(None, model)) as workspace,
        ActivationCache(MEMORY_BUDGET) as solutions,
    ):
        local = workspace.with_all_calls(
            partial(_quantized, workspace, widths, solutions, progress)
        )
        if not local.targets:
            name = local.analysis.plan.targets[0].name
            raise ValueError(f"calibration must reach {name}, got no rows of any layer")
        data = workspace.data
        if batches is None:
            batches = ceil(_SAMPLES * data.batches / max(data.samples, data.batches))
        batches = min(batches, data.batches)
        padding = _padding(workspace, local.analysis)
        network = network_errors(
            data, padding, local.targets, widths, solutions, batches, config.seed, progress
        )
    return _result(workspace, local, network, widths, average_bits, batches)


def _result(
    workspace: Workspace,
    local: _Local,
    network: Errors,
    widths: tuple[int, ...],
    average_bits: float | None,
    batches: int,
) -> Sensitivity:
    model, plan = workspace.model, local.analysis.plan
    layers = tuple(target.name for target in local.targets)
    reason = "no row of the calibration data came to it"
    empty = {target.name: reason for target in plan.targets if target.name not in layers}
    weights = [target.matrix.layer.get_parameter("weight") for target in local.targets]
    return Sensitivity(
        model=type(model).__name__,
        layers=layers,
        weights={target.name: target.matrix.weight.numel() for target in local.targets},
        bits=widths,
        local={name: local.errors[name] for name in layers},
        network=network,
        average_bits=average_bits,
        batches=batches,
        notes=(
            *few_quantized(model, weights, plan.skipped | empty),
            *workspace.data.notes,
            *workspace.prepared.notes,
            *plan.notes,
            *(f"{name}: {why}" for name, why in empty.items()),
            *local.notes,
        ),
    )


def _padding(workspace: Workspace, analysis: Analysis) -> list[str | None]:
    """The names of the masks of the tensors that the model returns."""
    inputs, masks = analysis.flow.inputs, analysis.masks
    return [
        masks.name_of(inputs.get(value.storage, frozenset()))
        for value in workspace.prepared.trace.outputs
        if not value.integral
    ]


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
    workspace: Workspace,
    widths: tuple[int, ...],
    solutions: ActivationCache,
    progress: bool,
    analysis: Analysis,
) -> _Local:
    """Local errors; codes, scales, zero points and biases at all widths go to ``solutions``."""
    units = analysis.units
    errors: Errors = {target.name: {} for unit in units for target in unit.targets}
    waiting = {m for unit in units for target in unit.targets for m in target.modules}
    with (
        workspace.replaying(analysis) as replay,
        tqdm(total=len(errors), disable=not progress, desc="quantizing", unit="layer") as bar,
    ):
        for units_of_pass in parallel_passes(units, MEMORY_BUDGET):
            collectors = [Collector(unit, None) for unit in units_of_pass]
            sweep(replay, workspace.data, collectors, waiting)
            new = replay.census.new_calls()
            if new:
                raise NewCalls(batches_to_trace(new))
            for alike in alike_batches(collectors, ALONE):
                reached = [collector for collector in alike if collector.finish()]
                for target, width, result in _solutions(reached, widths):
                    stored = (result.codes, result.scale, result.zero_point, result.bias)
                    solutions.put((target.name, width), stored)
                    errors[target.name][width] = result.report.relative["final"]
                done = [target for collector in alike for target in collector.unit.targets]
                waiting.difference_update(m for target in done for m in target.modules)
                bar.update(len(done))
        return _Local(analysis, errors, replay.notes())


def _solutions(
    batch: list[Collector], widths: tuple[int, ...]
) -> Iterator[tuple[Target, int, LayerResult]]:
    """Every target of finished collectors at every width, each problem posed once."""
    if not batch:
        return
    target_of = {target.matrix: target for each in batch for target in each.unit.targets}
    device = batch[0].unit.layers[0].weight.device
    for config, alike in problems_of(batch):
        layers = [layer for problem in alike for layer in problem.layers]
        for width in widths:
            with full_precision(device):
                results = solve(alike, dataclasses.replace(config, bits=width))
            for layer, result in zip(layers, results, strict=True):
                yield target_of[layer], width, result
