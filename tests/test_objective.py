"""Both objectives against the explicit definition of the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from test_layers import CASES  # every layer type, stride, padding and group
from torch import Tensor, nn
from torch.func import functional_call

from adaround_ext.data import batches
from adaround_ext.layers import MatrixLayer, matrix_layer
from adaround_ext.objective import GramObjective, SampledObjective
from adaround_ext.statistics import GramStatistics

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
every_layer = pytest.mark.parametrize("name", CASES)
normalized = pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "raw"])
# Tokens, two samples of a sequence, and convolutions that do and do not go through one product.
FEW = pytest.mark.parametrize(
    "name", ["linear", "conv2d-uneven", "conv2d-depthwise", "transposed2d-groups"]
)


@dataclass
class Problem:
    """A layer, its inputs, other weights for it [rows, cols], and targets, all float32."""

    layer: nn.Module
    view: MatrixLayer
    x: Tensor
    weight_q: Tensor
    targets: Tensor

    def rows(
        self, targets: bool, activation: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(row losses [rows], gradient [rows, cols]) by the definition and autograd, float64."""
        layer, x = copy.deepcopy(self.layer).double(), self.x.double()
        activation = activation or nn.Identity()
        weight_q = self.weight_q.double().requires_grad_()
        stored = {"weight": self.view.weight_from_matrix(weight_q)}
        got = activation(functional_call(layer, stored, (x,)))
        wanted = activation(self.targets.double() if targets else layer(x).detach())
        channels = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()
        losses = (got - wanted).square().movedim(channels, 0).reshape(len(weight_q), -1).mean(1)
        (grad,) = torch.autograd.grad(losses.sum(), weight_q)
        return losses.detach(), grad

    def statistics(self, targets: bool = False) -> GramStatistics:
        statistics = GramStatistics([self.view], positions=None, seed=0)
        with torch.no_grad():
            y = self.targets if targets else None
            statistics.collect(batches([self.view], "the layer", self.x, y))
        return statistics

    def gram(self, targets: bool = False, normalize: bool = True) -> GramObjective:
        weight = self.view.weight_matrix()
        return GramObjective(weight, self.statistics(targets), normalize)

    def sampled(
        self,
        targets: bool = False,
        activation: Callable[[Tensor], Tensor] | None = None,
        normalize: bool = True,
        batch_size: int = 4,
    ) -> SampledObjective:
        y = self.targets if targets else self.layer(self.x).detach()
        return SampledObjective(
            self.view,
            self.view.weight_matrix(),
            self.view.samples(self.x),
            self.view.output_samples(y),
            activation,
            batch_size,
            normalize,
            seed=0,
        )


def make(name: str, device: torch.device, samples: int | None = None) -> Problem:
    kind, args, options, shape = CASES[name]
    layer = kind(*args, **options)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer = layer.to(device)
    x = torch.randn(shape if samples is None else (samples, *shape[1:])).to(device) + 0.3
    y = layer(x).detach()
    view = matrix_layer(layer)
    noise = 0.2 * torch.randn(view.rows, view.cols).to(device)
    return Problem(
        layer, view, x, view.weight_matrix() + noise, y + 0.2 * torch.randn(y.shape).to(device)
    )


@pytest.mark.parametrize("targets", [False, True], ids=["symmetric", "asymmetric"])
@normalized
@every_layer
def test_gram_is_the_explicit_loss(
    device: torch.device, name: str, targets: bool, normalize: bool
) -> None:
    problem = make(name, device)
    losses, grad = problem.rows(targets)
    objective = problem.gram(targets, normalize)
    scale = float(objective.row_energies.max()) + 1e-12
    got = objective.row_losses(problem.weight_q)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, losses, rtol=1e-4, atol=1e-6 * scale)
    error = problem.weight_q - problem.view.weight_matrix()
    got = objective.gradient(error) * objective.divisor
    torch.testing.assert_close(got.double(), grad, rtol=1e-4, atol=1e-5 * scale)
    torch.testing.assert_close(objective.residual(error) * 2, objective.gradient(error))


@pytest.mark.parametrize("targets", [False, True], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("activation", [None, nn.GELU(), nn.ReLU(inplace=True)], ids=str)
@every_layer
def test_sampled_is_the_explicit_loss(
    device: torch.device,
    name: str,
    targets: bool,
    activation: Callable[[Tensor], Tensor] | None,
) -> None:
    problem = make(name, device)
    losses, _ = problem.rows(targets, activation)
    objective = problem.sampled(targets, activation)
    got = objective.row_losses(problem.weight_q)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, losses, rtol=1e-4, atol=1e-6 * float(losses.sum()))
    if activation is None:
        gram = problem.gram(targets).row_losses(problem.weight_q)
        torch.testing.assert_close(got, gram, rtol=1e-4, atol=1e-6 * float(losses.sum()))


@FEW
@pytest.mark.parametrize(
    ("activation", "normalize"), [(None, True), (torch.relu, False)], ids=["linear", "relu"]
)
def test_sampled_gradients_average_to_the_exact_one(
    device: torch.device,
    name: str,
    normalize: bool,
    activation: Callable[[Tensor], Tensor] | None,
) -> None:
    problem = make(name, device, samples=16)
    objective = problem.sampled(activation=activation, normalize=normalize, batch_size=8)
    drawn = torch.stack([objective.gradient(problem.weight_q) for _ in range(200)]).double()
    drawn *= float(problem.x.double().square().mean()) if normalize else 1
    _, exact = problem.rows(False, activation)
    expected = drawn.var(0).sum() / len(drawn)  # the mean's squared error, expected
    assert float((drawn.mean(0) - exact).square().sum()) < 3 * float(expected)
    assert float(expected.sqrt()) < 0.1 * float(exact.norm())


@FEW
def test_sampled_draws_follow_the_seed(device: torch.device, name: str) -> None:
    problem = make(name, device, samples=16)
    torch.manual_seed(1)
    first = [problem.sampled().gradient(problem.weight_q) for _ in range(2)]
    assert torch.equal(*first)
    objective = problem.sampled()
    assert not torch.equal(
        objective.gradient(problem.weight_q), objective.gradient(problem.weight_q)
    )


@pytest.mark.parametrize("targets", [False, True], ids=["symmetric", "asymmetric"])
@FEW
def test_row_energies_are_those_of_the_outputs(
    device: torch.device, name: str, targets: bool
) -> None:
    problem = make(name, device)
    if problem.layer.bias is not None:
        problem.layer.bias.data.zero_()
    y = problem.targets if targets else problem.layer(problem.x).detach()
    energies = problem.view.output_samples(y).double().square().transpose(0, 1).flatten(1).mean(1)
    for objective in (problem.gram(targets), problem.sampled(targets)):
        torch.testing.assert_close(objective.row_energies, energies, rtol=1e-4, atol=1e-6)


@FEW
def test_divisor_is_the_inputs_mean_square(device: torch.device, name: str) -> None:
    problem = make(name, device)
    assert problem.gram(normalize=False).divisor == 1
    diagonal = problem.statistics().gram.diagonal(dim1=1, dim2=2)
    objective = problem.gram()
    assert objective.divisor == pytest.approx(float(diagonal.mean()))
    assert float(objective.gram.diagonal(dim1=1, dim2=2).mean()) == pytest.approx(1)
    if name == "linear":
        assert objective.divisor == pytest.approx(float(problem.x.square().mean()))
    problem.x.zero_()
    assert problem.gram().divisor == 1


@FEW
def test_no_targets_no_mismatch(device: torch.device, name: str) -> None:
    assert make(name, device).gram().mismatch is None
