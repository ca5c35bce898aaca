"""The grid that weights are rounded on, and what rounding makes of it: the paper's table 6."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, optimize_layer
from adaround_ext.grid import QuantGrid, make_grid, nearest_codes
from adaround_ext.layers import inputs as data
from adaround_ext.ops import dequantize
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.statistics.moments import GramStatistics
from benchmarks.paper import comparison
from benchmarks.paper.comparison import Setting, Way
from benchmarks.paper.experiment import Claim, Experiment, Table, Text, Values, papers
from benchmarks.paper.walk import LayerTask, quantize_each_
from benchmarks.paper.workload import calibration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = (Setting("separable", 3), Setting("residual", 3))
SHARES = torch.linspace(0.2, 1.0, 81).tolist()  # of the min-max scale
GridRule = Callable[[LayerTask], QuantGrid]
Rounding = Callable[[LayerTask, QuantGrid], Tensor]


def min_max(task: LayerTask) -> QuantGrid:
    return make_grid(task.weight, _config(task.config.bits, "min_max"))


def by_weights(task: LayerTask) -> QuantGrid:
    """Least squared error of the weights under rounding to nearest."""
    return make_grid(task.weight, _config(task.config.bits, "mse"))


def by_outputs(task: LayerTask) -> QuantGrid:
    """Least squared error of the layer's outputs under rounding to nearest."""
    widest, loss = min_max(task), output_loss(task)
    grids = [replace(widest, scale=widest.scale * share) for share in SHARES]
    return min(grids, key=lambda grid: loss(nearest(task, grid)))


def output_loss(task: LayerTask) -> Callable[[Tensor], float]:
    """E ||y - (W_q x + b)||^2 of weights, before the activation function."""
    sums = GramStatistics([task.matrix], None, 0)
    sums.collect(data.batches([task.matrix], task.name, task.inputs, task.targets))
    objective = GramObjective(task.weight, sums)
    return lambda weight_q: float(objective.row_losses(weight_q).sum())


def by_search(task: LayerTask) -> QuantGrid:
    """The library's: least error of the outputs where every candidate is rounded by GPTQ.

    Without descent, and refitted in the end to AdaRound's codes on the best of them.
    """
    result = optimize_layer(
        task.matrix.layer,
        task.inputs,
        task.targets,
        _config(task.config.bits, "gram"),
        **comparison.ANNEALING,
    )
    return replace(min_max(task), scale=result.scale)


def nearest(task: LayerTask, grid: QuantGrid) -> Tensor:
    return dequantize(nearest_codes(task.weight, grid), grid.scale, grid.zero_point)


def adaround(task: LayerTask, grid: QuantGrid) -> Tensor:
    """In the Gram form, without ReLU."""
    config = replace(_config(task.config.bits, "mse"), scale=grid.scale)
    layer = task.matrix.layer
    result = optimize_layer(layer, task.inputs, task.targets, config, **comparison.ANNEALING)
    return dequantize(result.codes, result.scale, result.zero_point)


def _config(bits: int, scale: str) -> AdaRoundConfig:
    return AdaRoundConfig(bits=bits, granularity="per_tensor", scale=scale)


RULES: dict[str, GridRule] = {
    "min-max": min_max,
    "weights": by_weights,
    "outputs": by_outputs,
    "search": by_search,
}
ROUNDINGS: dict[str, Rounding] = {"nearest": nearest, "adaround": adaround}
TITLES = {
    "nearest min-max": Text("nearest, min-max", "四舍五入，min-max"),
    "nearest weights": Text("nearest, ‖W − Ŵ‖", "四舍五入，‖W − Ŵ‖"),
    "nearest outputs": Text("nearest, ‖Wx − Ŵx̂‖", "四舍五入，‖Wx − Ŵx̂‖"),
    "nearest search": Text("nearest, searched as ours", "四舍五入，本库搜索"),
    "adaround min-max": Text("AdaRound, min-max", "AdaRound，min-max"),
    "adaround weights": Text("AdaRound, ‖W − Ŵ‖", "AdaRound，‖W − Ŵ‖"),
    "adaround outputs": Text("AdaRound, ‖Wx − Ŵx̂‖", "AdaRound，‖Wx − Ŵx̂‖"),
    "adaround search": Text("AdaRound, searched as ours", "AdaRound，本库搜索"),
}
PAPER = {
    "nearest min-max": "0.23",
    "nearest weights": "23.99",
    "nearest outputs": "42.89",
    "adaround min-max": "61.96 ± 0.04",
    "adaround weights": "68.60 ± 0.09",
    "adaround outputs": "68.62 ± 0.08",
}


def measure(quick: bool) -> Values:
    ways = {
        f"{rounding} {rule}": way(RULES[rule], ROUNDINGS[rounding])
        for rounding in ROUNDINGS
        for rule in RULES
    }
    return {"runs": comparison.usual("grids", ways, SETTINGS, quick)}


def way(rule: GridRule, rounding: Rounding) -> Way:
    """The network with every layer on a grid of its own, in order."""

    def quantize(model: nn.Module, setting: Setting, seed: int) -> dict[str, float]:
        shares = []

        def solve(task: LayerTask) -> tuple[Tensor, None]:
            grid = rule(task)
            shares.append(float(grid.scale / min_max(task).scale))
            return rounding(task, grid), None

        quantize_each_(model, calibration().images, _config(setting.bits, "mse"), solve)
        return {"share_of_min_max": statistics.fmean(shares)}

    return quantize


def tables(values: Values) -> list[Table]:
    title = "Grids by rounding: test accuracy and logits' error"
    return [comparison.table(EXPERIMENT.name, title, TITLES, PAPER, values)]


def claims(values: Values) -> list[Claim]:
    both = [
        comparison.saved(values, f"{rounding} outputs", f"{rounding} weights")
        for rounding in ROUNDINGS
    ]
    means = [f"{100 * statistics.fmean(shares):.0f} %" for shares in both]
    return [
        comparison.claim(
            values,
            Text(
                "Min-max grids destroy rounding to nearest: 0.23 % after 23.99 %",
                "min-max 网格毁掉四舍五入：0.23 %，‖W − Ŵ‖ 网格 23.99 %",
            ),
            "nearest weights",
            "nearest min-max",
            papers(23.99, 0.23),
        ),
        comparison.claim(
            values,
            Text(
                "Min-max grids cost AdaRound much as well: 61.96 % after 68.60 %",
                "min-max 网格也使 AdaRound 损失不少：61.96 %，‖W − Ŵ‖ 网格 68.60 %",
            ),
            "adaround weights",
            "adaround min-max",
            papers(68.60, 61.96),
        ),
        comparison.claim(
            values,
            Text(
                "AdaRound rescues even a min-max grid: 61.96 % after 0.23 %",
                "即使用 min-max 网格 AdaRound 也能挽救：61.96 %，四舍五入 0.23 %",
            ),
            "adaround min-max",
            "nearest min-max",
            papers(61.96, 0.23),
        ),
        Claim(
            Text(
                "Grids chosen by outputs instead of weights help nearest (42.89 % after 23.99 %), "
                "not AdaRound (68.62 % after 68.60 %)",
                "按输出而非权重选网格对四舍五入有益（42.89 %，之前 23.99 %），"
                "对 AdaRound 则否（68.62 %，之前 68.60 %）",
            ),
            Text(
                f"of the logits' error they save nearest {means[0]}, AdaRound {means[1]}",
                f"logits 误差：四舍五入减少 {means[0]}，AdaRound 减少 {means[1]}",
            ),
            Text(
                "share saved by nearest less share saved by AdaRound, networks in turn",
                "四舍五入减少的比例减去 AdaRound 减少的比例，各网络依次列出",
            ),
            [first - second for first, second in zip(*both, strict=True)],
            papers(42.89, 23.99) - papers(68.62, 68.60),
        ),
    ]


def draw(figure: Figure, values: Values) -> None:
    from benchmarks.paper import pictures

    colors = {name: pictures.RED for name in TITLES if name.startswith("nearest")}
    comparison.draw(figure, values, TITLES, colors)


EXPERIMENT = Experiment(
    "grids", Text("table 6", "表 6"), measure, tables, claims, draw, size=(10.0, 3.8)
)
