"""A whole trained encoder in one call: what its quantized weights do to sentence embeddings.

All 36 Linear layers of MiniLM's encoder, calibrated with 320 sequences of 32 tokens; the mean
1 - cosine to the full-precision model's embeddings is that of other text. Rounding to nearest and
GPTQ are those of the benchmark quality: layer by layer, all inputs from the full-precision model.
The presets are quantize_'s, each run in a process of its own, whose peak of memory is counted above
the loaded model, its tokenizer and the calibration data.

    python -m examples.embeddings [--bits 4 3 2] [--methods nearest gptq fast balanced best]
        [--modes parallel sequential] [--output FILE.json] [--report FOLDER]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from adaround_ext import quantize_
from benchmarks import common
from benchmarks.common import Options, Target
from benchmarks.model import measured
from benchmarks.quality import layers as quality_layers
from benchmarks.quality import methods as quality_methods
from benchmarks.quality import model as quality_model
from benchmarks.quality.methods import Rounding
from benchmarks.workloads import minilm

BITS = (4, 3, 2)
METHODS = quality_model.METHODS
BASELINES = ("nearest", "gptq")
MODES = ("parallel", "sequential")
SEQUENCES = 320  # of 32 tokens, for calibration and for the distance
EVERY_BLOCK = list(range(quality_layers.BLOCKS))
Row = dict[str, Any]


def baselines(
    bits: Sequence[int], methods: Sequence[str], blocks: Sequence[int], sequences: int
) -> list[Row]:
    """A row for every (bits, method); seconds are the sum over layers, statistics included."""
    model, tokenizer = minilm.load_encoder()
    calibration = minilm.text_batches(tokenizer, "calibration", sequences=sequences)
    held_out = minilm.text_batches(tokenizer, "held_out", sequences=sequences)
    roundings: dict[tuple[int, str], dict[str, Rounding]] = {}
    # Of the held-out text only embeddings are wanted here, so its moments may be of little.
    for subject in quality_layers.transformer(model, calibration, held_out[:1], tuple(blocks)):
        if not roundings:
            quality_methods.round_layer(subject, bits[0], "channel", ("gptq",), True)  # warms up
        for b in bits:
            rounded = quality_methods.round_layer(subject, b, "channel", tuple(methods), True)
            for method, rounding in rounded.items():
                roundings.setdefault((b, method), {})[subject.name] = rounding
    rows = quality_model.measure(model, {"distance": held_out}, roundings)
    for row in rows:
        layers = roundings[row["bits"], row["method"]].values()
        row |= {"mode": None, "seconds": sum(layer.seconds for layer in layers)}
    return rows


def quantized(
    meter: measured.Meter,
    *,
    bits: int,
    method: Literal["fast", "balanced", "best"],
    mode: Literal["sequential", "parallel"],
    blocks: Sequence[int],
    sequences: int,
    folder: str | None,
) -> Row:
    """The encoder by quantize_; its report goes into ``folder``. For a process of its own."""
    model, tokenizer = minilm.load_encoder()
    calibration = minilm.text_batches(tokenizer, "calibration", sequences=sequences)
    held_out = minilm.text_batches(tokenizer, "held_out", sequences=sequences)
    prefixes = tuple(f"encoder.layer.{block}." for block in blocks)
    with torch.no_grad():
        model(**calibration[0])
    with meter:
        report = quantize_(
            model,
            calibration,
            mode=mode,
            filter_fn=lambda _, name: name.startswith(prefixes),
            progress=sys.stderr.isatty(),
            bits=bits,
            preset=method,
        )
    exact, _ = minilm.load_encoder()
    both = (quality_model.embeddings(encoder, held_out) for encoder in (model, exact))
    row = {"bits": bits, "method": method, "mode": mode, "distance": quality_model.distance(*both)}
    if folder is not None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        report.save(path / f"{bits}-bits-{method}-{mode}.json")
        report.to_html(path / f"{bits}-bits-{method}-{mode}.html")
    return row | measured.summary(report)


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """The rows with each distance over GPTQ's at the same bits, where that was measured."""
    gptq = {row["bits"]: row["distance"] for row in rows if row["method"] == "gptq"}
    return [
        row | {"over_gptq": row["distance"] / gptq[row["bits"]] if row["bits"] in gptq else None}
        for row in rows
    ]


def targets(rows: Sequence[Row]) -> list[Target]:
    """What was promised of 4 bits, balanced, sequential; as far as it was measured."""
    by_run = {(row["bits"], row["method"], row["mode"]): row for row in rows}
    name = "4 bits, balanced, sequential"
    row = by_run.get((4, "balanced", "sequential"))
    if row is None:
        return []
    goals = [
        Target(f"{name}, seconds", row["seconds"], most=180),
        Target(f"{name}, peak GB above the model", row["peak_mb"] / 1e3, most=1.5),
    ]
    if row["over_gptq"] is not None:
        goals.append(Target(f"{name}, distance over GPTQ's", row["over_gptq"], most=0.7))
    parallel = by_run.get((4, "balanced", "parallel"))
    if parallel is not None:
        ratio = row["distance"] / parallel["distance"]
        goals.append(Target(f"{name}, distance over the parallel mode's", ratio, most=1.0))
    return goals


def show(rows: Sequence[Row]) -> None:
    """The rows as a table for people."""
    names = ("mode", "distance", "over_gptq", "seconds", "passes", "peak_mb")
    common.print_table(
        "Mean 1 - cosine of held-out sentence embeddings to the full-precision model's",
        ("bits, method", "mode", "distance", "over GPTQ's", "seconds", "passes", "peak MB"),
        [(f"{r['bits']} {r['method']}", *(r.get(name) for name in names)) for r in rows],
    )
    print(
        "\nPeak: of host memory, above the loaded model. nearest and gptq go layer by layer with "
        "inputs\nat hand: their seconds leave out the forward passes."
    )


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    """The baselines at all bits, then every run of quantize_, each as soon as it is there."""
    same = _settings(options)
    simple = [method for method in options.methods if method in BASELINES]
    if simple:
        yield from baselines(options.bits, simple, **same)
    folder = None if options.report is None else str(options.report.resolve())
    presets = [method for method in options.methods if method not in BASELINES]
    for bits, method, mode in product(options.bits, presets, options.modes):
        chosen = {"bits": bits, "method": method, "mode": mode, "folder": folder}
        run = measured.run("examples.embeddings:quantized", **same, **chosen)
        yield run.result | {"seconds": run.seconds, "peak_mb": run.peak_mb}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    facts = common.machine_facts(torch.device("cpu"))
    rows: list[Row] = []
    goals: list[Target] = []
    for row in rows_of(options):
        parts = (str(row[key]) for key in ("method", "mode") if row[key])
        figures = f"{row['distance']:.4g} in {row['seconds']:.1f} s"
        common.note(f"{row['bits']} bits, {', '.join(parts)}: {figures}")
        rows = with_ratios([*rows, row])
        trial = (options.blocks, options.sequences) != (EVERY_BLOCK, SEQUENCES)
        goals = [] if trial else targets(rows)
        if options.output is not None:  # after each run, as all of them take long
            plain = common.document("embeddings", Options(torch.device("cpu")), facts, rows, goals)
            common.write_json(options.output, plain | {"settings": _settings(options)})
    show(sorted(rows, key=lambda row: options.bits.index(row["bits"])))
    common.print_targets(goals)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return {"blocks": options.blocks, "sequences": options.sequences}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.embeddings", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--bits", nargs="+", type=int, default=list(BITS), choices=range(2, 9))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument(
        "--report", type=Path, metavar="FOLDER", help="for each run's report, as JSON and HTML"
    )
    trial = parser.add_argument_group("for trials, which check no targets")
    trial.add_argument("--blocks", nargs="+", type=int, default=EVERY_BLOCK, choices=EVERY_BLOCK)
    trial.add_argument("--sequences", type=int, default=SEQUENCES, metavar="N")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
