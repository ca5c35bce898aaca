"""A quantized model as a graph in which what is quantized stands as one operator each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaround_ext.activations.quantizer import ActivationQuantizer
from adaround_ext.export.quantized_layers import QuantizedLayer
from adaround_ext.export.runner import output_tensors

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
    own = module.forward

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        called.add(index)
        weight = module.get_parameter("weight")
        parameters: dict[str, Any] = module._parameters
        try:
            parameters["weight"] = _operator(WEIGHT, index, [weight], weight.shape)
            return own(*args, **kwargs)
        finally:
            parameters["weight"] = weight

    return forward


def _activation(index: int) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return _operator(ACTIVATION, index, [x], x.shape) if x.is_floating_point() else x

    return forward


def _only_tensors(own: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return tuple(output_tensors(own(*args, **kwargs)))

    forward.__dict__["__signature__"] = signature
    return forward


def signature_of(model: nn.Module, kwargs: Collection[str]) -> inspect.Signature:
    """That of ``forward``, with parameters of these names in the place of ``**kwargs``.

    Of those torch.export would refuse to let sizes change.
    """
    signature = inspect.signature(model.forward)
    plain = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(plain) == len(signature.parameters):
        return signature
    names = {parameter.name for parameter in plain}
    more = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in kwargs if n not in names]
    return signature.replace(parameters=[*plain, *more])


def automatic_shapes(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """torch.export's dynamic_shapes: dimension 0 of every input, and 1 of token ids and masks.

    Those are integers or booleans with two dimensions. A size that the model itself fixes is fixed.
    """
    auto = torch.export.Dim.AUTO

    def dims(leaf: object) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return None
        tokens = leaf.dim() == 2 and not leaf.is_floating_point()
        return {0: auto, 1: auto} if tokens else {0: auto}

    bound = signature_of(model, kwargs).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(dims, value) for name, value in bound.items()}
