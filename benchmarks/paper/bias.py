"""The mean error of a layer's outputs, put into its bias: the paper's table 8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, optimize_layer
from adaround_ext.grid import make_grid
from adaround_ext.ops import dequantize
from benchmarks.paper import comparison, grids
from benchmarks.paper.comparison import Setting, Way
from benchmarks.paper.experiment import Claim, Experiment, Table, Text, Values, papers
from benchmarks.paper.walk import LayerTask, Solver, quantize_each_
from benchmarks.paper.workload import calibration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = (Setting("separable", 3), Setting("separable", 2))
TITLES = {
    "nearest": Text("nearest", "四舍五入"),
    "corrected": Text("nearest, biases corrected", "四舍五入，偏置校正"),
    "adaround": Text("AdaRound", "AdaRound"),
    "adaround corrected": Text("AdaRound, biases corrected after it", "AdaRound，之后校正偏置"),
    "refit": Text('AdaRound with bias="refit"', 'AdaRound，bias="refit"'),
}
PAPER = {
    "nearest": "23.99",
    "corrected": "38.87",
    "adaround": "68.60 ± 0.09",
}


def measure(quick: bool) -> Values:
    return {"runs": comparison.usual("bias", WAYS, SETTINGS, quick)}


def corrected_bias(task: LayerTask, weight_q: Tensor) -> Tensor:
    """b + E[y - (W_q x + b)]: with it the outputs have the mean of the full-precision ones."""
    matrix = task.matrix
    bias = task.matrix.layer.get_parameter("bias")  # as every layer has with batch norms folded
    y = matrix.forward(task.inputs, matrix.weight_from_matrix(weight_q), bias)
    return bias + (task.targets - y).transpose(0, 1).flatten(1).mean(1)


def rounding(name: str, correct: bool) -> Way:
    """Each layer's bias is corrected before the next layer is rounded."""

    def quantize(model: nn.Module, setting: Setting, seed: int) -> None:
        def solve(task: LayerTask) -> tuple[Tensor, Tensor | None]:
            grid = make_grid(task.weight, task.config)
            weight_q = grids.ROUNDINGS[name](task, grid)
            return weight_q, corrected_bias(task, weight_q) if correct else None

        _walk(model, setting, solve)

    return quantize


def refit(model: nn.Module, setting: Setting, seed: int) -> None:
    """The library's: rounding under the covariance, since the bias will take up the mean."""

    def solve(task: LayerTask) -> tuple[Tensor, Tensor | None]:
        settings = comparison.ANNEALING | {"bias": "refit", "scale": "mse"}
        result = optimize_layer(
            task.matrix.layer, task.inputs, task.targets, bits=setting.bits,
            granularity="per_tensor", **settings,
        )  # fmt: skip
        return dequantize(result.codes, result.scale, result.zero_point), result.bias

    _walk(model, setting, solve)


def _walk(model: nn.Module, setting: Setting, solve: Solver) -> None:
    config = AdaRoundConfig(bits=setting.bits, granularity="per_tensor")
    quantize_each_(model, calibration().images, config, solve)


WAYS: dict[str, Way] = {
    "nearest": rounding("nearest", correct=False),
    "corrected": rounding("nearest", correct=True),
    "adaround": rounding("adaround", correct=False),
    "adaround corrected": rounding("adaround", correct=True),
    "refit": refit,
}


def tables(values: Values) -> list[Table]:
    title = "Rounding and the correction of biases: test accuracy and logits' error"
    return [comparison.table(EXPERIMENT.name, title, TITLES, PAPER, values)]


def claims(values: Values) -> list[Claim]:
    return [
        comparison.claim(
            values,
            Text(
                "Correcting biases repairs a part of what nearest breaks: 38.87 % after 23.99 %",
                "校正偏置只能修复四舍五入的一部分损失：38.87 %，之前 23.99 %",
            ),
            "corrected",
            "nearest",
            papers(38.87, 23.99),
        ),
        comparison.claim(
            values,
            Text(
                "AdaRound repairs far more than that: 68.60 % after 38.87 %",
                "AdaRound 修复得多得多：68.60 %，校正偏置 38.87 %",
            ),
            "adaround",
            "corrected",
            papers(68.60, 38.87),
        ),
    ]


def draw(figure: Figure, values: Values) -> None:
    from benchmarks.paper import pictures

    colors = {"nearest": pictures.RED, "corrected": pictures.RED}
    comparison.draw(figure, values, TITLES, colors)


EXPERIMENT = Experiment(
    "bias", Text("table 8", "表 8"), measure, tables, claims, draw, size=(10.0, 3.0)
)
