"""AdaRound for one layer on a given grid: the paper's loop and the library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from adaround_ext import optimize_layer, reference
from adaround_ext.grid import QuantGrid
from benchmarks.paper.workload import Layer, calibration

PAPER = reference.ReferenceConfig(steps=1500, learning_rate=1e-1)  # as in examples/digits.py


def paper_codes(
    layer: Layer, grid: QuantGrid, seed: int, activation: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """The paper's: eq. (21), or with the activation function that follows the layer eq. (25)."""
    x = layer.inputs(calibration().images)
    activation = activation or nn.Identity()

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        matrix = layer.matrix.weight_from_matrix(weight)
        return activation(layer.matrix.forward(x, matrix, layer.matrix.bias))

    return reference.optimize(
        layer.weight, grid.scale, grid.zero_point, grid.qmin, grid.qmax, x,
        forward(x, layer.weight), forward, replace(PAPER, seed=seed), channel_dim=1,
    )  # fmt: skip


def our_codes(layer: Layer, grid: QuantGrid, **settings: Any) -> Tensor:
    """The library's with the bias kept, so that only the rounding differs."""
    bits = (grid.qmax + 1).bit_length()
    result = optimize_layer(
        layer.matrix.layer, layer.inputs(calibration().images), bits=bits,
        granularity="per_tensor", scale=grid.scale, bias="keep", **settings,
    )  # fmt: skip
    return result.codes
