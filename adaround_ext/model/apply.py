"""Quantized weights in a model: for a while, or for good."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch import Tensor, nn

from adaround_ext.planning.plan import Target
from adaround_ext.result import QuantizedWeight, write_


@contextmanager
def with_weights(weights: Iterable[tuple[Target, Tensor, Tensor | None]]) -> Iterator[None]:
    """The targets have these weights and biases inside, without a copy."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    created: list[nn.Module] = []  # layers that have a bias only inside

    def swap(parameter: nn.Parameter, value: Tensor) -> None:
        before.append((parameter, parameter.data))
        parameter.data = value.to(parameter.device)

    try:
        for target, weight, bias in weights:
            layer = target.matrix.layer
            swap(layer.get_parameter("weight"), weight)
            if bias is not None and layer.bias is None:
                layer.bias = nn.Parameter(bias.to(layer.weight.device), requires_grad=False)
                created.append(layer)
            elif bias is not None:
                swap(layer.get_parameter("bias"), bias)
        yield
    finally:
        for parameter, value in reversed(before):
            parameter.data = value
        for layer in created:
            layer.register_parameter("bias", None)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C has its effect after what is inside, which is done whole or not begun."""
    if threading.current_thread() is not threading.main_thread():  # where Ctrl-C does not come
        yield
        return
    interrupts: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: interrupts.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupts and callable(before):
        before(*interrupts[0])


def apply_(
    target: Target, weight: QuantizedWeight, bias: Tensor | None, dequantized: Tensor | None
) -> None:
    """Writes weight and bias into the target's parameters, and leaves the codes at its modules.

    ``dequantized``, where it is given, is the weight and becomes the parameter's own memory.
    """
    layer = target.matrix.layer
    if dequantized is None:
        write_(layer, weight.dequantize(target.matrix), bias)
    else:
        layer.get_parameter("weight").data = dequantized
        write_(layer, None, bias)
    for module in target.modules:
        module.quantized_weight = weight  # type: ignore[assignment]  # no tensor: an attribute
