"""Text to calibrate an encoder with: prose of its own kind, program source, shuffled words.

Figure 4 again, with MiniLM: its first two blocks at 3 bits, a scale a channel, by the preset
"fast". The error is mean 1 - cosine of held-out prose's embeddings to the full-precision model's.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import math
import statistics
import tarfile
import typing
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, quantize_
from adaround_ext.grid import make_grid, nearest_codes
from adaround_ext.ops import dequantize
from benchmarks import common
from benchmarks.paper.comparison import plain, short
from benchmarks.paper.encoder_layers import Batches, drawn, everything
from benchmarks.paper.experiment import (
    Cell,
    Claim,
    Experiment,
    Table,
    Text,
    Values,
    papers_logarithms,
)
from benchmarks.quality import model as quality_model
from benchmarks.workloads import minilm

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

MODULES = (argparse, inspect, tarfile, typing)  # of the standard library; they differ by version
BLOCKS, BITS, LENGTH = 2, 3, 32
PREFIXES = tuple(f"encoder.layer.{block}." for block in range(BLOCKS))
COUNTS = (32, 128)
WORDS = {
    "prose": Text("English prose", "英文散文"),
    "source": Text("Python source", "Python 源代码"),
    "shuffled": Text("the prose, its tokens shuffled", "散文，词元打乱"),
}


def measure(quick: bool) -> Values:
    draws, sequences = (1, 64) if quick else (3, 192)
    counts = COUNTS[:1] if quick else COUNTS
    model, tokenizer = minilm.load_encoder()
    held_out = minilm.text_batches(tokenizer, "held_out", sequences=sequences)
    exact = quality_model.embeddings(model, held_out)

    def distance(quantized: nn.Module) -> float:
        return quality_model.distance(quality_model.embeddings(quantized, held_out), exact)

    texts = {
        "prose": everything(tokenizer),
        "source": source(tokenizer),
        "shuffled": shuffled(everything(tokenizer)),
    }
    runs = []
    for draw in range(draws):
        for kind, windows in texts.items():
            for count in counts:
                error = distance(calibrated(model, drawn(windows, count, draw)))
                common.note(f"texts: {count} of {kind}, draw {draw}: {error:.3g}")
                runs.append({"kind": kind, "count": count, "draw": draw, "distance": error})
    return {"counts": list(counts), "nearest": distance(nearest(model)), "runs": runs}


def source(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Windows of program source, as those of prose: [windows, 32]."""
    lines = [line for module in MODULES for line in inspect.getsource(module).splitlines()]
    encoded = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor([token for ids in encoded for token in ids])
    inner = LENGTH - 2
    windows = tokens[: len(tokens) // inner * inner].view(-1, inner)
    first = tokens.new_full((len(windows), 1), tokenizer.cls_token_id)
    last = tokens.new_full((len(windows), 1), tokenizer.sep_token_id)
    return torch.cat([first, windows, last], dim=1)


def shuffled(windows: Tensor) -> Tensor:
    """The same tokens in another order over all windows, but for the first and last of each."""
    inner = windows[:, 1:-1]
    order = torch.randperm(inner.numel(), generator=torch.Generator().manual_seed(0))
    return torch.cat([windows[:, :1], inner.flatten()[order].view_as(inner), windows[:, -1:]], 1)


def calibrated(model: nn.Module, batches: Batches) -> nn.Module:
    quantized = copy.deepcopy(model)
    quantize_(
        quantized, batches, filter_fn=lambda _, name: name.startswith(PREFIXES), bits=BITS,
        preset="fast", progress=False,
    )  # fmt: skip
    return quantized


@torch.no_grad()
def nearest(model: nn.Module) -> nn.Module:
    """On the grid of least squared weight error."""
    quantized = copy.deepcopy(model)
    for block in range(BLOCKS):
        for layer in minilm.block_layers(quantized, block).values():
            grid = make_grid(layer.weight, AdaRoundConfig(bits=BITS, scale="mse"))
            codes = nearest_codes(layer.weight, grid)
            layer.weight.copy_(dequantize(codes, grid.scale, grid.zero_point))
    return quantized


def distances(values: Values, kind: str, count: int) -> list[float]:
    """A draw after the other."""
    return [
        run["distance"] for run in values["runs"] if (run["kind"], run["count"]) == (kind, count)
    ]


def tables(values: Values) -> list[Table]:
    counts = values["counts"]
    header = [Text("calibrated with", "校准文本")]
    header += [Text(f"{n} sequences", f"{n} 个序列") for n in counts]
    rows: list[list[Cell]] = [
        [words, *(short(distances(values, kind, n)) for n in counts)]
        for kind, words in WORDS.items()
    ]
    rows.append([Text("none: nearest", "无：四舍五入"), *(values["nearest"] for _ in counts)])
    title = "MiniLM's first two blocks at 3 bits: mean 1 - cosine of held-out prose's embeddings"
    return [Table(EXPERIMENT.name, title, header, rows)]


def claims(values: Values) -> list[Claim]:
    most = max(values["counts"])
    nearest, prose = values["nearest"], distances(values, "prose", most)
    others = distances(values, "source", most)

    numbers = [statistics.fmean(shares) for shares in (others, prose)]
    return [
        Claim(
            Text(
                "Data of another kind do nearly as well: 68.51 % (Pascal VOC), 68.71 % with its "
                "own (read off the figure)",
                "其他类型的数据几乎一样好：68.51 %（Pascal VOC），自己的数据 68.71 %（由图读出）",
            ),
            Text(
                f"distance {numbers[0]:.3g} with Python source, {numbers[1]:.3g} with prose, "
                f"nearest {nearest:.3g}",
                f"距离：Python 源代码 {numbers[0]:.3g}，散文 {numbers[1]:.3g}，"
                f"四舍五入 {nearest:.3g}",
            ),
            Text(
                "share of nearest's loss that is saved, in logarithms, over that with its own "
                "text; draws in turn",
                "相对四舍五入减少的损失（取对数）与用自有文本时之比；各次抽样依次列出",
            ),
            [
                math.log(nearest / other) / math.log(nearest / same)
                for other, same in zip(others, prose, strict=True)
            ],
            papers_logarithms(68.51),
        )
    ]


def draw(figure: Figure, values: Values) -> None:
    from benchmarks.paper import pictures

    axes = figure.subplots()
    title = f"MiniLM, {BLOCKS} blocks, {BITS} bits"
    pictures.prepare(axes, title, "mean 1 - cosine of embeddings of held-out prose", "")
    axes.set_xscale("log")
    plain(axes.xaxis)
    named = [(kind, count) for kind in WORDS for count in values["counts"]]
    for i, (kind, count) in enumerate(named):
        shares = distances(values, kind, count)
        axes.plot(shares, [i] * len(shares), "o", color=pictures.BLUE, alpha=0.6)
    axes.axvline(values["nearest"], color=pictures.RED, label="nearest")
    axes.set_yticks(range(len(named)), [f"{WORDS[kind].en}, {n} sequences" for kind, n in named])
    axes.invert_yaxis()
    axes.legend(frameon=False)


EXPERIMENT = Experiment(
    "texts", Text("figure 4", "图 4"), measure, tables, claims, draw, size=(7.0, 3.2)
)
