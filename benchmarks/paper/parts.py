"""Ablation: what each part of the library adds to the paper's loop, and what its lack costs.

Rows of three layers of MiniLM's block 3, a scale a channel, and a whole digits network. From the
paper's loop one part after the other is added until it is the preset "balanced"; then each is left
out of that. Errors are of held-out outputs, over those of rounding to nearest on the grid of least
squared weight error, geometric means over layers.

The loop has 2000 steps of 256 tokens at Adam's 1e-2 (on the network 600 at 1e-1) instead of 10,000,
which the benchmark quality has; the Gram form has 300.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext import AdaRoundConfig, optimize_layer, quantize_, reference
from adaround_ext.grid import QuantGrid, nearest_codes
from adaround_ext.ops import dequantize
from benchmarks import common
from benchmarks.model import reference_model
from benchmarks.paper import comparison
from benchmarks.paper.comparison import Setting, Way
from benchmarks.paper.encoder_layers import subjects
from benchmarks.paper.experiment import Cell, Claim, Experiment, Table, Text, Values, pm
from benchmarks.paper.workload import calibration
from benchmarks.quality.layers import Subject
from benchmarks.quality.methods import mse_grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BITS = (4, 3, 2)
ROWS, WHOLE = 48, 384
NETWORK = Setting("separable", 2)
LOOP = reference.ReferenceConfig(steps=2000, learning_rate=1e-2, batch_size=256)
NETWORK_LOOP = reference.ReferenceConfig(steps=600, learning_rate=1e-1)
_GRAM: dict[str, Any] = {
    "starts": ("adaround",),
    "damping": 0.0,
    "refine": False,
    "scale": "mse",
    "bias": "keep",
}
_ADDED: dict[str, dict[str, Any]] = {  # None: the preset's own
    "+ damping": {"damping": None},
    "+ descent": {"refine": True, "search_steps": 0},
    "+ tabu search": {"search_steps": None},
    "+ scales": {"scale": "gram"},
    "+ bias": {"bias": "refit"},
    "+ GPTQ": {"starts": None},
}
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "- damping": {"damping": 0.0},
    "- search": {"refine": False},
    "- tabu search": {"search_steps": 0},
    "- scales": {"scale": "mse"},
    "- bias": {"bias": "keep"},
    "- GPTQ": {"starts": ("adaround",)},
    "- AdaRound": {"starts": ("gptq",)},
}


def _ladder() -> dict[str, dict[str, Any]]:
    settings, ladder = _GRAM, {"gram": _GRAM}
    for name, added in _ADDED.items():
        settings = settings | added
        ladder[name] = settings
    return ladder


SCHEMES = _ladder() | _LEFT_OUT  # what optimize_layer and quantize_ get; the last rung is balanced
TITLES = {
    "loop": Text("the paper's loop, minibatches", "论文算法，小批量"),
    "gram": Text("Gram form", "Gram 形式"),
    "+ damping": Text("+ damping", "+ 阻尼"),
    "+ descent": Text("+ coordinate descent", "+ 坐标下降"),
    "+ tabu search": Text("+ tabu search", "+ 禁忌搜索"),
    "+ scales": Text("+ scale search", "+ 缩放系数搜索"),
    "+ bias": Text("+ bias refit", "+ 偏置重拟合"),
    "+ GPTQ": Text("+ GPTQ as a second start (balanced)", "+ GPTQ 作第二起点（balanced）"),
    "- damping": Text("balanced without damping", "balanced 去掉阻尼"),
    "- search": Text("balanced without descent and tabu search", "balanced 去掉坐标下降和禁忌搜索"),
    "- tabu search": Text("balanced without tabu search", "balanced 去掉禁忌搜索"),
    "- scales": Text("balanced without scale search", "balanced 去掉缩放系数搜索"),
    "- bias": Text("balanced without bias refit", "balanced 去掉偏置重拟合"),
    "- GPTQ": Text("balanced without GPTQ", "balanced 去掉 GPTQ"),
    "- AdaRound": Text("balanced without AdaRound", "balanced 去掉 AdaRound"),
}


def measure(quick: bool) -> Values:
    bits, seeds, steps, sequences = ((3,), 1, 300, 64) if quick else (BITS, 3, LOOP.steps, 256)
    layers = [
        {"bits": b, "layer": subject.name, "draw": draw, "errors": errors(subject, b, steps)}
        for draw, subject in subjects(ROWS, draws=seeds, sequences=sequences)
        for b in bits
    ]
    _, whole = next(subjects(WHOLE, draws=1, sequences=sequences))
    ways: dict[str, Way] = {name: ours(settings) for name, settings in SCHEMES.items()}
    if not quick:
        ways = {"loop": papers} | ways
    return {
        "rows": ROWS,
        "loop_steps": steps,
        "layers": layers,
        "seconds": seconds(whole),
        "runs": comparison.compare("parts", ways, [NETWORK], seeds, shifts=0),
    }


def errors(subject: Subject, bits: int, steps: int) -> dict[str, float]:
    """Held-out relative output error by scheme; "nearest" is what the others are compared with."""
    grid = mse_grid(subject, bits, "channel")
    by_name = {"loop": subject.relative_errors(loop_weight(subject, bits, steps), None)[0]}
    nearest = nearest_codes(subject.matrix, grid)
    by_name["nearest"] = subject.relative_errors(_weight(nearest, grid), None)[0]
    for name, settings in SCHEMES.items():
        result = optimize_layer(subject.layer, subject.inputs, bits=bits, **settings)
        by_name[name] = subject.relative_errors(result.weight_q, result.bias)[0]
    common.note(f"parts: {subject.name}, {bits} bits: balanced {by_name['+ GPTQ']:.3g}")
    return by_name


def loop_weight(subject: Subject, bits: int, steps: int) -> Tensor:
    """The paper's loop on tokens, on the grid of the other methods."""
    grid = mse_grid(subject, bits, "channel")
    tokens = subject.inputs.flatten(0, -2)
    codes = reference.optimize(
        subject.matrix, grid.scale, grid.zero_point, grid.qmin, grid.qmax, tokens,
        F.linear(tokens, subject.matrix), F.linear, replace(LOOP, steps=steps),
    )  # fmt: skip
    return _weight(codes, grid)


def seconds(subject: Subject) -> dict[str, float]:
    """Of the processor for one whole layer at 4 bits; the loop's are scaled to 10,000 steps."""

    def took(call: Callable[[], object]) -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    few, many = (took(partial(loop_weight, subject, 4, steps)) for steps in (10, 110))
    by_name = {"loop": (many - few) * common.REFERENCE_STEPS / 100}
    for name, settings in SCHEMES.items():
        by_name[name] = took(
            partial(optimize_layer, subject.layer, subject.inputs, bits=4, **settings)
        )
    return by_name


def ours(settings: dict[str, Any]) -> Way:
    def quantize(model: nn.Module, setting: Setting, seed: int) -> None:
        images = calibration().images
        quantize_(model, images, bits=setting.bits, seed=seed, progress=False, **settings)

    return quantize


def papers(model: nn.Module, setting: Setting, seed: int) -> None:
    """With asymmetric inputs and ReLU, on the grid of least squared weight error."""
    config = AdaRoundConfig(bits=setting.bits)
    loop = replace(NETWORK_LOOP, seed=seed)
    reference_model.adaround_(model, calibration().images, config, loop)


def _weight(codes: Tensor, grid: QuantGrid) -> Tensor:
    return dequantize(codes, grid.scale, grid.zero_point)


def ratios(values: Values, bits: int, scheme: str) -> list[float]:
    """Error over nearest's, geometric mean over layers, a draw of calibration text each."""
    by_draw: dict[int, list[float]] = {}
    for run in values["layers"]:
        if run["bits"] == bits:
            ratio = run["errors"][scheme] / run["errors"]["nearest"]
            by_draw.setdefault(run["draw"], []).append(ratio)
    return [statistics.geometric_mean(layers) for layers in by_draw.values()]


def seconds_of(values: Values, scheme: str) -> float:
    """A whole layer's, of the loop with the steps that it had here."""
    share = values["loop_steps"] / common.REFERENCE_STEPS if scheme == "loop" else 1.0
    return float(share * values["seconds"][scheme])


def bits_of(values: Values) -> list[int]:
    return list(dict.fromkeys(run["bits"] for run in values["layers"]))


def tables(values: Values) -> list[Table]:
    bits = bits_of(values)
    settings = comparison.settings_of(values)
    header: list[Text | str] = [Text("", "")]
    header += [Text(f"error, {b} bits", f"误差，{b} 位") for b in bits]
    header.append(Text("seconds a layer", "每层秒数"))
    for setting in settings:
        en, zh = setting.title
        header += [Text(f"{en}: %", f"{zh}：%"), Text("logits' error", "logits 误差")]
    rows: list[list[Cell]] = []
    for scheme, words in TITLES.items():
        row: list[Cell] = [words, *(pm(ratios(values, b, scheme), 3) for b in bits)]
        row.append(f"{seconds_of(values, scheme):.2f}")
        measured = scheme in values["runs"][0]["scores"]
        row += comparison.cells(values, settings, scheme) if measured else [None, None]
        rows.append(row)
    title = "Parts: held-out error of MiniLM layers over nearest's, and a digits network"
    return [Table(EXPERIMENT.name, title, header, rows)]


def claims(values: Values) -> list[Claim]:
    """None: these parts are not the paper's."""
    return []


def draw(figure: Figure, values: Values) -> None:
    """Two panels: parts added to the loop one by one, and each left out of the whole."""
    from benchmarks.paper import pictures

    left_out = list(_LEFT_OUT)
    added = [name for name in TITLES if name not in left_out]
    colors = (pictures.BLUE, pictures.ORANGE, pictures.GREEN)
    left, right = figure.subplots(1, 2)
    pictures.prepare(left, "added one by one", "held-out error over nearest's", "")
    pictures.prepare(right, "left out of balanced", "held-out error over balanced's, %", "")
    for bits, color in zip(bits_of(values), colors, strict=False):
        whole = statistics.fmean(ratios(values, bits, added[-1]))
        means = [statistics.fmean(ratios(values, bits, name)) for name in added]
        left.plot(means, range(len(added)), "o-", color=color, label=f"{bits} bits")
        more = [100 * (statistics.fmean(ratios(values, bits, n)) / whole - 1) for n in left_out]
        right.plot(more, range(len(left_out)), "o", color=color)
    right.axvline(0, color=pictures.FAINT, linewidth=1)
    for axes, names in ((left, added), (right, left_out)):
        axes.set_yticks(range(len(names)), [TITLES[name].en for name in names])
        axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=3, frameon=False)


EXPERIMENT = Experiment(
    "parts", Text("not in the paper", "论文之外"), measure, tables, claims, draw, size=(11.0, 4.2)
)
