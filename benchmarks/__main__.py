"""Benchmarks by name: python -m benchmarks [NAME] [options of NAME]."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import common
from benchmarks.common import Options
from benchmarks.quality import layers, methods, quality
from benchmarks.workloads import shapes


class Entry(NamedTuple):
    """A module of this package, and what it measures."""

    module: str
    help: str


# Each has run(Options), which returns results and targets; all take the options of this file.
SUITE = {
    "ops": Entry("ops.ops", "the ops against plain PyTorch and the memory's bandwidth"),
    "packed": Entry("ops.packed", "packing, and products with packed weights"),
    "layer": Entry("layer.layer", "optimize_layer against the paper's loop: seconds, error"),
    "loop": Entry("ops.loop", "the annealing loop: seconds a step, and where they go"),
    "search": Entry("ops.search", "gptq, refine_ and tabu_search_: seconds, bytes read"),
    "memory": Entry("layer.memory", "peak memory of a layer over the number of samples"),
    "leaks": Entry("model.leaks", "what stays behind after a thousand calls"),
    "tuning": Entry("layer.tuning", "held-out error of the neighbours of the presets' numbers"),
    "quality": Entry("quality.quality", "held-out error and seconds of every method"),
}
# Each has main(arguments) with options of its own.
OTHERS = {
    "reuse": Entry("model.reuse", "quantize_ with and without room for what blocks share"),
    "ranks": Entry("model.ranks", "quantize_ on several ranks: codes and speed"),
    "kill_and_resume": Entry("model.kill_and_resume", "codes of runs that were killed and resumed"),
    "larger_than_memory": Entry("model.larger_than_memory", "a decoder that memory cannot hold"),
    "paper": Entry("paper.main", "the paper's claims, an experiment each"),
    "aimet": Entry("peers.aimet", "exports for AIMET in AIMET itself"),
    "bandwidth_plot": Entry("ops.bandwidth_plot", "picture of what ops wrote"),
    "quality_plot": Entry("quality.plot", "picture of what quality wrote"),
}


def _listed(entries: Mapping[str, Entry]) -> str:
    return "\n".join(f"  {name:20}{entry.help}" for name, entry in entries.items())


_NAMES = f"""\
names:
{_listed(SUITE)}
  {"all":20}all of these, one after another; also without a name

names with options of their own (python -m benchmarks NAME --help):
{_listed(OTHERS)}
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        usage="%(prog)s [NAME] [options of NAME]",
        description=__doc__,
        epilog=_NAMES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", default="all", metavar="NAME", help="see below")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and samples, no results")
    parser.add_argument(
        "--output", type=Path, help="JSON file; default benchmarks/results/<machine>/<name>.json"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--reference-steps",
        type=int,
        help="steps of the reference that are run, its time extrapolated to 10,000; default 10,000 "
        "(50 with --quick and for convolutions)",
    )
    parser.add_argument(
        "--shapes", nargs="+", default=[], choices=shapes.NAMES, help="the layers of layer"
    )
    options = parser.add_argument_group("options of quality")
    options.add_argument("--bits", nargs="+", type=int, default=[], choices=range(2, 9))
    options.add_argument("--parts", nargs="+", default=[], choices=quality.PARTS)
    options.add_argument("--blocks", nargs="+", type=int, default=[], choices=range(layers.BLOCKS))
    options.add_argument("--methods", nargs="+", default=[], choices=methods.METHODS)
    options.add_argument(
        "--reference-rows",
        type=int,
        default=48,
        help="rows of a layer for which the reference is run; default 48",
    )
    options.add_argument(
        "--peers",
        type=Path,
        metavar="FOLDER",
        help="also run other packages, each installed by pip into an environment in this folder",
    )
    options.add_argument("--plot", type=Path, help="picture of error over time, SVG or PNG")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in OTHERS:
        importlib.import_module(f"benchmarks.{OTHERS[given[0]].module}").main(given[1:])
        return
    parser = _parser()
    parsed = parser.parse_args(given)
    if parsed.name in OTHERS:
        parser.error(f"the name comes first: python -m benchmarks {parsed.name} ...")
    if parsed.name not in (*SUITE, "all"):
        parser.error(f"no benchmark {parsed.name}: there are {', '.join([*SUITE, *OTHERS, 'all'])}")
    _run_suite(parsed)


def _run_suite(parsed: argparse.Namespace) -> None:
    options = _options(parsed)
    documents = {}
    for name in SUITE if parsed.name == "all" else [parsed.name]:
        begin = time.perf_counter()
        facts = common.machine_facts(options.device)
        module = importlib.import_module(f"benchmarks.{SUITE[name].module}")
        results, targets = module.run(options)
        common.print_targets(targets)
        documents[name] = common.document(name, options, facts, results, targets)
        documents[name]["seconds"] = time.perf_counter() - begin
        common.note(f"{name}: {documents[name]['seconds']:.0f} s")
        if not parsed.quick and parsed.output is None:
            folder = common.FOLDER / "results" / common.machine_name(options.device)
            common.write_json(folder / f"{name}.json", documents[name])
    if parsed.output is not None:
        values = documents if parsed.name == "all" else documents[parsed.name]
        common.write_json(parsed.output, values)
    if parsed.plot is not None and "quality" in documents:
        from benchmarks.quality import plot  # matplotlib is needed for nothing else

        plot.draw(documents["quality"], parsed.plot)


def _options(parsed: argparse.Namespace) -> Options:
    steps = common.QUICK_REFERENCE_STEPS if parsed.quick else common.REFERENCE_STEPS
    return Options(
        torch.device(parsed.device),
        parsed.quick,
        parsed.reference_steps or steps,
        tuple(parsed.shapes),
        tuple(parsed.bits),
        tuple(parsed.parts),
        tuple(parsed.blocks),
        tuple(parsed.methods),
        parsed.reference_rows,
        parsed.peers,
    )


if __name__ == "__main__":
    main()
