"""How ONNX files store weights: every form gives the weight bit by bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adaround_ext.export.onnx.weights import StoredWeight, stored_weight
from adaround_ext.export.quantized_layers import quantized_layers
from tests.support.onnx_exports import rounded

pytestmark = pytest.mark.usefixtures("one_thread")


def dequantized(stored: StoredWeight) -> Tensor:
    """DequantizeLinear, and Reshape, as ONNX defines them."""

    def spread(values: Tensor) -> Tensor:
        if stored.axis is None:
            return values
        if stored.block_size is None:
            shape = [-1 if i == stored.axis else 1 for i in range(stored.codes.dim())]
            return values.reshape(shape)
        wide = values.repeat_interleave(stored.block_size, stored.axis)
        return wide.narrow(stored.axis, 0, stored.codes.shape[stored.axis])

    codes = stored.codes.float()
    if stored.zero_point is not None:
        codes = codes - spread(stored.zero_point.float())
    weight = codes * spread(stored.scale)
    return weight if stored.reshape is None else weight.reshape(stored.reshape)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def layers(draw: st.DrawFn) -> nn.Module:
    """Rounded layers of every class, with groups of every size."""
    groups = draw(st.sampled_from([1, 2]))
    inputs, outputs = (groups * draw(st.integers(1, 3)) for _ in range(2))
    kernel = tuple(draw(st.integers(1, 4)) for _ in range(draw(st.integers(1, 3))))
    kind = draw(st.sampled_from(["Linear", "Conv", "ConvTranspose"]))
    if kind == "Linear":
        layer: nn.Module = nn.Linear(draw(st.sampled_from([1, 6, 32, 48])), outputs)
        cols = layer.weight.shape[1]
    else:
        layer = getattr(nn, f"{kind}{len(kernel)}d")(inputs, outputs, kernel, groups=groups)
        cols = layer.weight.numel() // outputs
    options: dict[str, Any] = {"bits": draw(st.sampled_from([2, 3, 4, 7, 8]))}
    options["symmetric"] = draw(st.booleans())
    options["granularity"] = draw(st.sampled_from(["per_tensor", "per_channel", "per_group"]))
    if options["granularity"] == "per_group":
        options["group_size"] = draw(st.sampled_from(divisors(cols)))
    return rounded(layer, **options)


@settings(max_examples=200, deadline=None)
@given(layers(), st.booleans())
def test_forms(module: nn.Module, centred: bool) -> None:
    """Or there is none: for groups of one, and runs across the kernel of a transposed layer."""
    [layer] = quantized_layers(module)
    centred = centred and layer.bits not in (4, 8)
    linear = isinstance(module, nn.Linear)
    choices: list[dict[str, Any]] = [{}]
    if linear:
        choices += [{"transpose": True}, {"transpose": True, "blocks": (2, 4, 8, 16, 32)}]
        choices += [{"blocks": (16, 32)}, {"transpose": True, "channel_blocks": 16}]
    for options in choices:
        try:
            stored = stored_weight(layer, centred=centred, **options)
        except ValueError:
            reordered = isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d))
            reordered = reordered or isinstance(module, nn.ConvTranspose3d)
            assert reordered or layer.group_size == 1
            continue
        weight = dequantized(stored)
        assert torch.equal(weight.t() if options.get("transpose") else weight, module.weight)
        limit = 8 if stored.storage.endswith("4") else 128
        low, high = (-limit, limit) if stored.storage.startswith("int") else (0, 2 * limit)
        assert low <= int(stored.codes.min()) <= int(stored.codes.max()) < high
        assert (stored.zero_point is None) == (layer.symmetric or centred)
        if not options and (linear or "Transpose" not in type(module).__name__):
            assert stored.scale.numel() == layer.weight.scale.numel()
