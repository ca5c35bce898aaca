"""The quadratic form of the task's Hessian as a predictor of good roundings: figure 1."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaround_ext.grid import baseline_codes, nearest_codes
from adaround_ext.ops import dequantize
from benchmarks import common
from benchmarks.paper.experiment import Claim, Experiment, Table, Text, Values, pm
from benchmarks.paper.hessian import expansion, gram, local
from benchmarks.paper.workload import Layer, Scorer, calibration, network, test_images
from benchmarks.workloads import digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND: digits.Kind = "separable"
LAYER = "conv"
CLAIMED = 3  # bits: with 4, accuracy hardly moves on digits
PREDICTORS = {
    "quadratic": Text("½ Δw H Δwᵀ", "½ Δw H Δwᵀ"),
    "gradient": Text("g Δwᵀ + ½ Δw H Δwᵀ", "g Δwᵀ + ½ Δw H Δwᵀ"),
    "rows": Text("H within output channels", "H，仅输出通道内"),
    "diagonal": Text("H's diagonal", "H 的对角线"),
    "gram": Text("E‖ΔW x‖² (local Gram)", "E‖ΔW x‖²（局部 Gram）"),
}


def measure(quick: bool) -> Values:
    seeds, draws, bits = (2, 150, (CLAIMED,)) if quick else (3, 1000, (4, CLAIMED))
    runs = [run(b, seed, draws) for b in bits for seed in range(seeds)]
    shown = next(run for run in runs if run["bits"] == CLAIMED)
    for one in runs:
        if one is not shown:
            del one["points"]  # one seed's are enough for a picture
    return {"draws": draws, "network": KIND, "runs": runs}


def run(bits: int, seed: int, draws: int, epochs: int | None = None) -> dict[str, Any]:
    """Predictors, losses and accuracies of stochastic roundings, and how they go together.

    The loss is that of the calibration images, which H is of; the accuracy that of test images.
    """
    data = calibration()
    layer = Layer(network(KIND, seed, epochs), LAYER)
    grid = layer.grid(bits)
    on_calibration, on_test = layer.scorer(data), layer.scorer(test_images(0))
    task, moments = expansion(layer, data), gram(layer, data.images)
    codes = [nearest_codes(layer.weight, grid)]
    codes += [
        baseline_codes(layer.weight, grid, draws * seed + i)["stochastic"] for i in range(draws)
    ]
    weights = [dequantize(one, grid.scale, grid.zero_point) for one in codes]
    changes = torch.stack([weight - layer.weight for weight in weights]).flatten(1)
    predictors = {
        "quadratic": task.quadratic(changes),
        "gradient": task.quadratic(changes) + changes.double() @ task.gradient,
        "rows": task.within_rows(changes, layer.matrix.rows),
        "diagonal": task.diagonal(changes),
        "gram": local(moments, changes),
    }
    full = on_calibration(layer.weight).loss
    losses = _scores(on_calibration, weights, "loss") - full
    accuracies = _scores(on_test, weights, "accuracy")
    common.note(f"taylor: {bits} bits, seed {seed}")
    points = {"loss": losses, "accuracy": accuracies, **predictors}
    return {
        "bits": bits,
        "seed": seed,
        "weights": layer.weight.numel(),
        "loss_before": full,
        "accuracy_before": on_test(layer.weight).accuracy,
        "nearest": {name: float(values[0]) for name, values in points.items()},
        "correlations": {
            name: correlations(values[1:], losses[1:], accuracies[1:])
            for name, values in predictors.items()
        },
        "points": {
            name: [float(f"{value:.4g}") for value in values[1:].tolist()]
            for name, values in points.items()
        },
    }


def _scores(score: Scorer, weights: list[Tensor], name: str) -> Tensor:
    return torch.tensor([getattr(score(weight), name) for weight in weights], dtype=torch.float64)


def correlations(predictor: Tensor, losses: Tensor, accuracies: Tensor) -> dict[str, float]:
    from scipy.stats import pearsonr, spearmanr

    return {
        "pearson_loss": float(pearsonr(predictor, losses)[0]),
        "spearman_loss": float(spearmanr(predictor, losses)[0]),
        "spearman_accuracy": float(spearmanr(predictor, accuracies)[0]),
    }


def of(values: Values, bits: int, predictor: str, name: str) -> list[float]:
    """One correlation of a predictor, a seed after the other."""
    return [run["correlations"][predictor][name] for run in values["runs"] if run["bits"] == bits]


def bits_of(values: Values) -> list[int]:
    return list(dict.fromkeys(run["bits"] for run in values["runs"]))


def tables(values: Values) -> list[Table]:
    """A row a predictor and number of bits, the correlations of each seed."""
    header = (
        Text("bits", "位数"),
        Text("predictor", "预测量"),
        Text("with the loss, Pearson", "与损失，Pearson"),
        Text("Spearman", "Spearman"),
        Text("Spearman by seed", "各种子的 Spearman"),
        Text("with the accuracy, Spearman", "与准确率，Spearman"),
    )
    rows = [
        (
            str(bits),
            title,
            pm(of(values, bits, name, "pearson_loss")),
            pm(of(values, bits, name, "spearman_loss")),
            ", ".join(f"{one:.2f}" for one in of(values, bits, name, "spearman_loss")),
            pm(of(values, bits, name, "spearman_accuracy")),
        )
        for bits in bits_of(values)
        for name, title in PREDICTORS.items()
    ]
    caption = f"Correlations over {values['draws']} stochastic roundings of the first layer"
    return [Table(EXPERIMENT.name, caption, header, rows)]


def claims(values: Values) -> list[Claim]:
    def mean(predictor: str, name: str) -> float:
        return statistics.fmean(of(values, CLAIMED, predictor, name))

    full, diagonal = (
        of(values, CLAIMED, name, "spearman_loss") for name in ("quadratic", "diagonal")
    )
    ranks = Text("Spearman's rank correlation, reversed", "Spearman 秩相关，取负")
    return [
        Claim(
            Text(
                "Accuracy falls with ½ Δw H Δwᵀ: about 63 % at 0.4, 43 % at 2.9, read off figure 1",
                "准确率随 ½ Δw H Δwᵀ 下降：0.4 处约 63 %，2.9 处约 43 %，读自图 1",
            ),
            Text(
                f"rank correlation {mean('quadratic', 'spearman_accuracy'):.2f} with accuracy, "
                f"{mean('quadratic', 'spearman_loss'):.2f} with loss ({KIND}, {CLAIMED} bits)",
                f"与准确率的秩相关 {mean('quadratic', 'spearman_accuracy'):.2f}，与损失 "
                f"{mean('quadratic', 'spearman_loss'):.2f}（{KIND}，{CLAIMED} 位）",
            ),
            ranks,
            [-one for one in of(values, CLAIMED, "quadratic", "spearman_accuracy")],
            1.0,
            assumed=True,
        ),
        Claim(
            Text(
                "What weights do together decides: by H's diagonal alone nearest would be best "
                "(section 3; no figure)",
                "权重之间的相互作用起决定作用：仅看 H 的对角线，四舍五入就是最优"
                "（第 3 节，无数字）",
            ),
            Text(
                f"rank correlation with the loss {statistics.fmean(diagonal):.2f} by the diagonal, "
                f"{statistics.fmean(full):.2f} by all of H",
                f"与损失的秩相关：仅对角线 {statistics.fmean(diagonal):.2f}，整个 H "
                f"{statistics.fmean(full):.2f}",
            ),
            Text(
                "share of the ranks' variance that the rest of H adds",
                "H 的其余部分所增加的秩方差比例",
            ),
            [a * a - b * b for a, b in zip(full, diagonal, strict=True)],
            1.0,
            assumed=True,
        ),
    ]


def draw(figure: Figure, values: Values) -> None:
    """The first seed's draws: loss over ½ Δw H Δwᵀ, over its diagonal and over the Gram's form."""
    from benchmarks.paper import pictures

    run = next(run for run in values["runs"] if run["bits"] == CLAIMED)
    points, nearest = run["points"], run["nearest"]
    shown = (("quadratic", pictures.BLUE), ("diagonal", pictures.ORANGE), ("gram", pictures.GREEN))
    upper, lower = figure.subplots(2, len(shown), sharex="col", sharey="row")
    for (name, color), top, bottom in zip(shown, upper, lower, strict=True):
        pictures.prepare(top, PREDICTORS[name].en, "", "increase of the loss")
        pictures.prepare(bottom, "", PREDICTORS[name].en, "test accuracy, %")
        for axes, what in ((top, "loss"), (bottom, "accuracy")):
            axes.label_outer()
            # Pixels: a thousand circles a panel would be a large file.
            axes.plot(points[name], points[what], ".", color=color, markersize=3, alpha=0.6,
                      rasterized=True)  # fmt: skip
            axes.plot(nearest[name], nearest[what], "D", color=pictures.RED, markersize=6)
            text = f"rank correlation {run['correlations'][name][f'spearman_{what}']:.2f}"
            left = axes is bottom
            axes.text(0.03 if left else 0.97, 0.03, text, transform=axes.transAxes,
                      ha="left" if left else "right", color=pictures.INK)  # fmt: skip
        top.set_yscale("log")
    # By the diagonal, nearest lies apart from the draws.
    lower[1].annotate("nearest", (nearest["diagonal"], nearest["accuracy"]), xytext=(7, -3),
                      textcoords="offset points", color=pictures.RED)  # fmt: skip


EXPERIMENT = Experiment(
    "taylor", Text("figure 1", "图 1"), measure, tables, claims, draw, size=(10.0, 5.4)
)
