"""Folded batch norms: the same function, the right pairs, everything back afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from adaround_ext import batch_norm
from adaround_ext.batch_norm import Folded, fold_batch_norm_
from adaround_ext.function_preserving import Journal
from adaround_ext.trace import evaluation, trace
from tests.models import Net

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
    wanted = model(x)
    folded = fold(model, x)
    assert set(folded.pairs) == pairs and folded.skipped == {}
    assert len(folded.pairs) == len(pairs)
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    for layer, norm in pairs:
        assert type(model.get_submodule(norm)) is nn.Identity
        assert model.get_parameter(f"{layer}.weight") is parameters[f"{layer}.weight"]
        bias = parameters.get(f"{layer}.bias")
        assert bias is None or model.get_parameter(f"{layer}.bias") is bias
    assert not any(module.training for module in model.modules())
    folded.undo()
    assert_unchanged(model, before)
    assert torch.equal(model(x), wanted)
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
    wanted = model(x).double()
    folded = fold(model, x)
    assert set(folded.pairs) == pairs
    assert all(p.dtype == dtype for p in model.parameters())
    limit = 1e-12 if dtype == torch.float64 else 1e-2
    assert (model(x).double() - wanted).norm() < limit * wanted.norm()


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


def pair(**more: nn.Module) -> dict[str, nn.Module]:
    return {"layer": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4), **more}


def tied() -> nn.Module:
    net = Net(lambda m, x: m.other(m.norm(m.layer(x))), **pair(other=nn.Linear(4, 4)))
    net.other.weight = net.layer.weight
    return net


def same_memory() -> nn.Module:
    net = Net(lambda m, x: m.norm(m.layer(x)), **pair())
    net.register_buffer("window", net.layer.weight.detach()[1:, :2])
    return net


def parametrized() -> nn.Module:
    net = Net(lambda m, x: m.norm(m.layer(x)), **pair())
    parametrize.register_parametrization(net.layer, "weight", nn.Tanh())
    return net


def computed_bias() -> nn.Module:
    net = Net(lambda m, x: m.norm(m.layer(x)), **pair())
    parametrize.register_parametrization(net.layer, "bias", nn.Tanh())
    return net


def hooked() -> nn.Module:
    net = Net(lambda m, x: m.norm(m.layer(x)), **pair())
    net.norm.register_forward_hook(lambda module, args, output: None)
    return net


class Activated(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu_()


def early(m: Any, x: Tensor) -> Tensor:
    y = m.layer(x)
    z = y * 2  # before the batch norm begins
    return m.norm(y) + z


def late(m: Any, x: Tensor) -> Tensor:
    y = m.layer(x)
    return m.norm(y) + y[:, :1]


def returned(m: Any, x: Tensor) -> Any:
    y = m.layer(x)
    return {"out": m.norm(y), "features": [y]}


def overwritten(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.layer(x).add_(1))


def three(m: Any, x: Tensor) -> Tensor:
    """A Linear of [N, C, L] has its channels last, BatchNorm1d in the middle."""
    return m.norm(m.layer(x.expand(4, *x.shape)[:, :4]))


def branch(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.layer(x)) if m.training else m.layer(x)


LEFT = [
    (lambda: Net(late, **pair()), "something else reads the output of layer"),
    (lambda: Net(early, **pair()), "something else reads the output of layer"),
    (lambda: Net(returned, **pair()), "the model returns the output of layer"),
    (lambda: Net(overwritten, **pair()), "its input is not the output of"),
    (lambda: Net(three, **pair()), "it does not normalise the channels of layer"),
    (lambda: Net(branch, **pair()), "it did not run"),
    (lambda: Net(lambda m, x: m.norm(x), **pair()), "its input is not the output of"),
    (lambda: Net(lambda m, x: m.norm(m.layer(x).relu()), **pair()), "its input is not the output"),
    (lambda: Net(lambda m, x: m.norm(m.norm(m.layer(x))), **pair()), "layer are not in pairs"),
    (lambda: Net(lambda m, x: m.norm(m.layer(x)) + m.layer(-x), **pair()), "are not in pairs"),
    (
        lambda: Net(lambda m, x: m.norm(m.layer(x)) + m.layer.weight.sum(), **pair()),
        "layer has a weight or bias that is also read outside of it",
    ),
    (
        lambda: Net(
            lambda m, x: m.norm(m.layer(x)),
            layer=nn.Linear(4, 4),
            norm=nn.BatchNorm1d(4, track_running_stats=False),
        ),
        "it has no running statistics",
    ),
    (
        lambda: Net(lambda m, x: m.norm(m.layer(x)), layer=nn.Linear(4, 4), norm=Activated(4)),
        "it does more than normalise",
    ),
    (tied, "layer shares its weight with other.weight"),
    (same_memory, "layer shares its weight with window"),
    (parametrized, "layer: layer must own its weight"),
    (computed_bias, "layer has a bias that is no parameter of its own"),
    (hooked, "it has hooks"),
]


@pytest.mark.parametrize(("build", "reason"), LEFT)
def test_left_alone(build: Callable[[], nn.Module], reason: str) -> None:
    model, x = randomize(build()), torch.randn(6, 4)
    before = snapshot(model)
    folded = fold(model, x)
    assert folded.pairs == ()
    assert list(folded.skipped) == ["norm"]
    assert reason in folded.skipped["norm"]
    assert_unchanged(model, before)


def test_two_batch_norms_of_one_layer() -> None:
    model = Net(
        lambda m, x: m.norm(m.layer(x)) + m.other(m.layer(x)), **pair(other=nn.BatchNorm1d(4))
    )
    folded = fold(randomize(model), torch.randn(6, 4))
    assert folded.pairs == ()
    assert set(folded.skipped) == {"norm", "other"}
    model.run = lambda m, x: [norm(y) for y in [m.layer(x)] for norm in (m.norm, m.other)]
    folded = fold(model, torch.randn(6, 4))
    assert folded.pairs == ()
    assert all("something else reads" in reason for reason in folded.skipped.values())


def test_unbatched_convolution_has_its_channels_first() -> None:
    """What is [channels, size] to one is [samples, channels] to the other."""
    model = randomize(nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4)))
    folded = fold(model, torch.randn(2, 4))
    assert "does not normalise the channels of 0" in folded.skipped["1"]


def test_functional_batch_norm_is_left_alone() -> None:
    model = Net(
        lambda m, x: F.batch_norm(m.layer(x), m.norm.running_mean, m.norm.running_var), **pair()
    )
    before = snapshot(randomize(model))
    assert fold(model, torch.randn(6, 4)).skipped == {"norm": "it did not run"}
    assert_unchanged(model, before)


def test_no_batch_norm_needs_no_run() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with evaluation(model):
        watched = trace(model, lambda: model(x))
        folded = fold_batch_norm_(model, watched, lambda: pytest.fail("it ran"))
    assert folded.pairs == () and folded.skipped == {}


def test_a_wrong_fold_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    right = batch_norm._fold

    def wrong(journal: Journal, model: nn.Module, found: Any) -> None:
        right(journal, model, found)
        if found.layer is layer:
            journal.write_(layer.weight, layer.weight * 1.01)

    model, x, pairs = residual()
    before, layer = snapshot(randomize(model)), model.conv2
    wanted = model(x)
    monkeypatch.setattr(batch_norm, "_fold", wrong)
    folded = fold(model, x)
    assert set(folded.pairs) == pairs - {("conv2", "norm2")}
    assert "output 0 of the model moves by" in folded.skipped["norm2"]
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
    folded.undo()
    assert_unchanged(model, before)


class Standardized(nn.Conv2d):
    """A scale of its weight has no effect."""

    def forward(self, x: Tensor) -> Tensor:
        mean, std = self.weight.mean((1, 2, 3), True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / std, self.bias)


def test_one_strange_layer_does_not_stop_the_others() -> None:
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(Standardized(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 2, 3), nn.BatchNorm2d(2)),
    )
    x = torch.randn(2, 3, 8, 8)
    wanted = randomize(model)(x)
    folded = fold(model, x)
    assert folded.pairs == (("0", "1"), ("6", "7"))
    assert "moves by" in folded.skipped["4"]
    torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


def test_overflow_is_taken_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).half().eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2) * 6e4)
        model[0].bias.zero_()
        model[1].weight.fill_(4)
    before = snapshot(model)
    folded = fold(model, torch.full((3, 2), 0.1).half())
    assert "infinities or NaN" in folded.skipped["1"]
    assert_unchanged(model, before)


def test_masked_outputs_may_be_infinite() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.norm(net.layer(x))
        y[:, 0], y[:, 1] = -torch.inf, torch.nan
        return y

    model = Net(forward, **pair())
    assert fold(randomize(model), torch.randn(5, 4)).pairs == (("layer", "norm"),)


def test_random_models_are_compared_from_the_same_state() -> None:
    model = Net(lambda m, x: m.norm(m.layer(x + torch.randn_like(x))), **pair())
    assert fold(randomize(model), torch.randn(5, 4)).pairs == (("layer", "norm"),)


def test_a_model_that_does_not_repeat_itself() -> None:
    runs: list[int] = []
    model, x = randomize(Net(lambda m, x: m.norm(m.layer(x)), **pair())), torch.randn(5, 4)
    before = snapshot(model)

    def run() -> Tensor:
        runs.append(1)
        return model(x) + len(runs)

    assert "changes from run to run" in fold(model, x, run).skipped["norm"]
    assert_unchanged(model, before)


def test_a_run_without_output_verifies_nothing() -> None:
    model, x = randomize(Net(lambda m, x: m.norm(m.layer(x)), **pair())), torch.randn(5, 4)
    before = snapshot(model)

    def run() -> None:
        model(x)

    assert "no tensor to compare" in fold(model, x, run).skipped["norm"]
    assert_unchanged(model, before)


def test_a_model_that_needs_its_batch_norm() -> None:
    model = Net(lambda m, x: m.norm(m.layer(x)) * m.norm.eps, **pair())
    before = snapshot(randomize(model))
    folded = fold(model, torch.randn(5, 4))
    assert "fails with it: AttributeError" in folded.skipped["norm"]
    assert_unchanged(model, before)


def test_an_interrupt_leaves_nothing_changed() -> None:
    model, x, _ = residual()
    before = snapshot(randomize(model))
    runs: list[int] = []

    def run() -> Tensor:
        runs.append(1)
        if len(runs) == 3:  # traced, before, after
            assert type(model.norm0) is nn.Identity
            raise KeyboardInterrupt
        return model(x)

    with pytest.raises(KeyboardInterrupt):
        fold(model, x, run)
    assert_unchanged(model, before)
