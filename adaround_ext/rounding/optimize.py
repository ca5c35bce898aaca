"""AdaRound for one layer in one call, or for layers that share their inputs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import nn

from adaround_ext.config import AdaRoundConfig, make_config
from adaround_ext.layers.inputs import Data, Targets, batches, gather
from adaround_ext.layers.matrix import MatrixLayer, matrix_layer
from adaround_ext.linalg.precision import full_precision
from adaround_ext.ops.library import check_device
from adaround_ext.presets import choose_objective
from adaround_ext.process.omp_waits import short_waits_when_busy
from adaround_ext.result import LayerResult
from adaround_ext.rounding.gram_problem import gram_problems
from adaround_ext.rounding.problem import Problem
from adaround_ext.rounding.sampled_problem import sampled_problems
from adaround_ext.rounding.solve import solve
from adaround_ext.statistics.moments import GramStatistics

_logger = logging.getLogger("adaround_ext")


@overload
def optimize_layer(
    layer: nn.Module,
    inputs: Data,
    targets: Targets | None = None,
    config: AdaRoundConfig | None = None,
    **overrides: Any,
) -> LayerResult: ...
@overload
def optimize_layer(
    layer: Sequence[nn.Module],
    inputs: Data,
    targets: Targets | None = None,
    config: AdaRoundConfig | None = None,
    **overrides: Any,
) -> list[LayerResult]: ...
@torch.inference_mode(False)  # the sampled objective needs autograd
@torch.no_grad()
def optimize_layer(
    layer: nn.Module | Sequence[nn.Module],
    inputs: Data,
    targets: Targets | None = None,
    config: AdaRoundConfig | None = None,
    **overrides: Any,
) -> LayerResult | list[LayerResult]:
    """Rounds a layer's weights so that its outputs change least (AdaRound, eq. (25)).

    min over codes of E || f(y) - f(W_q x + b) ||^2, y = ``targets`` or W x + b, f the activation.

    Args:
        layer: Linear, Conv1d/2d/3d or ConvTranspose1d/2d/3d, or a sequence of them that share their
            inputs (q, k, v), which are then solved together; the layers are not changed.
        inputs: What the layer receives, a floating-point tensor [samples, ...] or an iterable of
            such batches (a DataLoader, a generator). The Gram objective streams them: memory does
            not grow with their number. The sampled objective keeps them on the device.
        targets: None, or what the full-precision layer should give, before the activation function:
            a tensor for a tensor, an iterable of tensors in step with an iterable; for several
            layers a tuple of tensors in each place. With inputs from the already quantized part of
            a model and targets from the full-precision model this is the paper's asymmetric
            reconstruction.
        config: See :class:`AdaRoundConfig`; None for the defaults.
        overrides: Settings that take the place of those in ``config``.

    Returns:
        A :class:`LayerResult`, or a list of them for a sequence. The result is in no row worse than
        rounding to nearest on this data (where rows share a scale: on its grid in no row, on the
        starting grid as a whole).

    Raises:
        TypeError: A module or argument is unsupported; the error names it, the rule and what came.
        ValueError: An argument does not fit, as named in the same way.
    """
    config = make_config(config, overrides, optimize_layer)
    if not isinstance(layer, (nn.Module, Iterable)):
        raise TypeError(f"layer must be a module or a sequence of them, got {type(layer).__name__}")
    single = isinstance(layer, nn.Module)
    modules: list[nn.Module] = [layer] if isinstance(layer, nn.Module) else list(layer)
    layers = [matrix_layer(module) for module in modules]
    _check_layers(layers)
    objective, reason = choose_objective(config)
    problems = _gram_problems if objective == "gram" else _sampled_problems
    with short_waits_when_busy(), full_precision(layers[0].weight.device):
        by_layer: dict[MatrixLayer, LayerResult] = {}
        for problem in problems(layers, inputs, targets, config, reason):
            by_layer.update(zip(problem.layers, solve([problem], config), strict=True))
    results = [by_layer[layer] for layer in layers]
    for result in results:
        _logger.info("%s", result.report)
    return results[0] if single else results


def _check_layers(layers: list[MatrixLayer]) -> None:
    if not layers:
        raise ValueError("layer must be a module or at least one of them, got an empty sequence")
    for layer in layers:
        weight = layer.weight
        check_device(f"weight of {_name([layer])}", weight.device)
        bad = weight.numel() - int(torch.isfinite(weight).sum())
        if bad:
            raise ValueError(
                f"weight of {_name([layer])} must be finite, got {bad} NaN or infinite values"
            )
        first = layers[0].weight
        kind = (layer.geometry, weight.dtype, weight.device)
        if kind != (layers[0].geometry, first.dtype, first.device):
            raise ValueError(
                "layer must hold modules of one dtype on one device that take the same inputs in "
                f"the same way, got {layers[0].layer}, {first.dtype} on {first.device}, and "
                f"{layer.layer}, {weight.dtype} on {weight.device}"
            )


def _name(layers: list[MatrixLayer]) -> str:
    return ", ".join(str(layer.layer) for layer in layers)


def _gram_problems(
    layers: list[MatrixLayer],
    inputs: Data,
    targets: Targets | None,
    config: AdaRoundConfig,
    reason: str,
) -> Iterator[Problem]:
    started = time.perf_counter()
    statistics = GramStatistics(layers, config.positions, config.seed)
    statistics.collect(batches(layers, _name(layers), inputs, targets))
    seconds = time.perf_counter() - started
    return gram_problems(layers, statistics, config, reason, seconds)


def _sampled_problems(
    layers: list[MatrixLayer],
    inputs: Data,
    targets: Targets | None,
    config: AdaRoundConfig,
    reason: str,
) -> Iterator[Problem]:
    started = time.perf_counter()
    x, outputs, samples = gather(layers, _name(layers), inputs, targets)
    seconds = time.perf_counter() - started
    return sampled_problems(layers, x, outputs, samples, config, reason, seconds)
