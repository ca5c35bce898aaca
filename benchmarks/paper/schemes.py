"""Rounding schemes for the weights of the first layer alone, as in the paper's table 1."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from adaround_ext.grid import baseline_codes, nearest_codes
from benchmarks import common
from benchmarks.paper import experiment
from benchmarks.paper.adaround import PAPER, our_codes, paper_codes
from benchmarks.paper.experiment import Claim, Experiment, Table, Text, Values, pm
from benchmarks.paper.workload import Layer, Score, network, test_images
from benchmarks.workloads import digits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS: tuple[tuple[digits.Kind, int], ...] = (
    ("separable", 4),
    ("separable", 3),
    ("residual", 3),
)
LAYER = "conv"
CLAIMED = ("separable", 3)  # where nearest loses about as much as in the paper
WHERE = Text(f"{CLAIMED[0]}, {CLAIMED[1]} bits", f"{CLAIMED[0]}，{CLAIMED[1]} 位")
TITLES = {
    "full": experiment.NOT_QUANTIZED,
    "nearest": Text("nearest", "四舍五入"),
    "ceil": Text("ceil", "向上取整"),
    "floor": Text("floor", "向下取整"),
    "stochastic": Text("stochastic, mean of draws", "随机舍入，多次平均"),
    "stochastic best": Text("stochastic, best draw", "随机舍入，最好一次"),
    "paper": Text("the paper's AdaRound", "论文的 AdaRound"),
    "fast": Text("ours, fast", "本库 fast"),
    "balanced": Text("ours, balanced", "本库 balanced"),
    "best": Text("ours, best", "本库 best"),
}


def measure(quick: bool) -> Values:
    settings = SETTINGS[1:2] if quick else SETTINGS
    seeds, draws = (2, 30) if quick else (3, 100)
    return {
        "draws": draws,
        "paper_steps": PAPER.steps,
        "runs": [
            run(kind, bits, seed, draws, shifts=0 if quick else 1)
            for kind, bits in settings
            for seed in range(seeds)
        ],
    }


def run(
    kind: digits.Kind, bits: int, seed: int, draws: int, shifts: int, epochs: int | None = None
) -> dict[str, Any]:
    """Scores on test images of every scheme, and of every stochastic draw."""
    layer = Layer(network(kind, seed, epochs), LAYER)
    score = layer.scorer(test_images(shifts))
    grid = layer.grid(bits)
    simple = baseline_codes(layer.weight, grid, seed)
    schemes = {
        "nearest": nearest_codes(layer.weight, grid),
        "ceil": simple["ceil"],
        "floor": simple["floor"],
        "paper": paper_codes(layer, grid, seed, layer.model.get_submodule("relu")),
        **{
            preset: our_codes(layer, grid, preset=preset) for preset in ("fast", "balanced", "best")
        },
    }
    scores = {"full": asdict(score(layer.weight))}
    scores |= {name: asdict(score.codes(codes, grid)) for name, codes in schemes.items()}
    drawn = [
        score.codes(baseline_codes(layer.weight, grid, 1000 * seed + i)["stochastic"], grid)
        for i in range(draws)
    ]
    common.note(f"schemes: {kind}, {bits} bits, seed {seed}")
    return {
        "network": kind,
        "bits": bits,
        "seed": seed,
        "weights": layer.weight.numel(),
        "scores": scores | summary(drawn),
        "stochastic_accuracies": [one.accuracy for one in drawn],
        "stochastic_losses": [one.loss for one in drawn],
    }


def summary(drawn: Sequence[Score]) -> dict[str, dict[str, float]]:
    """The draws' mean, and the one with the best accuracy."""
    mean = Score(*(statistics.fmean(asdict(d)[name] for d in drawn) for name in asdict(drawn[0])))
    best = max(drawn, key=lambda one: (one.accuracy, -one.loss))
    return {"stochastic": asdict(mean), "stochastic best": asdict(best)}


def of(values: Values, kind: str, bits: int, scheme: str, name: str) -> list[float]:
    """One number of a scheme, a seed after the other."""
    return [
        run["scores"][scheme][name]
        for run in values["runs"]
        if (run["network"], run["bits"]) == (kind, bits)
    ]


def settings_of(values: Values) -> list[tuple[str, int]]:
    return list(dict.fromkeys((run["network"], run["bits"]) for run in values["runs"]))


def tables(values: Values) -> list[Table]:
    """A row a scheme, with the paper's figures beside ours."""
    paper = {
        "full": f"{experiment.FULL}", "nearest": "52.29", "ceil": "0.10", "floor": "0.10",
        "stochastic": "52.06 (± 5.52)", "stochastic best": "63.06", "paper": "69.58 ± 0.03",
    }  # fmt: skip
    header = [
        Text("scheme", "方案"),
        Text("paper, ResNet-18, 4 bits, %", "论文，ResNet-18，4 位，%"),
    ]
    for kind, bits in settings_of(values):
        header += [
            Text(f"{kind}, {bits} bits, %", f"{kind}，{bits} 位，%"),
            Text("task loss", "任务损失"),
        ]
    rows: list[list[Text | str]] = []
    for scheme, title in TITLES.items():
        row: list[Text | str] = [title, paper.get(scheme, "-")]
        for setting in settings_of(values):
            row.append(pm(of(values, *setting, scheme, "accuracy")))
            row.append(pm(of(values, *setting, scheme, "loss"), 3))
        rows.append(row)
    caption = f"Schemes for the first layer: test accuracy and loss; {values['draws']} draws"
    return [Table(EXPERIMENT.name, caption, header, rows)]


def regained(run: dict[str, Any], scheme: str) -> float:
    """Of the accuracy that nearest loses, the share that the scheme does not."""
    full, nearest, it = (run["scores"][name]["accuracy"] for name in ("full", "nearest", scheme))
    return float((it - nearest) / (full - nearest))


def lost_one_way(run: dict[str, Any]) -> float:
    """The share of nearest's accuracy that the better of ceil and floor loses."""
    one_way = max(run["scores"][name]["accuracy"] for name in ("ceil", "floor"))
    return float(1 - one_way / run["scores"]["nearest"]["accuracy"])


def above_nearest(run: dict[str, Any]) -> float:
    """The share of stochastic roundings with a higher accuracy."""
    nearest, drawn = run["scores"]["nearest"]["accuracy"], run["stochastic_accuracies"]
    return float(sum(one > nearest for one in drawn) / len(drawn))


def claims(values: Values) -> list[Claim]:
    runs = [run for run in values["runs"] if (run["network"], run["bits"]) == CLAIMED]
    means = {
        scheme: f"{statistics.fmean(of(values, *CLAIMED, scheme, 'accuracy')):.1f} %"
        for scheme in TITLES
    }
    return [*_claims_of_rules(means, runs), *_claims_of_regained(means, runs)]


def _claims_of_rules(mean: Mapping[str, str], runs: Sequence[dict[str, Any]]) -> list[Claim]:
    """Of schemes that look at no data. ``mean``: the accuracy of each scheme, in words."""
    above = [above_nearest(run) for run in runs]
    of_100 = f"{100 * statistics.fmean(above):.0f}"
    return [
        Claim(
            Text(
                "All up or all down destroys the network: 0.10 % after 52.29 %",
                "全部向上或向下取整会毁掉网络：52.29 % 降至 0.10 %",
            ),
            Text(
                f"ceil {mean['ceil']}, floor {mean['floor']}, nearest {mean['nearest']} "
                f"({WHERE.en})",
                f"向上 {mean['ceil']}，向下 {mean['floor']}，四舍五入 {mean['nearest']}"
                f"（{WHERE.zh}）",
            ),
            Text("share of nearest's accuracy lost by the better one", "较好者损失的准确率比例"),
            [lost_one_way(run) for run in runs],
            0.998,
        ),
        Claim(
            Text(
                "Nearest is not the best: 48 of 100 random roundings are better",
                "四舍五入并非最优：100 次随机舍入中 48 次更好",
            ),
            Text(
                f"{of_100} of 100; their mean {mean['stochastic']} ({WHERE.en})",
                f"100 次中 {of_100} 次；平均 {mean['stochastic']}（{WHERE.zh}）",
            ),
            Text("share of draws above nearest", "优于四舍五入的比例"),
            above,
            0.48,
        ),
    ]


def _claims_of_regained(mean: Mapping[str, str], runs: Sequence[dict[str, Any]]) -> list[Claim]:
    """Of what the best random rounding and an optimized one regain."""
    return [
        Claim(
            Text(
                "The best of 100 random roundings has 63.06 %, nearest 52.29 %, of 69.68 %",
                "100 次随机舍入中最好的为 63.06 %，四舍五入 52.29 %，未量化 69.68 %",
            ),
            Text(
                f"{mean['stochastic best']}, {mean['nearest']}, of {mean['full']} ({WHERE.en})",
                f"{mean['stochastic best']}，{mean['nearest']}，未量化 {mean['full']}"
                f"（{WHERE.zh}）",
            ),
            experiment.SHARE,
            [regained(run, "stochastic best") for run in runs],
            0.619,
        ),
        Claim(
            Text(
                "Optimized rounding regains nearly all: 69.58 % of 69.68 % (table 2)",
                "优化后的舍入几乎全部挽回：69.58 %，未量化 69.68 %（表 2）",
            ),
            Text(
                f"the paper's loop {mean['paper']}, ours {mean['balanced']}, of {mean['full']} "
                f"({WHERE.en})",
                f"论文算法 {mean['paper']}，本库 {mean['balanced']}，未量化 {mean['full']}"
                f"（{WHERE.zh}）",
            ),
            experiment.SHARE,
            [regained(run, "paper") for run in runs],
            0.994,
        ),
    ]


def draw(figure: Figure, values: Values) -> None:
    """Losses of the draws, a panel a setting, with the schemes as lines."""
    from benchmarks.paper import pictures

    settings = settings_of(values)
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    lines = (
        ("full", pictures.INK, ":"),
        ("nearest", pictures.RED, "-"),
        ("paper", pictures.GREEN, "-"),
        ("balanced", pictures.BLUE, "--"),
    )
    for axes, (kind, bits) in zip(panels, settings, strict=True):
        runs = [run for run in values["runs"] if (run["network"], run["bits"]) == (kind, bits)]
        first = runs[0]
        pictures.prepare(
            axes, f"{kind}, {bits} bits, seed {first['seed']}", "test accuracy, %", "draws"
        )
        axes.hist(first["stochastic_accuracies"], bins=20, color=pictures.SKY)
        for scheme, color, style in lines:
            at = first["scores"][scheme]["accuracy"]
            axes.axvline(at, color=color, linestyle=style, label=TITLES[scheme].en)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(lines), frameon=False)


EXPERIMENT = Experiment(
    "schemes", Text("table 1", "表 1"), measure, tables, claims, draw, size=(10.0, 3.6)
)
