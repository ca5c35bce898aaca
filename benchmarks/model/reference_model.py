"""The paper's AdaRound for a whole model in plain PyTorch: what quantize_ is compared with.

Layer after layer in execution order, eq. (25) of Nagel et al., "Up or Down? Adaptive Rounding for
Post-Training Quantization", ICML 2020: a layer's inputs come from the model with all layers before
it quantized, its targets from the full-precision model, and the ReLU or ReLU6 that follows it
directly is part of the loss. The grid is that of least squared weight error; biases are kept.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, reference
from adaround_ext.grid import make_grid, nearest_codes
from adaround_ext.ops import dequantize
from adaround_ext.planning.plan import Target, make_plan
from adaround_ext.reference import ReferenceConfig
from adaround_ext.tracing.evaluation import evaluation
from adaround_ext.tracing.trace import trace
from adaround_ext.transforms.batch_norm import fold_batch_norm_


def nearest_(model: nn.Module, images: Tensor, config: AdaRoundConfig) -> None:
    """Folds batch norms and rounds every layer's weight to the nearest value of its grid."""
    with evaluation(model):
        for layer in layers_of(model, images, config):
            weight = layer.matrix.weight_matrix()
            grid = make_grid(weight, layer.config)
            codes = nearest_codes(weight, grid)
            _write(layer, dequantize(codes, grid.scale, grid.zero_point))


def adaround_(
    model: nn.Module, images: Tensor, config: AdaRoundConfig, settings: ReferenceConfig
) -> None:
    """Folds batch norms and quantizes every layer as the paper does.

    ``images`` [samples, ...] go through the model in one piece, and the outputs of all layers for
    them are kept: this is for small models. Of ``config`` the grid's settings count, with the scale
    "mse". ValueError for a layer that runs more than once.
    """
    with evaluation(model):
        layers = layers_of(model, images, config)
        modules = [layer.matrix.layer for layer in layers]
        targets = outputs_of(model, modules, images)
        for layer, y in zip(layers, targets, strict=True):
            x = input_of(model, layer.matrix.layer, images)
            _write(layer, _optimized(layer, x, y, settings))


def layers_of(model: nn.Module, images: Tensor, config: AdaRoundConfig) -> list[Target]:
    """The layers in execution order with what follows them, after batch norms are folded."""

    def run() -> object:
        return model(images[:1])

    fold_batch_norm_(model, trace(model, run), run)
    config = replace(config, scale="mse", bias="keep")
    layers = make_plan(model, trace(model, run), config, None, None, activation_aware=True).targets
    for layer in layers:
        if len(layer.calls) != 1:
            raise ValueError(f"model must run each layer once, {layer.name} ran {len(layer.calls)}")
    return layers


def outputs_of(model: nn.Module, modules: list[nn.Module], images: Tensor) -> list[Tensor]:
    outputs: dict[nn.Module, Tensor] = {}
    with ExitStack() as hooks:
        for module in modules:
            # A clone: an activation function that works in place must not change it.
            hook = module.register_forward_hook(lambda m, _, y: outputs.update({m: y.clone()}))
            hooks.enter_context(hook)
        model(images)
    return [outputs[module] for module in modules]


def input_of(model: nn.Module, module: nn.Module, images: Tensor) -> Tensor:
    captured: list[Tensor] = []
    with module.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0].clone())):
        model(images)
    return captured[0]


@torch.enable_grad()
def _optimized(layer: Target, x: Tensor, y: Tensor, settings: ReferenceConfig) -> Tensor:
    """The quantized weight matrix that the paper's loop finds for inputs x and outputs y."""
    matrix, bias = layer.matrix, layer.matrix.bias
    activation = layer.config.activation_function or nn.Identity()

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        output: Tensor = activation(matrix.forward(x, matrix.weight_from_matrix(weight), bias))
        return output

    weight = matrix.weight_matrix()
    grid = make_grid(weight, layer.config)
    codes = reference.optimize(
        weight, grid.scale, grid.zero_point, grid.qmin, grid.qmax, x, activation(y), forward,
        settings, channel_dim=1,
    )  # fmt: skip
    return dequantize(codes, grid.scale, grid.zero_point)


def _write(layer: Target, weight: Tensor) -> None:
    layer.matrix.weight.copy_(layer.matrix.weight_from_matrix(weight))
