"""What the bias takes up: the mean error of the outputs, from the raw data by definition."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import LayerResult, optimize_layer
from tests.support.problems import (
    LAYERS,
    make_layer,
    output_errors,
    refitted_bias,
    result_losses,
    row_losses,
)

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]
asymmetric = pytest.mark.parametrize("targets", [False, True], ids=["symmetric", "asymmetric"])
FAST: dict[str, Any] = {"preset": "fast", "bits": 3}


def make(
    name: str, device: torch.device, targets: bool, bias: bool = True
) -> tuple[nn.Module, Tensor, Tensor | None]:
    """A layer, lossy inputs, and what it should give for them."""
    layer, x = make_layer(name, device)
    if not bias:
        layer.bias = None
    elif layer.bias is None:
        layer.bias = nn.Parameter(torch.randn(layer.weight.shape[0], device=device))
    return layer, x, (layer(x) * 1.1 + 0.3).detach() if targets else None


def assert_takes_up_the_mean(
    layer: nn.Module, result: LayerResult, x: Tensor, targets: Tensor | None
) -> None:
    assert result.bias is not None
    errors = output_errors(layer, result.weight_q, x, targets, bias=result.bias)
    size = float(errors.square().mean().sqrt())
    assert float(errors.mean(1).abs().max()) < 1e-3 * size + 1e-6
    wanted = refitted_bias(layer, result.weight_q, x, targets)
    torch.testing.assert_close(result.bias, wanted, rtol=1e-4, atol=1e-4 * size + 1e-6)
    losses = row_losses(layer, result.weight_q, x, targets, bias=result.bias)
    assert result.report.losses["final"] == pytest.approx(float(losses.sum()), rel=1e-3)


@pytest.mark.parametrize("name", LAYERS)
@asymmetric
def test_refit(device: torch.device, name: str, targets: bool) -> None:
    layer, x, y = make(name, device, targets)
    result = optimize_layer(layer, x, y, **FAST)
    assert_takes_up_the_mean(layer, result, x, y)
    assert not torch.equal(result.bias, layer.bias)
    kept = optimize_layer(layer, x, y, bias="keep", **FAST)
    assert kept.bias is None
    losses = result_losses(layer, kept, x, y)
    assert kept.report.losses["final"] == pytest.approx(float(losses.sum()), rel=1e-3)
    # The energy is of the full-precision outputs without bias: the same for both.
    assert result.report.energy == pytest.approx(kept.report.energy, rel=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_it_pays_where_inputs_have_an_offset(device: torch.device, name: str) -> None:
    layer, x, _ = make(name, device, False)
    x = x + 10 * x.std()
    refit, kept = (optimize_layer(layer, x, bias=bias, **FAST) for bias in ("refit", "keep"))
    assert refit.report.losses["final"] < 0.95 * kept.report.losses["final"]


@pytest.mark.parametrize("name", LAYERS)
@asymmetric
def test_create(device: torch.device, name: str, targets: bool) -> None:
    layer, x, y = make(name, device, targets, bias=False)
    assert optimize_layer(layer, x, y, **FAST).bias is None
    result = optimize_layer(layer, x, y, bias="create", **FAST)
    assert_takes_up_the_mean(layer, result, x, y)
    before = layer(x).detach()
    result.apply_(layer)
    assert torch.equal(layer.bias, result.bias)
    assert layer.bias is not result.bias
    assert layer.bias.requires_grad == layer.weight.requires_grad
    assert layer(x).shape == before.shape


def test_create_refits_a_bias_that_exists(device: torch.device) -> None:
    layer, x, _ = make("linear", device, False)
    refit, create = (optimize_layer(layer, x, bias=bias, **FAST) for bias in ("refit", "create"))
    assert torch.equal(refit.codes, create.codes)
    assert torch.equal(refit.bias, create.bias)


@asymmetric
def test_the_starting_bias_does_not_matter_to_the_codes(
    device: torch.device, targets: bool
) -> None:
    """A bias of any size is only moved."""
    layer, x, _ = make("linear", device, False)
    y = (layer(x) * 1.1 + 0.3).detach() if targets else None
    before = optimize_layer(layer, x, y, **FAST)
    with torch.no_grad():
        layer.bias += 2.0
    after = optimize_layer(layer, x, None if y is None else y + 2.0, **FAST)
    if not targets:  # e = target - (w x + b) comes out a little different
        assert torch.equal(before.codes, after.codes)
    torch.testing.assert_close(after.bias, before.bias + 2.0, rtol=1e-3, atol=1e-3)


@asymmetric
def test_apply_writes_it(device: torch.device, targets: bool) -> None:
    layer, x, y = make("conv", device, targets)
    wanted = layer(x).detach() if y is None else y
    result = optimize_layer(layer, x, y, **FAST)
    changed = copy.deepcopy(layer)
    result.apply_(changed)
    assert torch.equal(changed.bias, result.bias)
    assert changed.bias.requires_grad
    loss = (changed(x).detach() - wanted).double().square().transpose(0, 1).flatten(1).mean(1).sum()
    assert result.report.losses["final"] == pytest.approx(float(loss), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_bias_in_the_layers_dtype(device: torch.device, name: str, dtype: torch.dtype) -> None:
    """What storing it costs is part of the losses: a bias of 100 in bfloat16 is coarse."""
    layer, x, _ = make(name, device, False)
    with torch.no_grad():
        layer.bias += 100.0
    layer, x = layer.to(dtype), x.to(dtype)
    result = optimize_layer(layer, x, **FAST)
    assert result.bias.dtype == dtype
    losses = result_losses(layer, result, x)
    assert result.report.losses["final"] == pytest.approx(float(losses.sum()), rel=2e-3)
    wanted = refitted_bias(layer, result.weight_q, x)
    step = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(result.bias, wanted, rtol=0, atol=max(step, 1e-4))


@asymmetric
@pytest.mark.parametrize("grouped", [False, True])
def test_layers_with_and_without_a_bias_together(
    device: torch.device, targets: bool, grouped: bool
) -> None:
    """Each as if it were alone, in the order they were given in."""
    layers: list[nn.Module] = [
        nn.Conv1d(4, rows, 3, padding=1, groups=2 if grouped else 1, bias=bias).to(device)
        for rows, bias in ((4, True), (6, False), (8, True), (2, False))
    ]
    x = torch.randn(60, 4, 9).to(device) + 1
    x[32:] += torch.arange(4.0, device=device)[:, None]  # not the first batch's mean
    wanted = tuple((layer(x) * 1.2 + 0.1).detach() for layer in layers)
    results = optimize_layer(layers, x, wanted if targets else None, **FAST)
    for layer, y, result in zip(layers, wanted, results, strict=True):
        y = y if targets else None
        alone = optimize_layer(layer, x, y, **FAST)
        assert (result.bias is None) == (layer.bias is None)
        assert torch.equal(result.codes, alone.codes)
        if layer.bias is not None:
            assert_takes_up_the_mean(layer, result, x, y)
        losses = result_losses(layer, result, x, y)
        assert result.report.losses["final"] == pytest.approx(float(losses.sum()), rel=1e-3)


def test_sampled_objective_leaves_biases_alone(device: torch.device) -> None:
    layer, x, _ = make("linear", device, False)
    without = copy.deepcopy(layer)
    without.bias = None
    said = ("the bias stays as it is: only the Gram form refits it",)
    for settings in ({"objective": "sampled"}, {"activation": "relu"}):
        refit = optimize_layer(layer, x, steps=3, **settings)
        assert (refit.bias, refit.report.notes) == (None, said)
        for one, bias in ((layer, "keep"), (without, "refit")):
            result = optimize_layer(one, x, steps=3, bias=bias, **settings)
            assert (result.bias, result.report.notes) == (None, ())
