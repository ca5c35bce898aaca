"""Other relaxations than the paper's, and none: its tables 3 and 5.

All start from the weights, on the grid of least squared weight error with one scale a layer, see
quantized inputs and the ReLU in their loss, and differ in nothing but h and where V may go. The
paper states neither learning rates nor temperatures: these have the least error of a few on
networks of seed 0. A rate that falls to 0 along a line is a second way for two of them: codes of
the straight-through estimator whose V lies near a midpoint else jump until the end.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from adaround_ext import AdaRoundConfig
from adaround_ext.grid import QuantGrid, nearest_codes
from adaround_ext.reference import ReferenceConfig
from benchmarks.paper import comparison, relaxed
from benchmarks.paper.comparison import Setting, Way
from benchmarks.paper.experiment import Claim, Experiment, Table, Text, Values, papers
from benchmarks.paper.walk import LayerTask, Solver, quantize_each_, rounded
from benchmarks.paper.workload import calibration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = (
    Setting("separable", 3, "first layer"),
    Setting("separable", 2),
    Setting("residual", 2),
)
STEPS = {"first layer": 3000, "all layers": 400}


class Variant(NamedTuple):
    relaxation: type[relaxed.Relaxation]
    learning_rate: float
    falling: bool = False


VARIANTS = {
    "ste": Variant(relaxed.StraightThrough, 3e-2),
    "ste falling": Variant(relaxed.StraightThrough, 1e-2, falling=True),
    "annealed": Variant(relaxed.AnnealedSigmoid, 1e-1),
    "sigmoid": Variant(relaxed.Sigmoid, 1e-1),
    "rectified": Variant(relaxed.RectifiedSigmoid, 1e-1),
    "rectified falling": Variant(relaxed.RectifiedSigmoid, 1e-1, falling=True),
}
TITLES = {
    "nearest": Text("nearest", "四舍五入"),
    "ste": Text("straight-through estimator", "直通估计（STE）"),
    "ste falling": Text("straight-through, falling rate", "直通估计，学习率递减"),
    "annealed": Text("sigmoid, temperature annealed", "sigmoid，温度退火"),
    "sigmoid": Text("sigmoid with f_reg", "sigmoid 加 f_reg"),
    "rectified": Text(
        "rectified sigmoid with f_reg (AdaRound)", "rectified sigmoid 加 f_reg（AdaRound）"
    ),
    "rectified falling": Text("AdaRound, falling rate", "AdaRound，学习率递减"),
}
PAPER = {  # all layers; table 3 without asymmetric inputs and ReLU, table 5 with them
    "nearest": "23.99",
    "ste": "66.63 (T5)",
    "annealed": "65.22 ± 0.67 (T3)",
    "sigmoid": "66.25 ± 0.15 (T3)",
    "rectified": "66.56 ± 0.12 (T3), 68.60 ± 0.09 (T5)",
}


def measure(quick: bool) -> Values:
    settings, seeds, divisor = (SETTINGS[:2], 1, 5) if quick else (SETTINGS, 3, 1)
    steps = {part: number // divisor for part, number in STEPS.items()}
    shifts = 0 if quick else 1
    runs = comparison.compare("relaxations", ways(steps), settings, seeds, shifts=shifts)
    rates = {name: variant.learning_rate for name, variant in VARIANTS.items()}
    return {"steps": steps, "learning_rates": rates, "runs": runs}


def ways(steps: dict[str, int]) -> dict[str, Way]:
    return {"nearest": nearest_} | {
        name: relaxation(variant, steps) for name, variant in VARIANTS.items()
    }


def nearest_(model: nn.Module, setting: Setting, seed: int) -> None:
    walk_(model, setting, rounded(lambda task, grid: nearest_codes(task.weight, grid)))


def relaxation(variant: Variant, steps: dict[str, int]) -> Way:
    def quantize_(model: nn.Module, setting: Setting, seed: int) -> dict[str, float]:
        loop = ReferenceConfig(
            steps=steps[setting.part], learning_rate=variant.learning_rate, seed=seed
        )
        undecided: list[float] = []

        def codes_of(task: LayerTask, grid: QuantGrid) -> Tensor:
            fit = relaxed.fit(
                variant.relaxation(task.weight, grid), task.inputs, task.activated(task.targets),
                task.forward, loop, falling=variant.falling,
            )  # fmt: skip
            undecided.append(fit.undecided)
            return fit.codes

        walk_(model, setting, rounded(codes_of))
        return {"undecided": statistics.fmean(undecided)}

    return quantize_


def walk_(model: nn.Module, setting: Setting, solve: Solver) -> None:
    config = AdaRoundConfig(bits=setting.bits, granularity="per_tensor")
    only_first = setting.part == "first layer"
    quantize_each_(model, calibration().images, config, solve, only_first=only_first)


def tables(values: Values) -> list[Table]:
    steps = values["steps"]
    title = (
        f"Relaxations, {steps['all layers']} steps a layer ({steps['first layer']} for the first "
        "layer alone): test accuracy and logits' error"
    )
    return [comparison.table(EXPERIMENT.name, title, TITLES, PAPER, values)]


# Of all layers: what the paper says, the better, the worse, and the share regained there.
CLAIMS = (
    (
        Text(
            "A regularizer makes better decisions than an annealed temperature: 66.25 % "
            "after 65.22 %",
            "正则项优于温度退火：66.25 %，退火 65.22 %",
        ),
        "sigmoid",
        "annealed",
        papers(66.25, 65.22),
    ),
    (
        Text(
            "Rectifying the sigmoid, so that 0 and 1 are reached, helps: 66.56 % after 66.25 %",
            "rectified sigmoid 可达 0 和 1，稍有益：66.56 %，sigmoid 66.25 %",
        ),
        "rectified",
        "sigmoid",
        papers(66.56, 66.25),
    ),
    (
        Text(
            "The straight-through estimator is far above nearest: 66.63 % after 23.99 %",
            "直通估计远优于四舍五入：66.63 %，四舍五入 23.99 %",
        ),
        "ste",
        "nearest",
        papers(66.63, 23.99),
    ),
    (
        Text(
            "AdaRound is above the straight-through estimator, though it may only go one "
            "step: 68.60 % after 66.63 %",
            "AdaRound 只能移动一格，仍优于直通估计：68.60 %，直通估计 66.63 %",
        ),
        "rectified",
        "ste",
        papers(68.60, 66.63),
    ),
    (
        Text(
            "The same where both have a falling learning rate: 68.60 % after 66.63 %",
            "两者学习率都递减时亦然：68.60 %，直通估计 66.63 %",
        ),
        "rectified falling",
        "ste falling",
        papers(68.60, 66.63),
    ),
)


def claims(values: Values) -> list[Claim]:
    first = comparison.claim(
        values,
        Text(
            "AdaRound's relaxation beats an annealed temperature on the first layer: 69.58 % "
            "after 69.31 %",
            "首层上 AdaRound 的松弛优于温度退火：69.58 %，退火 69.31 %",
        ),
        "rectified",
        "annealed",
        papers(69.58, 69.31),
        "first layer",
    )
    return [first, *(comparison.claim(values, *claim, "all layers") for claim in CLAIMS)]


def draw(figure: Figure, values: Values) -> None:
    from benchmarks.paper import pictures

    colors = {"nearest": pictures.RED}
    colors |= dict.fromkeys(("rectified", "rectified falling"), pictures.GREEN)
    comparison.draw(figure, values, TITLES, colors)


EXPERIMENT = Experiment(
    "relaxations", Text("tables 3 and 5", "表 3、表 5"), measure, tables, claims, draw,
    size=(10.0, 3.6),
)  # fmt: skip
