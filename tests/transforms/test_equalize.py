"""Equalized layers: the same function, even ranges, everything back afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext.layers.matrix import matrix_layer
from adaround_ext.tracing.evaluation import evaluation
from adaround_ext.tracing.trace import trace
from adaround_ext.transforms import equalize
from adaround_ext.transforms.batch_norm import fold_batch_norm_
from adaround_ext.transforms.equalize import Equalized, equalize_
from tests.support.models import Net

pytestmark = pytest.mark.usefixtures("one_thread")


def unbalance(model: nn.Module) -> nn.Module:
    """Output channels whose ranges are up to a thousand times apart."""
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "kernel_size") or isinstance(module, nn.Linear):
                view = matrix_layer(module)
                factor = 10 ** torch.linspace(-1.5, 1.5, view.rows)[torch.randperm(view.rows)]
                matrix = view.weight_matrix() * factor[:, None].to(view.weight.dtype)
                module.weight.copy_(view.weight_from_matrix(matrix))
                if module.bias is not None:
                    module.bias.mul_(factor)
    return model.eval()


def even(model: nn.Module, x: Tensor, run: Any = None, **settings: Any) -> Equalized:
    run = run or (lambda: model(x))
    with evaluation(model):
        return equalize_(model, trace(model, run), run, **settings)


def snapshot(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (p, p.detach().clone()) for name, p in model.named_parameters()}


def assert_unchanged(model: nn.Module, before: dict[str, tuple[Tensor, Tensor]]) -> None:
    now = dict(model.named_parameters())
    assert list(now) == list(before)
    for name, (parameter, values) in before.items():
        assert now[name] is parameter
        assert torch.equal(parameter, values)


def output_ranges(layer: nn.Module) -> Tensor:
    return matrix_layer(layer).weight_matrix().abs().amax(1)


def input_ranges(layer: nn.Module) -> Tensor:
    """By feeding one input channel at a time, which knows nothing of how weights are laid out."""
    if isinstance(layer, nn.Linear):
        return layer.weight.detach().abs().amax(0)
    ranges = []
    for channel in range(layer.in_channels):
        x = torch.zeros(1, layer.in_channels, *(9,) * len(layer.kernel_size))
        x[(0, channel, *(4,) * len(layer.kernel_size))] = 1
        bias = 0 if layer.bias is None else layer.bias.view(-1, *(1,) * len(layer.kernel_size))
        ranges.append((layer(x) - bias).detach().abs().max())
    return torch.stack(ranges)


def separable() -> tuple[nn.Module, Tensor, list[tuple[str, str]]]:
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True)),
        *(nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.ReLU()),
        *(nn.Conv2d(8, 6, 1, bias=False), nn.LeakyReLU(0.2)),
        nn.Conv2d(6, 4, 3, groups=2, padding=1, padding_mode="reflect"),
    )
    return model, torch.randn(2, 3, 8, 8), [("0", "2"), ("2", "4"), ("4", "6")]


def linear() -> tuple[nn.Module, Tensor, list[tuple[str, str]]]:
    model = nn.Sequential(
        nn.Linear(5, 7), nn.PReLU(), nn.Linear(7, 9), nn.Linear(9, 4), nn.Sigmoid()
    )
    return model, torch.randn(3, 6, 5), [("0", "2"), ("2", "3")]


def transposed() -> tuple[nn.Module, Tensor, list[tuple[str, str]]]:
    model = nn.Sequential(
        *(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.ReLU()),
        *(nn.ConvTranspose2d(6, 4, 3, groups=2, padding=1), nn.PReLU(4)),
        nn.ConvTranspose2d(4, 3, 2),
    )
    return model, torch.randn(2, 4, 5, 5), [("0", "2"), ("2", "4")]


def one_dimensional() -> tuple[nn.Module, Tensor, list[tuple[str, str]]]:
    model = nn.Sequential(nn.Conv1d(3, 4, 3, dilation=2), nn.ReLU(), nn.ConvTranspose1d(4, 5, 2))
    return model, torch.randn(3, 9), [("0", "2")]


def three_dimensional() -> tuple[nn.Module, Tensor, list[tuple[str, str]]]:
    model = nn.Sequential(nn.Conv3d(2, 4, 2), nn.ReLU(), nn.Conv3d(4, 4, 2, groups=2))
    return model, torch.randn(2, 2, 4, 4, 4), [("0", "2")]


def residual() -> tuple[nn.Module, Tensor, list[tuple[str, str]]]:
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.stem(x).relu()
        y = x + net.second(F.leaky_relu_(net.drop(net.first(x))))
        return net.head(y)

    model = Net(
        forward,
        head=nn.Conv2d(4, 2, 1),
        second=nn.Conv2d(5, 4, 3, padding=1),
        first=nn.Conv2d(4, 5, 3, padding=1),
        stem=nn.Conv2d(3, 4, 1),
        drop=nn.Dropout(),
    )
    return model, torch.randn(2, 3, 6, 6), [("first", "second")]


NETS = [separable, linear, transposed, one_dimensional, three_dimensional, residual]


@pytest.mark.parametrize("build", NETS)
def test_the_function_stays_and_undo_restores_it(build: Callable[[], Any]) -> None:
    model, x, pairs = build()
    unbalance(model)
    before, expected = snapshot(model), model(x).detach()
    result = even(model, x, iterations=200, tolerance=1e-6)
    assert list(result.pairs) == pairs
    error = (model(x) - expected).norm() / expected.norm()
    assert error < 1e-5
    for first, second in pairs:
        ranges1 = output_ranges(model.get_submodule(first))
        ranges2 = input_ranges(model.get_submodule(second))
        torch.testing.assert_close(ranges1, ranges2, rtol=1e-3, atol=0)
    for name, (parameter, values) in before.items():
        assert dict(model.named_parameters())[name] is parameter
        touched = any(name in (f"{a}.weight", f"{b}.weight", f"{a}.bias") for a, b in pairs)
        assert torch.equal(parameter, values) != touched
    result.undo()
    assert_unchanged(model, before)
    assert torch.equal(model(x), expected)


def test_the_formula() -> None:
    """One step of one pair is equations (9) to (11), from the weights themselves."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    unbalance(model)
    first, _, second = model
    w1, b1, w2 = (t.detach().double() for t in (first.weight, first.bias, second.weight))
    b2 = second.bias.detach().clone()
    r1, r2 = w1.abs().amax(1), w2.abs().amax(0)
    s = (r1 * r2).sqrt() / r2
    even(model, torch.randn(5, 3), iterations=1)
    torch.testing.assert_close(first.weight, (w1 / s[:, None]).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(first.bias, (b1 / s).float(), rtol=2e-7, atol=0)
    torch.testing.assert_close(second.weight, (w2 * s).float(), rtol=2e-7, atol=0)
    assert torch.equal(second.bias, b2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("build", [linear, separable, transposed])
def test_half_types_lose_nothing(build: Callable[[], Any], dtype: torch.dtype) -> None:
    """Powers of two, so that ranges come within a factor of 2."""
    model, x, pairs = build()
    if build is separable:
        model[6] = nn.Conv2d(6, 4, 3, groups=2)  # reflection padding has no half types
    model, x = unbalance(model).to(dtype), x.to(dtype)
    before = snapshot(model)
    expected = model(x).double()
    result = even(model, x, iterations=100)
    assert list(result.pairs) == pairs
    assert (model(x).double() - expected).norm() < 2e-3 * expected.norm()
    for name, (parameter, values) in before.items():
        ratio = (parameter.double() / values.double())[values.abs() > 1e-3]
        assert torch.equal(ratio, ratio.log2().round().exp2()), name
    for first, second in pairs:
        ranges1 = output_ranges(model.get_submodule(first)).float()
        ranges2 = input_ranges(model.get_submodule(second).float())
        assert (ranges1 / ranges2).log2().abs().max() < 2.01


def test_dead_channels_keep_their_scale() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight[0] = 0
        model[2].weight[:, 1] = 0
        model[0].weight[2] = 1e-30
        model[0].weight[4] *= 100
    before = snapshot(model)
    assert even(model, torch.randn(4, 3)).pairs == (("0", "2"),)
    old = before["0.weight"][1]
    assert torch.equal(model[0].weight[:2], old[:2])
    assert torch.equal(model[0].bias[:2], before["0.bias"][1][:2])
    torch.testing.assert_close(model[0].weight[2], old[2] * 2**12, rtol=1e-6, atol=0)
    assert model[0].weight[4].abs().max() < old[4].abs().max() / 2
    assert torch.equal(model[2].weight[:, :2], before["2.weight"][1][:, :2])


def test_iterations_stop_at_convergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """An even chain stays as it is, to the bit."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2], model[3]):
            layer.weight.copy_(torch.tensor([[1.0, -0.5], [0.25, 1.0]]))
    before = snapshot(model)
    steps: list[Any] = []
    right = equalize._by_input

    def counted(s: Tensor, blocks: Tensor) -> Tensor:
        steps.append(s)
        return right(s, blocks)

    monkeypatch.setattr(equalize, "_by_input", counted)
    x = torch.randn(3, 2)
    assert len(even(model, x).pairs) == 2
    assert len(steps) == 2 + 2  # one round, and the result
    assert_unchanged(model, before)
    model, x, _ = separable()
    unbalance(model)
    steps.clear()
    even(model, x, tolerance=0, iterations=3)
    assert len(steps) == 3 * 3 + 3


def nearest(model: nn.Module) -> None:
    """8 bits, one symmetric scale a tensor, rounded to nearest."""
    with torch.no_grad():
        for p in (p for name, p in model.named_parameters() if name.endswith("weight")):
            scale = p.abs().max() / 127
            p.copy_((p / scale).round().clamp(-128, 127) * scale)


def test_it_pays_for_a_depthwise_net() -> None:
    """Channels of very different ranges, as batch norms leave behind when folded."""

    def make() -> nn.Module:
        torch.manual_seed(1)
        return unbalance(
            nn.Sequential(
                *(nn.Conv2d(3, 16, 3), nn.ReLU()),
                *(nn.Conv2d(16, 16, 3, groups=16), nn.ReLU()),
                nn.Conv2d(16, 8, 1),
            )
        )

    x = torch.randn(8, 3, 8, 8)
    plain, better = make(), make()
    expected = plain(x).detach()
    assert len(even(better, x).pairs) == 2
    nearest(plain)
    nearest(better)
    errors = [(model(x) - expected).norm() / expected.norm() for model in (plain, better)]
    assert errors[1] < 0.5 * errors[0]


def test_after_folded_batch_norms() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)
    ).eval()
    model[1].running_var.copy_(torch.tensor([0.01, 1, 10, 100]))
    x = torch.randn(2, 3, 8, 8)
    expected, original = model(x), model[0].weight.detach().clone()

    def run() -> Tensor:
        return model(x)

    with evaluation(model):
        watched = trace(model, run)
        assert equalize_(model, watched, run).pairs == ()
        folded = fold_batch_norm_(model, watched, run)
        result = equalize_(model, trace(model, run), run)
    assert result.pairs == (("0", "3"),)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    result.undo()
    folded.undo()
    assert torch.equal(model[0].weight, original) and model[0].bias is None
    assert torch.equal(model(x), expected)
