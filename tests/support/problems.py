"""Rounding problems: of matrices for the discrete solvers' ops, of layers for optimize_layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, LayerResult, ops, reference
from adaround_ext.grid import QuantGrid, make_grid, nearest_codes
from adaround_ext.layers.matrix import matrix_layer

MANY = 1000  # sweeps: more than any row needs


@dataclass(frozen=True)
class Problem:
    """Codes at nearest rounding of random weights, and the Gram matrices of correlated inputs."""

    weight: Tensor
    codes: Tensor
    gram: Tensor
    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int

    def errors(self, codes: Tensor) -> Tensor:
        """w_q - w in float64, [groups, rows / groups, cols]."""
        back = reference.dequantize(
            codes, self.scale.double(), self.zero_point.to(self.scale.device), torch.float64
        )
        return (back - self.weight.double()).view(self.gram.shape[0], -1, self.gram.shape[1])

    def exact_residual(self, codes: Tensor) -> Tensor:
        return torch.bmm(self.errors(codes), self.gram.double()).view(codes.shape)

    def objective(self, codes: Tensor) -> Tensor:
        """e G e^T of each row."""
        return (self.errors(codes).view(codes.shape) * self.exact_residual(codes)).sum(1)

    def run(
        self, solver: Callable[..., None], dtype: torch.dtype, *settings: int
    ) -> tuple[Tensor, Tensor]:
        """The codes and the residual after ``solver`` in ``dtype``, from these codes."""
        codes = self.codes.clone()
        residual = self.exact_residual(codes).to(dtype)
        gram, scale = self.gram.to(dtype), self.scale.to(dtype)
        solver(codes, residual, gram, scale, self.qmin, self.qmax, *settings)
        return codes, residual

    def solve(
        self,
        refine: Callable[..., None] = ops.refine_,
        dtype: torch.dtype = torch.float32,
        max_sweeps: int = MANY,
    ) -> tuple[Tensor, Tensor]:
        return self.run(refine, dtype, max_sweeps)

    def search(
        self,
        search: Callable[..., None] = ops.tabu_search_,
        dtype: torch.dtype = torch.float32,
        steps: int = 100,
        seed: int = 0,
    ) -> tuple[Tensor, Tensor]:
        return self.run(search, dtype, steps, seed)


def make_problem(
    device: torch.device,
    rows: int = 8,
    cols: int = 24,
    *,
    bits: int = 4,
    symmetric: bool = True,
    scale_rows: int | None = None,
    n_groups: int = 1,
    groups: int = 1,
) -> Problem:
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    torch.manual_seed(0)  # the same problem whenever it is built
    scale = 0.05 + 0.1 * torch.rand(rows if scale_rows is None else scale_rows, n_groups)
    zero_point = torch.full(scale.shape, 0 if symmetric else 2 ** (bits - 1), dtype=torch.int32)
    s = reference.expand_grid(scale, rows, cols)
    weight = s * (2 ** (bits - 1)) * 0.5 * torch.randn(rows, cols)  # some beyond the grid
    z = reference.expand_grid(zero_point, rows, cols)
    codes = ((weight / s).round() + z).clamp(qmin, qmax)
    # Inputs with a common part: correlated, yet well conditioned thanks to many samples.
    inputs = torch.randn(groups, cols, 4 * cols + 8) + torch.randn(groups, 1, 4 * cols + 8)
    gram = torch.bmm(inputs, inputs.mT) / inputs.shape[2]
    tensors = (weight, codes.to(torch.int8 if symmetric else torch.uint8), gram, scale, zero_point)
    return Problem(*(t.to(device) for t in tensors), qmin, qmax)


PROBLEMS = {
    "channel": {},
    "tensor": {"scale_rows": 1},
    "uint8": {"symmetric": False},
    "group-scale": {"n_groups": 4, "symmetric": False},
    "shared-group-scale": {"n_groups": 3, "scale_rows": 1},
    "gram-groups": {"groups": 4},
    "gram-groups-of-one-row": {"groups": 8, "n_groups": 2, "symmetric": False},
    "2-bit": {"bits": 2},
    "3-bit": {"bits": 3, "symmetric": False},
    "8-bit": {"bits": 8},
    "8-bit-uint8": {"bits": 8, "symmetric": False},
    "odd": {"rows": 5, "cols": 33},
    # Rows that are no multiple of what gptq takes at a time, nor columns of a vector.
    "gram-groups-of-five-rows": {"rows": 15, "cols": 21, "groups": 3, "n_groups": 3},
    "one-column": {"cols": 1},
    "one-weight": {"rows": 1, "cols": 1},
}
each_problem = pytest.mark.parametrize("settings", PROBLEMS.values(), ids=PROBLEMS.keys())
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 16), (300, 24)),
    "sequences": (lambda: nn.Linear(24, 16, bias=False), (20, 15, 24)),
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1, stride=2), (20, 3, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (20, 6, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose1d(8, 6, 6, groups=2, stride=2), (20, 8, 12)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def make_layer(name: str, device: torch.device | str = "cpu") -> tuple[nn.Module, Tensor]:
    """(layer, inputs that are correlated between features and neighbours, with an offset)."""
    kind, shape = LAYERS[name]
    channels = 1 if len(shape) > 2 and name != "sequences" else len(shape) - 1
    x = torch.randn(shape).movedim(channels, -1)
    mix = torch.randn(shape[channels], shape[channels]) + 0.3
    x = (x @ mix + 0.5).movedim(-1, channels)
    for dim in range(channels + 1, x.dim()):
        x = x + x.roll(1, dim) + x.roll(2, dim)
    return kind().to(device), x.to(device)


def output_errors(
    layer: nn.Module,
    weight_q: Tensor,
    x: Tensor,
    targets: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """What weight_q (and a new bias) adds to each output, by definition: float64 [rows, all]."""
    exact, x = copy.deepcopy(layer).double(), x.double()
    activation = activation or nn.Identity()
    with torch.no_grad():
        wanted = activation(exact(x) if targets is None else targets.double())
        exact.weight = nn.Parameter(weight_q.double())
        if bias is not None:
            exact.bias = nn.Parameter(bias.double())
        got = activation(exact(x))
    channels = -1 if isinstance(layer, nn.Linear) else 1
    return (got - wanted).movedim(channels, 0).flatten(1)


def row_losses(*args: Any, **options: Any) -> Tensor:
    """The loss of each output channel by its definition, float64; arguments of output_errors."""
    return output_errors(*args, **options).square().mean(1)


def refitted_bias(
    layer: nn.Module, weight_q: Tensor, x: Tensor, targets: Tensor | None = None
) -> Tensor:
    """The bias that leaves no mean error, as the layer's dtype stores it."""
    own = torch.zeros(1) if layer.bias is None else layer.bias.detach()
    bias = own.double().to(x.device) - output_errors(layer, weight_q, x, targets).mean(1)
    return bias.to(layer.get_parameter("weight").dtype)


def stored(layer: nn.Module, codes: Tensor, grid: QuantGrid | LayerResult) -> Tensor:
    """scale (codes - zero_point) in the shape and dtype of the layer's weight."""
    matrix = reference.dequantize(codes, grid.scale, grid.zero_point, torch.float32)
    return matrix_layer(layer).weight_from_matrix(matrix).to(layer.get_parameter("weight").dtype)


def nearest(layer: nn.Module, **settings: Any) -> Tensor:
    """The weight rounded to nearest on the grid that optimize_layer starts from."""
    weight = matrix_layer(layer).weight_matrix().float()
    grid = make_grid(weight, AdaRoundConfig(**settings))
    return stored(layer, nearest_codes(weight, grid), grid)


def nearest_on_grid(layer: nn.Module, result: LayerResult) -> Tensor:
    """The weight rounded to nearest on the grid that a result ended with."""
    limits = torch.iinfo(result.codes.dtype)
    bits = result.report.bits
    qmin, qmax = (0, 2**bits - 1) if limits.min == 0 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    grid = QuantGrid(result.scale, result.zero_point, qmin, qmax)
    return stored(layer, nearest_codes(matrix_layer(layer).weight_matrix().float(), grid), grid)


def result_losses(
    layer: nn.Module, result: LayerResult, x: Tensor, targets: Tensor | None = None
) -> Tensor:
    """The loss of each output channel of a result with its bias."""
    return row_losses(layer, result.weight_q, x, targets, bias=result.bias)


def losses_like(
    layer: nn.Module, result: LayerResult, weight_q: Tensor, x: Tensor,
    targets: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The same of another weight, with a bias refitted where that of the result was."""
    bias = None if result.bias is None else refitted_bias(layer, weight_q, x, targets)
    return row_losses(layer, weight_q, x, targets, bias=bias)


def assert_no_row_is_worse(one: Tensor, other: Tensor) -> None:
    assert bool((one <= other * (1 + 1e-4) + 1e-6 * other.mean()).all())
