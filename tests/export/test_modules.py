"""Layers with packed codes: what they give, what they weigh, and how they behave as modules."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, pack_
from adaround_ext.activations.hooks import quantizers
from adaround_ext.export import QuantConv, QuantLinear
from tests.support.export_models import convolutional, quantized, tied

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = [
    pytest.param({"bits": 4}, id="4"),
    pytest.param({"bits": 3, "granularity": "per_tensor", "symmetric": False}, id="3-tensor"),
    pytest.param({"bits": 8, "granularity": "per_group", "group_size": 4}, id="8-groups"),
]


def packed(model: nn.Module) -> nn.Module:
    """A copy with packed codes."""
    copied = copy.deepcopy(model)
    pack_(copied)
    return copied


def assert_near(got: Any, want: Any) -> None:
    for left, right in zip(*map(torch.utils._pytree.tree_leaves, (got, want)), strict=True):
        assert float((left - right).detach().norm()) <= 1e-5 * float(right.detach().norm())


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("make", [convolutional, tied])
def test_outputs_and_weights(make: Any, settings: dict[str, Any], device: torch.device) -> None:
    model, x = make()
    model, x = model.to(device), x.to(device)
    quantized(model, x, **settings)
    compact = packed(model)
    assert_near(compact(x), model(x))
    for name, module in model.named_modules():
        if hasattr(module, "quantized_weight"):
            layer = compact.get_submodule(name)
            kind = QuantLinear if isinstance(module, nn.Linear) else QuantConv
            assert isinstance(layer, kind)
            assert torch.equal(layer.weight, module.weight)
            assert f"bits={settings['bits']}" in repr(layer)
    assert not any(hasattr(module, "quantized_weight") for module in compact.modules())


def size(module: nn.Module) -> int:
    state = io.BytesIO()
    torch.save(module, state)
    return len(state.getvalue())


@pytest.mark.parametrize("bits", [2, 4])
def test_holds_codes_only(bits: int) -> None:
    for layer, x in (
        (nn.Linear(512, 256), torch.randn(64, 512)),
        (nn.Conv2d(64, 64, 3), torch.randn(2, 64, 8, 8)),
    ):
        model = quantized(nn.Sequential(layer), x, bits=bits)
        compact = packed(model)
        assert size(compact) < model[0].weight.numel() * bits / 8 + 8192


def test_moves_copies_and_pickles() -> None:
    model, x = convolutional()
    quantized(model, x)
    compact = packed(model)
    state = io.BytesIO()
    torch.save(compact, state)
    state.seek(0)
    for other in (copy.deepcopy(compact), torch.load(state, weights_only=False)):
        assert torch.equal(other(x), compact(x))
    fresh = packed(quantized(*convolutional(), seed=1, preset="balanced", steps=2))
    fresh.load_state_dict(compact.state_dict())
    assert torch.equal(fresh(x), compact(x))

    half = copy.deepcopy(compact).to(torch.bfloat16)
    assert torch.equal(half[0].scale, compact[0].scale)  # scales are not rounded
    assert half[0].weight.dtype == torch.bfloat16
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_activation_quantizers_move_along() -> None:
    model, x = convolutional()
    quantized(model, x, activations=ActivationConfig(bits=4))
    compact = packed(model)
    assert list(quantizers(compact)) == list(quantizers(model))
    assert_near(compact(x), model(x))
    for quantizer in quantizers(compact).values():
        quantizer.enabled = False
    assert float((compact(x) - model(x)).norm()) > 1e-3 * float(model(x).norm())


def test_tied_weights_keep_their_biases() -> None:
    model, x = tied()
    quantized(model, x)
    compact = packed(model)
    assert compact.first is not compact.second
    assert torch.equal(compact.first.bias, model.first.bias)
    assert torch.equal(compact.second.bias, model.second.bias)
    assert compact.last.bias is None


def test_reused_modules_stay_one() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    x = torch.randn(64, 6)
    quantized(model, x)
    compact = packed(model)
    assert compact[0] is compact[2]
    assert_near(compact(x), model(x))


LAYERS = [
    (nn.Linear(8, 6, bias=False), (4, 8)),
    (nn.Conv1d(8, 16, 3, padding=1, stride=2), (2, 8, 9)),
    (nn.Conv2d(4, 8, (3, 2), padding="same", dilation=2, groups=2, padding_mode="circular"),
     (2, 4, 9, 9)),
    (nn.Conv3d(2, 4, 2, padding=(1, 0, 1), bias=False), (2, 2, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), (2, 4, 7)),
    (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (2, 4, 5, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_what_a_layer_says_of_itself(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """All of it: a model may compute with the stride of its convolution, or read its own marks."""
    layer = copy.deepcopy(layer)
    layer.mark = "of the model"
    model = quantized(nn.Sequential(layer), torch.randn(shape))
    compact = packed(model)[0]
    public = [name for name in vars(layer) if not name.startswith("_")]
    assert len(public) > 3
    for name in (*public, *type(layer).__constants__):
        if name != "quantized_weight":
            assert getattr(compact, name) == getattr(layer, name), name
    assert torch.equal(compact.weight, layer.weight)
    assert not hasattr(compact, "quantized_weight")


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_float64(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(copy.deepcopy(layer)).double()
    x = torch.randn(shape, dtype=torch.float64)
    quantized(model, x, bias="refit" if layer.bias is not None else "keep")
    compact = packed(model)
    assert compact[0].weight.dtype == torch.float64
    assert torch.equal(compact[0].weight, model[0].weight)
    assert torch.allclose(compact(x), model(x), rtol=1e-12, atol=1e-12)
    assert compact.float()(x.float()).dtype == torch.float32
    assert compact.double()(x).dtype == torch.float64


def test_compiles() -> None:
    model = quantized(nn.Sequential(nn.Linear(32, 16), nn.ReLU()), torch.randn(64, 32))
    compact = packed(model)
    x = torch.randn(3, 32)
    program = torch.export.export(compact, (x,))
    assert_near(program.module()(x), model(x))


def test_refusals() -> None:
    class Loud(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = nn.Sequential(Loud(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match="model must hold layers that quantize_ has quantized"):
        pack_(model)
    quantized(model, torch.randn(32, 4))
    before = list(model)
    with pytest.raises(ValueError, match=r"packing cannot hold this model: 0: .*, got .*Loud"):
        pack_(model)
    assert list(model) == before
    alone = quantized(nn.Linear(4, 2), torch.randn(32, 4))
    with pytest.raises(ValueError, match="got one that is a layer itself"):
        pack_(alone)
    model = quantized(nn.Sequential(nn.Linear(4, 2)), torch.randn(32, 4))
    own = model[0].forward
    model[0].forward = lambda x: 2 * own(x)
    with pytest.raises(ValueError, match="must have the forward of its class"):
        pack_(model)
    del model[0].forward
    for width in (3, 5):
        with pytest.raises(ValueError, match=f"input must have 4 features .*, got .* {width}"):
            packed(model)(torch.randn(2, width))
