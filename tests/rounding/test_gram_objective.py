"""Both objectives against the explicit definition of the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from adaround_ext.layers.inputs import batches
from adaround_ext.layers.matrix import MatrixLayer, matrix_layer
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.rounding.sampled_objective import SampledObjective
from adaround_ext.statistics.moments import GramStatistics
from tests.layers.test_matrix import CASES  # every layer type, stride, padding and group

pytestmark = [
    pytest.mark.on_a_device,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]
every_layer = pytest.mark.parametrize("name", CASES)
asymmetric = pytest.mark.parametrize("targets", [False, True], ids=["symmetric", "asymmetric"])
centred_or_not = pytest.mark.parametrize("centred", [False, True], ids=["plain", "centred"])
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
        self,
        targets: bool,
        activation: Callable[[Tensor], Tensor] | None = None,
        centred: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(row losses [rows], gradient [rows, cols]) by the definition and autograd, float64.

        Where ``centred`` with the biases that leave no mean error.
        """
        layer, x = copy.deepcopy(self.layer).double(), self.x.double()
        activation = activation or nn.Identity()
        weight_q = self.weight_q.double().requires_grad_()
        stored = {"weight": self.view.weight_from_matrix(weight_q)}
        got = activation(functional_call(layer, stored, (x,)))
        wanted = activation(self.targets.double() if targets else layer(x).detach())
        channels = -1 if isinstance(layer, nn.Linear) else 1 - layer.weight.dim()
        errors = (got - wanted).movedim(channels, 0).reshape(len(weight_q), -1)
        if centred:
            errors = errors - errors.mean(1, keepdim=True)
        losses = errors.square().mean(1)
        (grad,) = torch.autograd.grad(losses.sum(), weight_q)
        return losses.detach(), grad

    def statistics(self, targets: bool = False) -> GramStatistics:
        statistics = GramStatistics([self.view], positions=None, seed=0)
        with torch.no_grad():
            y = self.targets if targets else None
            statistics.collect(batches([self.view], "the layer", self.x, y))
        return statistics

    def typical(self, centred: bool) -> Tensor:
        """Of each row, the median of what is not 0 on its Gram matrix's diagonal: the unit."""
        statistics = self.statistics()
        moments = statistics.covariance if centred else statistics.gram()
        units = []
        for diagonal in moments.diagonal(dim1=1, dim2=2):
            live = diagonal[diagonal > 0]
            units.append(float(live.median()) if live.numel() else 1.0)
        units = torch.tensor(units, dtype=torch.float64, device=moments.device)
        return units.repeat_interleave(self.view.rows // len(units))

    def gram(self, targets: bool = False, **settings: Any) -> GramObjective:
        return GramObjective(self.view.weight_matrix(), self.statistics(targets), **settings)

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


@asymmetric
@centred_or_not
@normalized
@every_layer
def test_gram_is_the_explicit_loss(
    device: torch.device, name: str, targets: bool, centred: bool, normalize: bool
) -> None:
    problem = make(name, device)
    losses, _ = problem.rows(targets, centred=centred)
    objective = problem.gram(targets, centred=centred, normalize=normalize)
    scale = float(objective.row_energies.max()) + 1e-12
    got = objective.row_losses(problem.weight_q)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, losses, rtol=1e-4, atol=1e-6 * scale)


@asymmetric
@centred_or_not
@every_layer
def test_gram_gradient_is_that_of_the_damped_loss(
    device: torch.device, name: str, targets: bool, centred: bool
) -> None:
    """About ``target``: it takes w_q - target, and adds 2 d median(diag G) (w_q - w)."""
    problem = make(name, device)
    _, grad = problem.rows(targets, centred=centred)
    damping = 0.1
    objective = problem.gram(targets, centred=centred, damping=damping)
    grad = grad + 2 * damping * problem.typical(centred)[:, None] * (
        problem.weight_q - problem.view.weight_matrix()
    )
    scale = float(grad.abs().max()) + 1e-12
    error = problem.weight_q - objective.target
    got = objective.gradient(error) * objective.unit[:, None]
    torch.testing.assert_close(got.double(), grad, rtol=1e-3, atol=1e-4 * scale)
    torch.testing.assert_close(objective.residual(error) * 2, objective.gradient(error))


@FEW
@centred_or_not
def test_target_is_the_minimum_of_the_damped_loss(
    device: torch.device, name: str, centred: bool
) -> None:
    problem = make(name, device, samples=16)
    weight, weight_q = problem.view.weight_matrix(), problem.weight_q
    plain = problem.gram(centred=centred)
    assert plain.target is weight or torch.equal(plain.target, weight)
    objective = problem.gram(targets=True, centred=centred, damping=0.05)
    ridge = 0.05 * problem.typical(centred)

    def damped(w: Tensor) -> Tensor:
        extra = ridge * (w - weight).double().square().sum(1)
        return objective.row_losses(w) + extra

    least = damped(objective.target)
    away = damped(weight_q) - least  # by the quadratic form about the target
    error = weight_q - objective.target
    form = objective.unit * (objective.residual(error) * error).sum(1).double()
    torch.testing.assert_close(away, form, rtol=1e-3, atol=1e-5 * float(away.max()))
    for step in (0.01 * torch.randn_like(weight) for _ in range(5)):
        assert bool((damped(objective.target + step) > least).all())


@asymmetric
@every_layer
def test_bias_change_is_the_mean_error(device: torch.device, name: str, targets: bool) -> None:
    problem = make(name, device)
    objective = problem.gram(targets, centred=True)
    plain, _ = problem.rows(targets)
    centred, _ = problem.rows(targets, centred=True)
    got = objective.bias_change(problem.weight_q)
    assert got.dtype == torch.float64
    scale = float(plain.max())
    torch.testing.assert_close(got.square(), plain - centred, rtol=1e-3, atol=1e-5 * scale)


@FEW
def test_bfloat16_gradient(device: torch.device, name: str) -> None:
    problem = make(name, device)
    objective = problem.gram(dtype=torch.bfloat16)
    error = problem.weight_q - problem.view.weight_matrix()
    got = objective.gradient(error.bfloat16())
    assert got.dtype == torch.bfloat16
    wanted = problem.gram().gradient(error)
    assert float((got.float() - wanted).norm()) < 0.02 * float(wanted.norm())


@asymmetric
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


@asymmetric
@FEW
def test_row_energies_are_those_of_the_outputs(
    device: torch.device, name: str, targets: bool
) -> None:
    problem = make(name, device)
    if problem.layer.bias is not None:
        problem.layer.bias.data.zero_()
    y = problem.targets if targets else problem.layer(problem.x).detach()
    energies = problem.view.output_samples(y).double().square().transpose(0, 1).flatten(1).mean(1)
    grams = [problem.gram(targets, centred=centred) for centred in (False, True)]
    for objective in (*grams, problem.sampled(targets)):
        torch.testing.assert_close(objective.row_energies, energies, rtol=1e-4, atol=1e-6)


@FEW
@centred_or_not
def test_divisor_is_the_typical_mean_square(device: torch.device, name: str, centred: bool) -> None:
    problem = make(name, device)
    assert problem.gram(centred=centred, normalize=False).unit.eq(1).all()
    typical = problem.typical(centred)
    objective = problem.gram(centred=centred)
    torch.testing.assert_close(objective.unit, typical)
    damped = problem.gram(centred=centred, damping=0.25).gram - objective.gram
    eye = torch.eye(problem.view.cols, device=device).expand_as(damped)
    torch.testing.assert_close(damped, 0.25 * eye, rtol=1e-5, atol=1e-5)
    if name == "linear":
        x = problem.x - problem.x.mean(0) if centred else problem.x
        assert float(objective.unit[0]) == pytest.approx(float(x.square().mean(0).median()))
    problem.x.zero_()
    assert problem.gram(centred=centred).unit.eq(1).all()
