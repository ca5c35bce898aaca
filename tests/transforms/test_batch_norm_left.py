"""Batch norms that cannot be folded are left alone, with the reason; failures are taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from adaround_ext.tracing.evaluation import evaluation
from adaround_ext.tracing.trace import trace
from adaround_ext.transforms import batch_norm
from adaround_ext.transforms.batch_norm import fold_batch_norm_
from adaround_ext.transforms.verified import Journal
from tests.support.models import Net
from tests.transforms.test_batch_norm import assert_unchanged, fold, randomize, residual, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")


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

    def wrong(journal: Journal, model: nn.Module, candidate: Any) -> None:
        right(journal, model, candidate)
        if candidate.layer is layer:
            journal.write_(layer.weight, layer.weight * 1.01)

    model, x, pairs = residual()
    before, layer = snapshot(randomize(model)), model.conv2
    expected = model(x)
    monkeypatch.setattr(batch_norm, "_fold", wrong)
    folded = fold(model, x)
    assert set(folded.pairs) == pairs - {("conv2", "norm2")}
    assert "output 0 of the model moves by" in folded.skipped["norm2"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
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
    expected = randomize(model)(x)
    folded = fold(model, x)
    assert folded.pairs == (("0", "1"), ("6", "7"))
    assert "moves by" in folded.skipped["4"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


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
