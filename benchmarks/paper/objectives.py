"""Task loss, local error and its continuous relaxation as objectives: the paper's table 2."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adaround_ext.grid import nearest_codes
from adaround_ext.ops import dequantize
from benchmarks import common
from benchmarks.paper import experiment
from benchmarks.paper.adaround import PAPER, our_codes, paper_codes
from benchmarks.paper.experiment import Claim, Experiment, Table, Text, Values, pm
from benchmarks.paper.hessian import expansion, gram, local
from benchmarks.paper.qubo import Qubo, cross_entropy_method, search, stochastic
from benchmarks.paper.workload import Layer, calibration, network, test_images
from benchmarks.workloads import digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND: digits.Kind = "separable"


@dataclass(frozen=True)
class Problem:
    """A layer at so many bits, and how hard the solvers try."""

    layer: str
    bits: int
    samples: int  # of the cross-entropy method, an iteration
    starts: int = 30
    steps: int = 3000  # of the tabu search, a start


FIRST = "conv"
PROBLEMS = (Problem(FIRST, 3, samples=4000), Problem("blocks.0.pointwise", 2, samples=1000))
QUICK = (Problem(FIRST, 3, samples=1000),)
METHODS = {  # the paper's problems (13), (20) and (21)
    "nearest": Text("nearest", "四舍五入"),
    "task cem": Text("task loss, cross-entropy method", "任务损失，交叉熵方法"),
    "task search": Text("task loss, our tabu search", "任务损失，本库禁忌搜索"),
    "task both": Text("task loss, one after the other", "任务损失，先后两者"),
    "local cem": Text("local error, cross-entropy method", "局部误差，交叉熵方法"),
    "local search": Text("local error, our tabu search", "局部误差，本库禁忌搜索"),
    "relaxed paper": Text("relaxation, the paper's loop", "连续松弛，论文算法"),
    "relaxed ours": Text("relaxation, our annealing", "连续松弛，本库退火"),
}
FIGURES = {
    "nearest": "52.29",
    "task cem": "68.62 ± 0.17",
    "local cem": "69.39 ± 0.04",
    "relaxed paper": "69.58 ± 0.03",
}


def measure(quick: bool) -> Values:
    problems, seeds = (QUICK, 2) if quick else (PROBLEMS, 3)
    return {
        "network": KIND,
        "paper_steps": PAPER.steps,
        "problems": [asdict(problem) for problem in problems],
        "runs": [
            run(problem, seed, shifts=0 if quick else 1)
            for problem in problems
            for seed in range(seeds)
        ],
    }


def run(problem: Problem, seed: int, shifts: int, epochs: int | None = None) -> dict[str, Any]:
    """What every method makes of the same layer on the same grid."""
    data = calibration()
    layer = Layer(network(KIND, seed, epochs), problem.layer)
    grid = layer.grid(problem.bits)
    task, moments = expansion(layer, data), gram(layer, data.images)
    on_test, on_calibration = layer.scorer(test_images(shifts)), layer.scorer(data)
    shape = layer.weight.shape
    near = nearest_codes(layer.weight, grid)
    one = layer.weight.view(1, -1)  # all weights in a row, since H joins them all
    whole, rows = Qubo.of(one, grid, task.hessian), Qubo.of(layer.weight, grid, moments)

    def by_cem(qubo: Qubo) -> Tensor:
        return cross_entropy_method(qubo, seed, samples=problem.samples)

    def by_search(qubo: Qubo, weight: Tensor) -> Tensor:
        starts = stochastic(qubo, qubo.nearest(weight, grid), problem.starts, seed)
        return search(qubo, starts, problem.steps, seed)

    ways: dict[str, Callable[[], Tensor]] = {
        "nearest": lambda: near,
        "task cem": lambda: whole.codes(by_cem(whole)),
        "task search": lambda: whole.codes(by_search(whole, one)),
        "task both": lambda: whole.codes(search(whole, by_cem(whole)[None], problem.steps, seed)),
        "local cem": lambda: rows.codes(by_cem(rows)),
        "local search": lambda: rows.codes(by_search(rows, layer.weight)),
        "relaxed paper": lambda: paper_codes(layer, grid, seed),
        "relaxed ours": lambda: our_codes(
            layer, grid, starts=("adaround",), refine=False, damping=0.0, seed=seed
        ),
    }
    outcomes = {}
    for name, way in ways.items():
        started = time.process_time()
        codes = way().view(shape)
        seconds = time.process_time() - started
        change = (dequantize(codes, grid.scale, grid.zero_point) - layer.weight).view(1, -1)
        outcomes[name] = {
            **asdict(on_test.codes(codes, grid)),
            "calibration_loss": on_calibration.codes(codes, grid).loss,
            "task": float(task.quadratic(change)),
            "local": float(local(moments, change)),
            "cpu_seconds": seconds,
        }
    common.note(f"objectives: {problem.layer}, {problem.bits} bits, seed {seed}")
    return {
        "layer": problem.layer,
        "bits": problem.bits,
        "seed": seed,
        "weights": layer.weight.numel(),
        "full": asdict(on_test(layer.weight)),
        "methods": outcomes,
    }


def runs_of(values: Values, layer: str) -> list[dict[str, Any]]:
    return [run for run in values["runs"] if run["layer"] == layer]


def of(values: Values, layer: str, method: str, name: str) -> list[float]:
    """One number of a method, a seed after the other."""
    return [run["methods"][method][name] for run in runs_of(values, layer)]


def tables(values: Values) -> list[Table]:
    """A table a layer: a row a method."""
    header = (
        Text("objective and solver", "目标与求解器"),
        Text("paper, %", "论文，%"),
        Text("here, %", "此处，%"),
        Text("test loss", "测试损失"),
        Text("½ Δw H Δwᵀ", "½ Δw H Δwᵀ"),
        Text("E‖ΔW x‖²", "E‖ΔW x‖²"),
        Text("seconds", "秒"),
    )
    by_layer = []
    for problem in values["problems"]:
        layer, bits = problem["layer"], problem["bits"]
        runs = runs_of(values, layer)
        full = [run["full"] for run in runs]
        rows: list[tuple[Text | str, ...]] = [
            (
                experiment.NOT_QUANTIZED,
                f"{experiment.FULL}",
                pm([one["accuracy"] for one in full]),
                pm([one["loss"] for one in full], 4),
                *("0", "0", "-"),
            )
        ]
        for method, title in METHODS.items():
            means = [
                statistics.fmean(of(values, layer, method, name))
                for name in ("task", "local", "cpu_seconds")
            ]
            rows.append(
                (
                    title,
                    FIGURES.get(method, "-") if layer == FIRST else "-",
                    pm(of(values, layer, method, "accuracy")),
                    pm(of(values, layer, method, "loss"), 4),
                    f"{means[0]:.5f}",
                    f"{means[1]:.4g}",
                    "-" if method == "nearest" else f"{means[2]:.2g}",
                )
            )
        name = EXPERIMENT.name if layer == FIRST else f"{EXPERIMENT.name}_second"
        caption = f"{layer} of {KIND}, {runs[0]['weights']} weights at {bits} bits"
        by_layer.append(Table(name, caption, header, rows))
    return by_layer


def regained(values: Values, method: str) -> list[float]:
    """Of the accuracy that nearest loses on the first layer, the share that the method does not."""
    shares = []
    for run in runs_of(values, FIRST):
        nearest, full = run["methods"]["nearest"]["accuracy"], run["full"]["accuracy"]
        shares.append((run["methods"][method]["accuracy"] - nearest) / (full - nearest))
    return shares


def differences(values: Values, method: str, other: str) -> list[float]:
    return [a - b for a, b in zip(regained(values, method), regained(values, other), strict=True)]


def percent(values: Values, method: str) -> str:
    return f"{statistics.fmean(of(values, FIRST, method, 'accuracy')):.2f} %"


def beside(values: Values, method: str, other: str) -> Text:
    """Both methods' accuracy and loss, in words."""
    a, b = (
        f"{percent(values, name)} ({statistics.fmean(of(values, FIRST, name, 'loss')):.4f})"
        for name in (method, other)
    )
    return Text(
        f"{a} and {b}: accuracy (test loss), {KIND}",
        f"{a} 与 {b}：准确率（测试损失），{KIND}",
    )


def claims(values: Values) -> list[Claim]:
    """The paper's of the first layer, judged by what the methods regain."""
    more = Text("difference of these shares", "上述比例之差")
    return [
        Claim(
            Text(
                "Minimizing the quadratic form of the task's Hessian: 52.29 to 68.62 %",
                "最小化任务 Hessian 的二次型：52.29 % 升至 68.62 %",
            ),
            Text(
                f"{percent(values, 'nearest')} to {percent(values, 'task cem')} ({KIND})",
                f"{percent(values, 'nearest')} 升至 {percent(values, 'task cem')}（{KIND}）",
            ),
            experiment.SHARE,
            regained(values, "task cem"),
            0.939,
        ),
        Claim(
            Text(
                "The local error does better as an objective: 69.39 %, the task loss 68.62 %",
                "以局部误差为目标更好：69.39 %，任务损失 68.62 %",
            ),
            beside(values, "local cem", "task cem"),
            more,
            differences(values, "local cem", "task cem"),
            0.044,
        ),
        Claim(
            Text(
                "Its relaxation does better still: 69.58 %, the discrete problem 69.39 %",
                "其连续松弛更好：69.58 %，离散问题 69.39 %",
            ),
            beside(values, "relaxed paper", "local cem"),
            more,
            differences(values, "relaxed paper", "local cem"),
            0.011,
        ),
    ]


def draw(figure: Figure, values: Values) -> None:
    """Both objectives of every method's codes, as shares of nearest's, a panel a layer."""
    from benchmarks.paper import pictures

    styles = {
        "nearest": ("D", pictures.RED),
        "task cem": ("^", pictures.ORANGE),
        "task search": ("o", pictures.ORANGE),
        "task both": ("s", pictures.ORANGE),
        "local cem": ("^", pictures.BLUE),
        "local search": ("o", pictures.BLUE),
        "relaxed paper": ("X", pictures.GREEN),
        "relaxed ours": ("P", pictures.GREEN),
    }
    panels = figure.subplots(1, len(values["problems"]), squeeze=False)[0]
    for axes, problem in zip(panels, values["problems"], strict=True):
        layer = problem["layer"]
        pictures.prepare(
            axes,
            f"{layer}, {problem['bits']} bits: every seed",
            "E‖ΔW x‖², nearest = 1",
            "½ Δw H Δwᵀ, nearest = 1",
        )
        axes.set_yscale("log")
        for method, (marker, color) in styles.items():
            x, y = (
                [
                    value / nearest
                    for value, nearest in zip(
                        of(values, layer, method, name),
                        of(values, layer, "nearest", name),
                        strict=True,
                    )
                ]
                for name in ("local", "task")
            )
            axes.plot(x, y, marker, color=color, markersize=6, alpha=0.8, label=METHODS[method].en)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


EXPERIMENT = Experiment(
    "objectives", Text("table 2", "表 2"), measure, tables, claims, draw, size=(10.0, 4.8)
)
