"""Which layers hurt at which bits, measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from functools import partial
from itertools import zip_longest
from math import ceil, inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from adaround_ext.checks import check_devices, check_int, check_module
from adaround_ext.config import AdaRoundConfig, make_config
from adaround_ext.distributed import ALONE
from adaround_ext.linalg.precision import full_precision
from adaround_ext.mixed_precision.assign import check_budget
from adaround_ext.mixed_precision.result import Errors, Sensitivity
from adaround_ext.model.apply import swapped
from adaround_ext.model.collector import Collector
from adaround_ext.model.fitter import of_calls
from adaround_ext.model.prepare import prepare_
from adaround_ext.model.solve_units import problems_of, take_alike
from adaround_ext.model.units import Unit, parallel_segments
from adaround_ext.model.workspace import Choices, Traces, analyse
from adaround_ext.planning.overrides import Overrides, check_overrides
from adaround_ext.planning.plan import FilterFn, Target
from adaround_ext.process.omp_waits import short_waits_when_busy
from adaround_ext.process.turns import one_caller
from adaround_ext.replay.cache import MEMORY_BUDGET, ActivationCache
from adaround_ext.replay.calibration import Calibration, ForwardFn, single_device
from adaround_ext.replay.census import Census, NewCalls, batches_to_trace
from adaround_ext.replay.onload import Onloader
from adaround_ext.replay.replay import Replay
from adaround_ext.replay.run import Watch
from adaround_ext.report.coverage import few_quantized
from adaround_ext.result import LayerResult, QuantizedWeight
from adaround_ext.rounding.solve import solve
from adaround_ext.tensors import tensors
from adaround_ext.tracing.evaluation import evaluation
from adaround_ext.tracing.padding import PaddingMask
from adaround_ext.transforms.batch_norm import BatchNorm

_SAMPLES = 64  # that the network's error is measured on, about


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

    bits: widths from 2 to 8. config and settings: as for :func:`quantize_`, but without a config
    the preset is "fast"; the widths are ``bits`` whatever config says. average_bits: a budget for
    :meth:`Sensitivity.suggest`. filter_fn, overrides, forward_fn, padding_mask, batch_norm: as for
    :func:`quantize_`, but overrides must not set bits; folded batch norms are taken out of their
    layers again. batches: the first so many calibration batches are measured on, None for about 64
    samples.

    Cost: the statistics, a solution for each layer and width, and 1 + layers x widths whole
    forwards of every measured batch. Codes of all layers and widths, a byte a weight each, wait in
    memory up to 256 MiB and beyond it in temporary files.

    Raises TypeError and ValueError that name the argument, the rule and what came: also where the
    model returns no floating-point tensor, none but zeros, or other shapes when it is quantized.
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
    with (
        short_waits_when_busy(),
        ActivationCache(MEMORY_BUDGET) as cache,
        evaluation(model, config.seed),
        ExitStack() as undo,
    ):
        data = Calibration(
            model, calibration, forward_fn, padding_mask, cache, single_device(model)
        )
        run = partial(data.run, 0, config.seed)
        prepared = prepare_(model, run, undo, batch_norm, False)
        traces = Traces(model, data, {0: prepared.trace})
        choices = Choices(config, overrides, filter_fn, padding_mask)
        if batches is None:
            batches = ceil(_SAMPLES * data.batches / max(data.samples, data.batches))
        batches = min(batches, data.batches)
        local = None
        while local is None:
            known = analyse(model, traces, choices)
            with ActivationCache(MEMORY_BUDGET) as recordings:
                census = Census(model, known.trace, recordings.rounds)
                replay = Replay(
                    model, data, known.calls, recordings, Onloader(model, [], None), 0,
                    config.seed, census,
                )  # fmt: skip
                try:
                    local = _quantized(replay, data, known.units, widths, cache, progress)
                except NewCalls as new:
                    traces.add(new.batches)
        plan = known.plan
        padding = [
            known.masks.name_of(known.flow.inputs.get(value.storage, frozenset()))
            for value in prepared.trace.outputs
            if not value.integral
        ]
        targets = [target for target in plan.targets if local[target.name]]
        if not targets:
            name = plan.targets[0].name
            raise ValueError(f"calibration must reach {name}, got no rows of any layer")
        network = _measured(data, padding, targets, widths, cache, batches, config.seed, progress)
    layers = tuple(target.name for target in targets)
    reason = "no row of the calibration data came to it"
    empty = {target.name: reason for target in plan.targets if target.name not in layers}
    weights = [target.matrix.layer.get_parameter("weight") for target in targets]
    few = few_quantized(model, weights, plan.skipped | empty)
    return Sensitivity(
        model=type(model).__name__,
        layers=layers,
        weights={target.name: target.matrix.weight.numel() for target in targets},
        bits=widths,
        local={name: local[name] for name in layers},
        network=network,
        average_bits=average_bits,
        batches=batches,
        notes=tuple(
            few
            + data.notes
            + prepared.notes
            + plan.notes
            + [f"{name}: {why}" for name, why in empty.items()]
            + replay.notes()
        ),
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
        for segment in parallel_segments(units, MEMORY_BUDGET):
            collectors = [Collector(unit, None) for unit in segment]
            _collect(collectors, replay, data, waiting)
            new = replay.census.new_calls()
            if new:
                raise NewCalls(batches_to_trace(new))
            for alike in take_alike(collectors, ALONE):
                together = [collector for collector in alike if collector.finish()]
                for target, width, result in _solutions(together, widths):
                    parts = (result.codes, result.scale, result.zero_point, result.bias)
                    cache.put((target.name, width), parts)
                    local[target.name][width] = result.report.relative["final"]
                done = [target for collector in alike for target in collector.unit.targets]
                waiting.difference_update(m for target in done for m in target.modules)
                bar.update(len(done))
    return local


def _collect(
    collectors: list[Collector], replay: Replay, data: Calibration, waiting: set[nn.Module]
) -> None:
    first = [collector.unit.targets[0] for collector in collectors]
    watch = Watch(inputs=frozenset(module for target in first for module in target.modules))
    calls = sorted((c for t in first for c in t.calls), key=lambda call: call.begin)
    for batch in replay.sweep(waiting, calls, {"full": (watch, nullcontext)}):
        for collector, target in zip(collectors, first, strict=True):
            x = of_calls(target, watch.taken["full"])
            mask = data.mask(batch, target.padding)
            collector.add(batch, x, None, mask, data.segments[batch])


def _solutions(
    batch: list[Collector], widths: tuple[int, ...]
) -> Iterator[tuple[Target, int, LayerResult]]:
    """Every target of finished collectors at every width, each problem posed once."""
    if not batch:
        return
    owners = {target.matrix: target for own in batch for target in own.unit.targets}
    device = batch[0].unit.layers[0].weight.device
    for config, alike in problems_of(batch):
        layers = [layer for problem in alike for layer in problem.layers]
        for width in widths:
            with full_precision(device):
                results = solve(alike, dataclasses.replace(config, bits=width))
            for layer, result in zip(layers, results, strict=True):
                yield owners[layer], width, result


def _measured(
    data: Calibration,
    padding: list[str | None],
    targets: list[Target],
    widths: tuple[int, ...],
    cache: ActivationCache,
    batches: int,
    seed: int,
    progress: bool,
) -> Errors:
    """Relative errors of the model's outputs; ``padding`` names the mask of each."""
    energy = 0.0
    missed: Errors = {target.name: dict.fromkeys(widths, 0.0) for target in targets}
    total = batches * len(targets) * len(widths)
    with tqdm(total=total, disable=not progress, desc="measuring", unit="run") as bar:
        for batch in range(batches):
            masks = [data.mask(batch, name) for name in padding]
            wanted = _outputs(data, batch, masks, seed)
            energy += sum(_energy(y, torch.zeros_like(y)) for y in wanted)
            for target in targets:
                for width in widths:
                    codes, scale, zero_point, bias = cache.get((target.name, width))
                    quantized = QuantizedWeight(codes, scale, zero_point, width)
                    weight = quantized.dequantize(target.matrix)
                    with swapped([(target, weight, bias)]):
                        outputs = _outputs(data, batch, masks, seed)
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


def _outputs(data: Calibration, batch: int, masks: list[Tensor | None], seed: int) -> list[Tensor]:
    """The floating-point tensors that the model returns, without padding, at least float32."""
    returned = data.run(batch, seed + batch)  # the same draws in every run
    found = [t for t in tensors(returned) if t.is_floating_point()]
    if not found:
        rule = "model must return floating-point tensors, or forward_fn must"
        raise ValueError(f"{rule}, got {type(returned).__name__} without any")
    found = [
        t if mask is None or t.shape[:2] != mask.shape else t[mask.to(t.device)]
        for t, mask in zip_longest(found, masks[: len(found)])
    ]
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in found]


def _energy(wanted: Tensor, outputs: Tensor) -> float:
    """||wanted - outputs||^2, where wanted is finite."""
    difference = torch.where(wanted.isfinite(), wanted - outputs, 0.0)
    return float(difference.square().sum(dtype=torch.float64))
