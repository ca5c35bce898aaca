"""Command line: python -m benchmarks [BENCH] [--quick] [--output FILE] ..."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.common import Options
from benchmarks.layer import layer as bench_layer
from benchmarks.layer import memory as bench_memory
from benchmarks.layer import tuning as bench_tuning
from benchmarks.model import leaks as bench_leaks
from benchmarks.ops import loop as bench_loop
from benchmarks.ops import ops as bench_ops
from benchmarks.ops import packed as bench_packed
from benchmarks.ops import search as bench_search
from benchmarks.quality import layers as quality_layers
from benchmarks.quality import methods as quality_methods
from benchmarks.quality import quality as bench_quality
from benchmarks.workloads import shapes as workloads

_BENCHES = {
    "ops": bench_ops.run,
    "packed": bench_packed.run,
    "layer": bench_layer.run,
    "loop": bench_loop.run,
    "search": bench_search.run,
    "memory": bench_memory.run,
    "leaks": bench_leaks.run,
    "tuning": bench_tuning.run,
    "quality": bench_quality.run,
}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("bench", nargs="?", default="all", choices=[*_BENCHES, "all"])
    parser.add_argument("--quick", action="store_true", help="fewer sizes and samples, no results")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default benchmarks/results/<machine>/<bench>.json"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--reference-steps",
        type=int,
        help="steps of the reference that are run, its time extrapolated to 10,000; default 10,000 "
        "(50 with --quick and for convolutions)",
    )
    parser.add_argument(
        "--shapes", nargs="+", default=[], choices=workloads.NAMES, help="layers of bench layer"
    )
    quality = parser.add_argument_group("bench quality")
    quality.add_argument("--bits", nargs="+", type=int, default=[], choices=range(2, 9))
    quality.add_argument("--parts", nargs="+", default=[], choices=bench_quality.PARTS)
    quality.add_argument(
        "--blocks", nargs="+", type=int, default=[], choices=range(quality_layers.BLOCKS)
    )
    quality.add_argument("--methods", nargs="+", default=[], choices=quality_methods.METHODS)
    quality.add_argument(
        "--reference-rows",
        type=int,
        default=48,
        help="rows of a layer for which the reference is run; default 48",
    )
    quality.add_argument(
        "--peers",
        type=Path,
        metavar="FOLDER",
        help="also run other packages, each installed by pip into an environment in this folder",
    )
    quality.add_argument("--plot", type=Path, help="picture of error over time, SVG or PNG")
    return parser.parse_args()


def main() -> None:
    arguments = _parse()
    steps = common.QUICK_REFERENCE_STEPS if arguments.quick else common.REFERENCE_STEPS
    options = Options(
        torch.device(arguments.device),
        arguments.quick,
        arguments.reference_steps or steps,
        tuple(arguments.shapes),
        tuple(arguments.bits),
        tuple(arguments.parts),
        tuple(arguments.blocks),
        tuple(arguments.methods),
        arguments.reference_rows,
        arguments.peers,
    )
    names = list(_BENCHES) if arguments.bench == "all" else [arguments.bench]
    documents = {}
    for name in names:
        begin = time.perf_counter()
        facts = common.machine_facts(options.device)
        results, targets = _BENCHES[name](options)
        common.print_targets(targets)
        documents[name] = common.document(name, options, facts, results, targets)
        documents[name]["seconds"] = time.perf_counter() - begin
        common.note(f"{name}: {documents[name]['seconds']:.0f} s")
        if not arguments.quick and arguments.output is None:
            folder = common.FOLDER / "results" / common.machine_name(options.device)
            common.write_json(folder / f"{name}.json", documents[name])
    if arguments.output is not None:
        values = documents if arguments.bench == "all" else documents[arguments.bench]
        common.write_json(arguments.output, values)
    if arguments.plot is not None and "quality" in documents:
        from benchmarks.quality import plot as quality_plot  # matplotlib is needed for nothing else

        quality_plot.draw(documents["quality"], arguments.plot)


if __name__ == "__main__":
    main()
