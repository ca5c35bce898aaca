"""Ways to quantize a network, compared on the same networks: tables, claims and a picture."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from benchmarks import common
from benchmarks.paper.experiment import FULL, NOT_QUANTIZED, Claim, Table, Text, Values, pm
from benchmarks.paper.workload import Images, Score, in_parts, network, test_images
from benchmarks.workloads import digits

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


class Setting(NamedTuple):
    """What is quantized: all layers of a network, or its first one alone."""

    network: digits.Kind
    bits: int
    part: str = "all layers"

    @property
    def title(self) -> Text:
        part_zh = {"all layers": "全部层", "first layer": "首层"}[self.part]
        return Text(
            f"{self.network}, {self.bits} bits, {self.part}",
            f"{self.network}，{self.bits} 位，{part_zh}",
        )


# Quantizes the network, which has its batch norms folded, in place; a dictionary of plain values
# joins the scores.
Way = Callable[[nn.Module, Setting, int], dict[str, Any] | None]


# Of AdaRoundConfig: the annealing alone, on the damped Gram matrix, and no search after it.
ANNEALING: dict[str, Any] = {"starts": ("adaround",), "refine": False, "bias": "keep"}


class NetworkScorer:
    """Scores quantized copies of a network on the same images."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, data: Images) -> None:
        self.data = data
        self.logits = in_parts(model, data.images)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Score:
        return Score.of(in_parts(model, self.data.images), self.logits, self.data.labels)


def compare(
    name: str,
    ways: Mapping[str, Way],
    settings: Sequence[Setting],
    seeds: int,
    *,
    shifts: int = 1,
    epochs: int | None = None,
) -> list[dict[str, Any]]:
    """A run for every setting and network, with the scores of every way; seconds of the processor.

    shifts: how far test images are moved; epochs: of the training, None for the usual.
    """
    data = test_images(shifts)
    runs = []
    for setting in settings:
        for seed in range(seeds):
            model = network(setting.network, seed, epochs)
            score = NetworkScorer(model, data)
            scores = {"full": asdict(score(model))}
            for scheme, way in ways.items():
                quantized = copy.deepcopy(model)
                started = time.process_time()
                extra = way(quantized, setting, seed) or {}
                seconds = time.process_time() - started
                scores[scheme] = asdict(score(quantized)) | {"cpu_seconds": seconds} | extra
                common.note(
                    f"{name}: {setting.title.en}, seed {seed}, {scheme}: "
                    f"{scores[scheme]['accuracy']:.2f} %, error {scores[scheme]['error']:.3g}, "
                    f"{seconds:.1f} s"
                )
            runs.append(setting._asdict() | {"seed": seed, "scores": scores})
    return runs


def usual(
    name: str, ways: Mapping[str, Way], settings: Sequence[Setting], quick: bool
) -> list[dict[str, Any]]:
    """:func:`compare` at the sizes that most experiments have."""
    if quick:
        return compare(name, ways, settings[:1], 2, shifts=0)
    return compare(name, ways, settings, 3)


def settings_of(values: Values) -> list[Setting]:
    return list(dict.fromkeys(_setting(run) for run in values["runs"]))


def _setting(run: Mapping[str, Any]) -> Setting:
    return Setting(run["network"], run["bits"], run["part"])


def of(values: Values, setting: Setting, scheme: str, name: str) -> list[float]:
    """One number of a scheme, a seed after the other."""
    return [run["scores"][scheme][name] for run in values["runs"] if _setting(run) == setting]


def saved(values: Values, better: str, worse: str, part: str | None = None) -> list[float]:
    """The share of the logits' error of ``worse`` that ``better`` has not, a run each."""
    return [
        1 - run["scores"][better]["error"] / run["scores"][worse]["error"]
        for run in values["runs"]
        if part in (None, run["part"])
    ]


def table(
    name: str, title: str, titles: Mapping[str, Text], paper: Mapping[str, str], values: Values
) -> Table:
    """A row a scheme: the paper's accuracy, then accuracy and logits' error in every setting.

    The first row is the network that is not quantized.
    """
    settings = settings_of(values)
    header = [Text("", ""), Text("paper: ResNet18, 4 bits, %", "论文：ResNet18，4 位，%")]
    for setting in settings:
        en, zh = setting.title
        header += [Text(f"{en}: %", f"{zh}：%"), Text("logits' error", "logits 误差")]
    rows: list[list[Text | str]] = []
    titles = {"full": NOT_QUANTIZED, **titles}
    paper = {"full": f"{FULL}", **paper}
    for scheme, words in titles.items():
        rows.append([words, paper.get(scheme, "-"), *cells(values, settings, scheme)])
    return Table(name, title, header, rows)


def cells(values: Values, settings: Sequence[Setting], scheme: str) -> list[str]:
    """Accuracy and logits' error in every setting."""
    texts = []
    for setting in settings:
        texts.append(pm(of(values, setting, scheme, "accuracy")))
        texts.append(short(of(values, setting, scheme, "error")))
    return texts


def short(values: Sequence[float]) -> str:
    """Mean ± standard error, as far as its second digit counts."""
    mean, error = common.mean_and_error(values)
    digits = 0 if error == 0 else max(0, 1 - int(f"{error:e}".split("e")[1]))
    return f"{mean:.3g}" if error == 0 else f"{mean:.{digits}f} ± {error:.{digits}f}"


def claim(
    values: Values,
    paper: Text,
    better: str,
    worse: str,
    expected: float,
    part: str | None = None,
) -> Claim:
    """That one scheme leaves less error than another.

    expected: the share of the accuracy lost by ``worse`` that ``better`` regains in the paper.
    """
    en, zh = [], []
    for setting in settings_of(values):
        if part in (None, setting.part):
            pair = [statistics.fmean(of(values, setting, s, "error")) for s in (better, worse)]
            both = [statistics.fmean(of(values, setting, s, "accuracy")) for s in (better, worse)]
            numbers = f"{pair[0]:.3g} ({both[0]:.2f} %)", f"{pair[1]:.3g} ({both[1]:.2f} %)"
            en.append(f"{setting.title.en}: error {numbers[0]} against {numbers[1]}")
            zh.append(f"{setting.title.zh}：误差 {numbers[0]}，对比 {numbers[1]}")
    measure = Text(
        "share of the logits' error that it saves, networks in turn",
        "logits 误差减少的比例，各网络依次列出",
    )
    here = Text("; ".join(en), "；".join(zh))
    return Claim(paper, here, measure, saved(values, better, worse, part), expected)


def plain(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, as numbers that people write."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def draw(
    figure: Figure, values: Values, titles: Mapping[str, Text], colors: Mapping[str, str]
) -> None:
    """The logits' error of every scheme, a panel a setting: dots are networks, lines their mean."""
    from benchmarks.paper import pictures

    settings = settings_of(values)
    names = list(titles)
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    for number, (axes, setting) in enumerate(zip(panels, settings, strict=True)):
        pictures.prepare(axes, setting.title.en, "relative error of the logits", "")
        axes.set_xscale("log")
        plain(axes.xaxis)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), [titles[n].en if number == 0 else "" for n in names])
        for i, scheme in enumerate(names):
            errors = of(values, setting, scheme, "error")
            color = colors.get(scheme, pictures.BLUE)
            axes.plot(errors, [i] * len(errors), "o", color=color, alpha=0.6, markersize=5)
            axes.plot([statistics.fmean(errors)] * 2, [i - 0.3, i + 0.3], color=color, linewidth=2)
