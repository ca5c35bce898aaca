"""Plain layers: whether a layer computes what its class does, and nothing more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from adaround_ext.layers.matrix import SUPPORTED, MatrixLayer, matrix_layer
from adaround_ext.tensors import HALF_TOLERANCE, TOLERANCE, tensors
from adaround_ext.tracing.trace import Trace

_FORWARDS = {kind.forward for kind in SUPPORTED}
_CONVOLUTIONS = {
    nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward
}  # fmt: skip
_CHECKED_SAMPLES = 16  # of a layer's input, or one of a convolution's
_REASON = "its output is not that of its weight and bias alone, as it was called"


def layers_that_do_more(trace: Trace, run: Callable[[], object]) -> dict[nn.Module, str]:
    """Linear and convolution layers that do more than their class, and a reason.

    run: calls the model that was traced, with quantizers of activations letting everything through:
    those are hooks too, of which a layer's fit knows.

    These are subclasses with another forward (standardized weights, adapters), layers with hooks on
    their outputs, transposed convolutions of a size given by the call. They are run: where the
    output is that of weight and bias nevertheless, as with hooks that only look, they are fine.
    """
    suspects: dict[nn.Module, MatrixLayer] = {}
    for module in dict.fromkeys(call.module for call in trace.calls):
        instance_does_more = "forward" in module.__dict__ or bool(module._forward_hooks)
        if isinstance(module, SUPPORTED) and (instance_does_more or not is_plain(module)):
            with suppress(TypeError, ValueError):  # those are skipped anyway
                suspects[module] = matrix_layer(module)
    reasons: dict[nn.Module, str] = {}
    inputs: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        first = next(tensors((args, kwargs)), None)
        if first is not None:
            inputs[module] = first.clone()

    def after(module: nn.Module, args: object, output: object) -> None:
        x = inputs.pop(module, None)
        if x is not None and not _computes(suspects[module], x, output):
            reasons[module] = _REASON

    with ExitStack() as hooks:
        for module in suspects:
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(after))
        if suspects:
            run()
    return reasons


def is_plain(module: nn.Module) -> bool:
    """Whether a layer's class computes what torch's own does, and nothing beside it."""
    kind = type(module)
    if kind.forward not in _FORWARDS or isinstance(module, _ConvTransposeNd):
        return False
    return not isinstance(module, _ConvNd) or getattr(kind, "_conv_forward", None) in _CONVOLUTIONS


def _computes(layer: MatrixLayer, x: Tensor, output: object) -> bool:
    """Whether an output is weight times input plus bias, by some of it."""
    try:
        assert isinstance(output, Tensor)
        samples, expected = layer.samples(x), layer.output_samples(output)
        count = _CHECKED_SAMPLES if isinstance(layer.layer, nn.Linear) else 1
        pieces = layer.patches(samples[:count].double(), expected[:count].double())
        if len(samples) != len(expected):
            return False
        weight = layer.weight_matrix().double().view(layer.groups, -1, layer.cols)
        bias = 0.0 if layer.bias is None else layer.bias.double().view(layer.groups, -1, 1)
        half = min(output.dtype.itemsize, layer.weight.dtype.itemsize) < 4
        for patches, y in pieces:
            assert y is not None
            error = weight @ patches + bias - y
            if error.norm() > (HALF_TOLERANCE if half else TOLERANCE) * y.norm():
                return False
    except (AssertionError, ValueError):  # of another shape
        return False
    return True
