"""Folded batch norms: the same function, the right pairs, everything back afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext.tracing.evaluation import evaluation
from adaround_ext.tracing.trace import trace
from adaround_ext.transforms.batch_norm import Folded, fold_batch_norm_
from tests.support.models import Net

pytestmark = pytest.mark.usefixtures("one_thread")


def randomize(model: nn.Module) -> nn.Module:
    """Batch norms that are far from the identity, as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.1, 4)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def fold(model: nn.Module, x: Tensor, run: Callable[[], object] | None = None) -> Folded:
    run = run or (lambda: model(x))
    with evaluation(model):
        return fold_batch_norm_(model, trace(model, run), run)


def snapshot(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Every module and parameter as an object, and every value."""
    objects: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    objects |= dict(model.named_parameters(remove_duplicate=False))
    for module in model.modules():
        objects |= {f"{id(module)}.{key}": value for key, value in module._parameters.items()}
    return objects, {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: tuple[dict[str, Any], dict[str, Tensor]]) -> None:
    objects, values = snapshot(model)
    assert list(objects) == list(before[0])
    assert all(objects[name] is before[0][name] for name in objects)
    assert list(values) == list(before[1])
    assert all(torch.equal(values[name], before[1][name]) for name in values)


def sequential() -> tuple[nn.Module, Tensor, set[tuple[str, str]]]:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU6()),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.BatchNorm1d(5),
    )
    return model, torch.randn(4, 3, 8, 8), {("0", "1"), ("3.0", "3.1"), ("5", "6")}


def residual() -> tuple[nn.Module, Tensor, set[tuple[str, str]]]:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = F.relu(net.norm1(net.conv1(x)), inplace=True)
        y = net.norm2(net.conv2(y))
        y += net.norm0(net.conv0(x))
        return net.head(F.relu(y).mean((2, 3)))

    model = Net(
        forward,
        norm1=nn.BatchNorm2d(6),  # the order of definition says nothing
        norm2=nn.BatchNorm2d(6),
        norm0=nn.BatchNorm2d(6),
        conv2=nn.Conv2d(6, 6, 3, padding=1, bias=False),
        conv0=nn.Conv2d(3, 6, 1, stride=2),
        conv1=nn.Conv2d(3, 6, 3, stride=2, padding=1),
        head=nn.Linear(6, 2),
    )
    pairs = {(f"conv{i}", f"norm{i}") for i in range(3)}
    return model, torch.randn(3, 3, 8, 8), pairs


def separable() -> tuple[nn.Module, Tensor, set[tuple[str, str]]]:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=4, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 1),
        nn.BatchNorm2d(8, affine=False),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, groups=2, padding=1, padding_mode="reflect"),
        nn.SyncBatchNorm(4, eps=0.1),
    )
    x = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    return model.to(memory_format=torch.channels_last), x, {("0", "1"), ("3", "4"), ("6", "7")}


def transposed() -> tuple[nn.Module, Tensor, set[tuple[str, str]]]:
    model = nn.Sequential(
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(),
        nn.ConvTranspose2d(6, 3, 2, bias=False),
        nn.BatchNorm2d(3),
    )
    return model, torch.randn(2, 4, 5, 5), {("0", "1"), ("3", "4")}


def one_dimensional() -> tuple[nn.Module, Tensor, set[tuple[str, str]]]:
    model = nn.Sequential(
        nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), nn.ConvTranspose1d(5, 4, 2), nn.BatchNorm1d(4)
    )
    return model, torch.randn(2, 3, 9), {("0", "1"), ("2", "3")}


def three_dimensional() -> tuple[nn.Module, Tensor, set[tuple[str, str]]]:
    model = nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.Tanh())
    return model, torch.randn(2, 2, 4, 4, 4), {("0", "1")}


def nothing_between() -> tuple[nn.Module, Tensor, set[tuple[str, str]]]:
    """Modules that hand on their input are no obstacle."""
    model = nn.Sequential(
        nn.Linear(3, 4), nn.Identity(), nn.Dropout(), nn.BatchNorm1d(4), nn.Sigmoid()
    )
    return model, torch.randn(6, 3), {("0", "3")}


def siamese() -> tuple[nn.Module, Tensor, set[tuple[str, str]]]:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.norm(net.conv(x)) - net.norm(input=net.conv(x.flip(0)))

    model = Net(forward, conv=nn.Conv1d(3, 4, 2), norm=nn.BatchNorm1d(4))
    return model, torch.randn(4, 3, 6), {("conv", "norm")}


NETS = [
    sequential,
    residual,
    separable,
    transposed,
    one_dimensional,
    three_dimensional,
    nothing_between,
    siamese,
]


@pytest.mark.parametrize("build", NETS)
def test_the_function_stays_and_undo_restores_it(build: Callable[[], Any]) -> None:
    model, x, pairs = build()
    randomize(model)
    before, parameters = snapshot(model), dict(model.named_parameters())
    expected = model(x)
    folded = fold(model, x)
    assert set(folded.pairs) == pairs and folded.skipped == {}
    assert len(folded.pairs) == len(pairs)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    for layer, norm in pairs:
        assert type(model.get_submodule(norm)) is nn.Identity
        assert model.get_parameter(f"{layer}.weight") is parameters[f"{layer}.weight"]
        bias = parameters.get(f"{layer}.bias")
        assert bias is None or model.get_parameter(f"{layer}.bias") is bias
    assert not any(module.training for module in model.modules())
    folded.undo()
    assert_unchanged(model, before)
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        next(model.parameters()).zero_()
    folded.undo()  # once is enough
    assert not next(model.parameters()).any()


def test_the_formula() -> None:
    """Of float32 weights, to the last bit that float64 decides."""
    model = randomize(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, eps=0.3)))
    layer, norm = model
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + 0.3)
    weight = layer.weight.double() * factor[:, None]
    bias = (layer.bias.double() - norm.running_mean.double()) * factor + norm.bias.double()
    fold(model, torch.randn(5, 3))
    torch.testing.assert_close(layer.weight, weight.float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(layer.bias, bias.float(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("build", [sequential, transposed, siamese])
def test_dtypes(build: Callable[[], Any], dtype: torch.dtype) -> None:
    model, x, pairs = build()
    model, x = randomize(model).to(dtype), x.to(dtype)
    expected = model(x).double()
    folded = fold(model, x)
    assert set(folded.pairs) == pairs
    assert all(p.dtype == dtype for p in model.parameters())
    limit = 1e-12 if dtype == torch.float64 else 1e-2
    assert (model(x).double() - expected).norm() < limit * expected.norm()


def test_frozen_parameters_stay_frozen() -> None:
    model = nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)
    )
    randomize(model)
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    folded = fold(model, torch.randn(4, 3))
    assert len(folded.pairs) == 2
    assert model[0].weight.requires_grad and not model[0].bias.requires_grad
    assert isinstance(model[2].bias, nn.Parameter) and not model[2].bias.requires_grad
    folded.undo()
    assert model[2].bias is None and "2.bias" not in model.state_dict()


def test_every_holder_gets_the_identity() -> None:
    norm = nn.BatchNorm1d(4)
    model = nn.Sequential(nn.Linear(3, 4), norm)
    model.again, model.deeper = norm, nn.ModuleDict({"too": norm})
    model.forward = lambda x: model[1](model[0](x))
    randomize(model)
    before = snapshot(model)
    folded = fold(model, torch.randn(5, 3))
    assert folded.pairs == (("0", "1"),)
    assert type(model[1]) is nn.Identity
    assert model.again is model[1] and model.deeper["too"] is model[1]
    folded.undo()
    assert_unchanged(model, before)
