"""Calibration by number and kind of images, the network's own or others: the paper's figure 4."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING

from torch import nn

from adaround_ext import AdaRoundConfig, quantize_
from benchmarks.model import reference_model
from benchmarks.paper import comparison
from benchmarks.paper.calibration_data import DOMAINS, own
from benchmarks.paper.comparison import Setting, Way
from benchmarks.paper.experiment import (
    NOT_QUANTIZED,
    Claim,
    Experiment,
    Table,
    Text,
    Values,
    papers_logarithms,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS = (Setting("separable", 3),)
COUNTS = (16, 128, 1024)
WORDS = {
    "own": Text("digits, the network's own", "数字，网络自己的数据"),
    "inverted": Text("inverted digits", "反色的数字"),
    "textures": Text("smooth random images", "平滑随机图像"),
    "noise": Text("independent uniform pixels", "独立均匀像素"),
}


def measure(quick: bool) -> Values:
    seeds, shifts = (1, 0) if quick else (3, 1)
    counts = (16, 128) if quick else COUNTS
    ways: dict[str, Way] = {"nearest": nearest_}
    for domain in DOMAINS:
        for count in counts:
            ways[scheme(domain, count)] = calibrated(domain, count)
    runs = comparison.compare("data", ways, SETTINGS, seeds, shifts=shifts)
    return {"counts": list(counts), "domains": list(DOMAINS), "runs": runs}


def scheme(domain: str, count: int) -> str:
    return f"{domain} {count}"


def calibrated(domain: str, count: int) -> Way:
    """By quantize_ with its defaults on the paper's grid; the seed draws the images as well."""

    def quantize(model: nn.Module, setting: Setting, seed: int) -> None:
        quantize_(
            model, DOMAINS[domain](count, seed), bits=setting.bits, granularity="per_tensor",
            scale="mse", seed=seed, progress=False,
        )  # fmt: skip

    return quantize


def nearest_(model: nn.Module, setting: Setting, seed: int) -> None:
    config = AdaRoundConfig(bits=setting.bits, granularity="per_tensor")
    reference_model.nearest_(model, own(1, seed), config)


def tables(values: Values) -> list[Table]:
    """Accuracy and logits' error by kind and number of images."""
    settings = comparison.settings_of(values)
    header: list[Text | str] = [Text("calibrated with", "校准数据"), Text("images", "图像数")]
    for setting in settings:
        en, zh = setting.title
        header += [Text(f"{en}: %", f"{zh}：%"), Text("logits' error", "logits 误差")]
    named = [("full", NOT_QUANTIZED, "-")]
    named.append(("nearest", Text("nearest", "四舍五入"), "-"))
    for domain in values["domains"]:
        named += [(scheme(domain, n), WORDS[domain], str(n)) for n in values["counts"]]
    rows: list[list[Text | str]] = [
        [words, count, *comparison.cells(values, settings, name)] for name, words, count in named
    ]
    return [Table(EXPERIMENT.name, "Calibration images: accuracy and logits' error", header, rows)]


def share_regained(values: Values, some: str, reference: str) -> list[float]:
    """Of what ``reference`` takes off log(nearest's error), the share that ``some`` takes off."""
    shares = []
    for run in values["runs"]:
        nearest, this, whole = (
            math.log(run["scores"][name]["error"]) for name in ("nearest", some, reference)
        )
        shares.append((nearest - this) / (nearest - whole))
    return shares


def claims(values: Values) -> list[Claim]:
    most = max(values["counts"])
    few = most // 8
    whole = scheme("own", most)
    measure = Text(
        "share of nearest's loss that is saved, in logarithms, over that with the most of its own "
        "images; logits' error here, accuracy in the paper; networks in turn",
        "相对四舍五入减少的损失（取对数）与用最多自有图像时之比；此处为 logits 误差，"
        "论文为准确率；各网络依次列出",
    )
    others = values["domains"][1:]
    shares = [share_regained(values, scheme(domain, most), whole) for domain in others]

    return [
        Claim(
            Text(
                "An eighth of the images does nearly as well: 68.43 % with 256, 68.71 % with 2048 "
                "(read off the figure)",
                "八分之一的图像几乎一样好：256 张 68.43 %，2048 张 68.71 %（由图读出）",
            ),
            Text(
                "; ".join(_here(values, scheme("own", n), f"{n} digits").en for n in (few, most)),
                "；".join(_here(values, scheme("own", n), f"{n} 张数字").zh for n in (few, most)),
            ),
            measure,
            share_regained(values, scheme("own", few), whole),
            papers_logarithms(68.43),
        ),
        Claim(
            Text(
                "Images of another data set do nearly as well: 68.51 % (Pascal VOC) and 68.53 % "
                "(COCO), 68.71 % with its own (read off the figure)",
                "其他数据集的图像几乎一样好：68.51 %（Pascal VOC）、68.53 %（COCO），"
                "自己的数据 68.71 %（由图读出）",
            ),
            Text(
                "; ".join(_here(values, scheme(d, most), WORDS[d].en).en for d in others),
                "；".join(_here(values, scheme(d, most), WORDS[d].zh).zh for d in others),
            ),
            Text(f"{measure.en}; mean of the kinds", f"{measure.zh}；各类平均"),
            [statistics.fmean(kinds) for kinds in zip(*shares, strict=True)],
            papers_logarithms(68.51),
        ),
    ]


def _here(values: Values, name: str, words: str) -> Text:
    settings = comparison.settings_of(values)
    accuracies = [statistics.fmean(comparison.of(values, s, name, "accuracy")) for s in settings]
    errors = [statistics.fmean(comparison.of(values, s, name, "error")) for s in settings]
    numbers = [f"{a:.2f} % (error {e:.3g})" for a, e in zip(accuracies, errors, strict=True)]
    chinese = [f"{a:.2f} %（误差 {e:.3g}）" for a, e in zip(accuracies, errors, strict=True)]
    return Text(f"{words} {', '.join(numbers)}", f"{words} {'，'.join(chinese)}")


def draw(figure: Figure, values: Values) -> None:
    """The logits' error over the number of images, a line a kind."""
    from benchmarks.paper import pictures

    settings = comparison.settings_of(values)
    colors = (pictures.BLUE, pictures.ORANGE, pictures.GREEN, pictures.PURPLE)
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for axes, setting in zip(panels, settings, strict=True):
        pictures.prepare(axes, setting.title.en, "calibration images", "logits' error")
        axes.set(xscale="log", yscale="log", xticks=values["counts"])
        axes.set_xticklabels([str(count) for count in values["counts"]])
        axes.minorticks_off()
        comparison.plain(axes.yaxis)
        nearest = statistics.fmean(comparison.of(values, setting, "nearest", "error"))
        axes.axhline(nearest, color=pictures.RED, label="nearest")
        for domain, color in zip(values["domains"], colors, strict=True):
            means = [
                statistics.fmean(comparison.of(values, setting, scheme(domain, n), "error"))
                for n in values["counts"]
            ]
            axes.plot(values["counts"], means, "o-", color=color, label=WORDS[domain].en)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)


EXPERIMENT = Experiment("data", Text("figure 4", "图 4"), measure, tables, claims, draw)
