"""Marked model: one in which every quantized layer and quantizer calls an operator of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext.activations.quantizer import ActivationQuantizer
from adaround_ext.export.quantized_layers import QuantizedLayer
from adaround_ext.export.runner import output_tensors
from adaround_ext.export.torch_export import signature_of

# Of operators that no optimisation knows, and so none touches. Their attribute "index" counts
# layers or quantizers.
DOMAIN = "adaround_ext"
LINEAR, WEIGHT, ACTIVATION = "Linear", "Weight", "Activation"


def is_plain_linear(module: nn.Module) -> bool:
    """Whether its forward is that of nn.Linear."""
    return type(module).forward is nn.Linear.forward and "forward" not in module.__dict__


@contextmanager
def marked(
    model: nn.Module,
    layers: Sequence[QuantizedLayer],
    quantizers: Sequence[ActivationQuantizer],
    kwargs: Collection[str],
) -> Iterator[set[int]]:
    """Inside, quantized layers and quantizers call an operator of ``DOMAIN``; hooks run as ever.

    LINEAR: (x, weight, bias) to x W^T + b. WEIGHT: a layer's weight to itself, for its own forward.
    ACTIVATION: x to x quantized. The model returns its output's tensors only, as a tuple, and has
    no parameter ``**kwargs`` but those of the names ``kwargs``. Yields the indices of the layers
    that have been called.
    """
    called: set[int] = set()
    with ExitStack() as undo:
        for index, layer in enumerate(layers):
            for module in dict.fromkeys(map(model.get_submodule, layer.names)):
                make = _linear if is_plain_linear(module) else _with_marked_weight
                _replace_forward(module, make(module, index, called), undo)
        for index, quantizer in enumerate(quantizers):
            _replace_forward(quantizer, _activation(index), undo)
        signature = signature_of(model, kwargs)
        _replace_forward(model, _only_tensors(model.forward, signature), undo)
        yield called


def _replace_forward(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    before = {name: value for name, value in module.__dict__.items() if name == "forward"}

    def restore() -> None:
        module.__dict__.pop("forward", None)
        module.__dict__.update(before)

    undo.callback(restore)
    module.__dict__["forward"] = forward  # past a __setattr__ that its class may have


def _operator(
    name: str, index: int, inputs: Sequence[Tensor | None], shape: Sequence[Any]
) -> Tensor:
    first = next(value for value in inputs if value is not None)
    attributes: dict[str, Any] = {"index": index}
    output: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}", inputs, attributes, dtype=first.dtype, shape=shape, version=1
    )
    return output.to(first.device)


def _linear(module: nn.Module, index: int, called: set[int]) -> Callable[[Tensor], Tensor]:
    @wraps(module.forward)
    def forward(input: Tensor) -> Tensor:
        called.add(index)
        inputs = (input, module.get_parameter("weight"), getattr(module, "bias", None))
        return _operator(LINEAR, index, inputs, (*input.shape[:-1], module.out_features))

    return forward


def _with_marked_weight(module: nn.Module, index: int, called: set[int]) -> Callable[..., Any]:
    original = module.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        called.add(index)
        weight = module.get_parameter("weight")
        parameters: dict[str, Any] = module._parameters
        try:
            parameters["weight"] = _operator(WEIGHT, index, [weight], weight.shape)
            return original(*args, **kwargs)
        finally:
            parameters["weight"] = weight

    return forward


def _activation(index: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return _operator(ACTIVATION, index, [x], x.shape) if x.is_floating_point() else x

    return forward


def _only_tensors(original: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(output_tensors(original(*args, **kwargs)))

    forward.__dict__["__signature__"] = signature
    return forward
