"""A network layer by layer, with a solver that can be anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig
from adaround_ext.grid import QuantGrid, make_grid
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.ops import dequantize
from adaround_ext.tracing.evaluation import evaluation
from benchmarks.model import reference_model


@dataclass(frozen=True)
class LayerTask:
    """A layer with what it receives and what it should give, before the activation function.

    config: the layer's own; it has the activation function where that is part of the loss.
    """

    name: str
    matrix: MatrixLayer
    config: AdaRoundConfig
    inputs: Tensor
    targets: Tensor

    @property
    def weight(self) -> Tensor:
        """[rows, cols]."""
        return self.matrix.weight_matrix()

    def activated(self, y: Tensor) -> Tensor:
        activation = self.config.activation_function
        return y if activation is None else activation(y)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's outputs with the weight matrix, its activation function included."""
        matrix = self.matrix
        return self.activated(matrix.forward(x, matrix.weight_from_matrix(weight), matrix.bias))


# From a task to the quantized weight matrix and the new bias, None where it stays.
Solver = Callable[[LayerTask], tuple[Tensor, Tensor | None]]


def quantize_each_(
    model: nn.Module,
    images: Tensor,
    config: AdaRoundConfig,
    solve: Solver,
    *,
    only_first: bool = False,
) -> None:
    """Folds batch norms, then replaces the layers' weights by what ``solve`` makes of them.

    A layer's inputs come from the model with all layers before it quantized, its targets from the
    full-precision model.
    """
    count = 1 if only_first else None
    with evaluation(model):
        layers = reference_model.layers_of(model, images, config)
        modules = [layer.matrix.layer for layer in layers]
        targets = reference_model.outputs_of(model, modules, images)
        for layer, module, y in list(zip(layers, modules, targets, strict=True))[:count]:
            x = reference_model.input_of(model, module, images)
            task = LayerTask(layer.name, layer.matrix, layer.config, x, y)
            weight, bias = solve(task)
            with torch.no_grad():
                layer.matrix.weight.copy_(layer.matrix.weight_from_matrix(weight))
                if bias is not None:
                    module.get_parameter("bias").copy_(bias)


def rounded(codes_of: Callable[[LayerTask, QuantGrid], Tensor]) -> Solver:
    """The solver that gives ``codes_of`` the layer's grid and leaves biases alone."""

    def solve(task: LayerTask) -> tuple[Tensor, None]:
        grid = make_grid(task.weight, task.config)
        codes = codes_of(task, grid).to(torch.int8)
        return dequantize(codes, grid.scale, grid.zero_point), None

    return solve
