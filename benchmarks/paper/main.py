"""Runs experiments, and puts what they find into files, pictures and documents."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import benchmarks.paper
from benchmarks import common
from benchmarks.paper import pages
from benchmarks.paper.catalogue import EXPERIMENTS
from benchmarks.paper.experiment import Experiment, Values, claims_table

RESULTS = common.FOLDER / "results" / "cpu-2core" / "method"  # those that the documents show


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks paper",
        description=benchmarks.paper.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="small sizes; only shows the tables")
    parser.add_argument("--tables", action="store_true", help="from the results; measures nothing")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="results and pictures there")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in EXPERIMENTS]
    if unknown:
        parser.error(f"no experiment {', '.join(unknown)}: there are {', '.join(EXPERIMENTS)}")
    if options.tables and options.quick:
        parser.error("--tables measures nothing: leave out --quick")
    chosen = [EXPERIMENTS[name] for name in dict.fromkeys(options.names or EXPERIMENTS)]
    if options.tables:
        folder = options.output or RESULTS
        missing = [name for name in options.names if not (folder / f"{name}.json").exists()]
        if missing or not any((folder / f"{one.name}.json").exists() for one in chosen):
            parser.error(f"{folder} has no results of {', '.join(missing) or 'any experiment'}")
        publish(chosen, options.output)
        return
    if options.output is not None:
        try:  # now, not after the first experiment
            options.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--output: {error}")
        if not os.access(options.output, os.W_OK):
            parser.error(f"--output: {options.output} cannot be written to")
    command = shlex.join(["python", "-m", "benchmarks", "paper", *arguments])
    torch.set_num_threads(1)  # the same numbers on every machine of a kind
    results = {}
    for experiment in chosen:
        document = measured(experiment, options.quick) | {"command": command}
        results[experiment.name] = document["results"]
        folder = options.output or (None if options.quick else RESULTS)
        if folder is not None:
            common.write_json(folder / f"{experiment.name}.json", document)
        for table in experiment.tables(document["results"]):
            pages.show(table)
    pages.show(claims_table([(e, claim) for e in chosen for claim in e.claims(results[e.name])]))
    if options.output is not None or not options.quick:
        publish(chosen, options.output)


def measured(experiment: Experiment, quick: bool) -> Values:
    """The experiment's results with all that a reader needs to judge them."""
    common.note(f"{experiment.name}: {experiment.source.en}")
    facts = common.machine_facts(torch.device("cpu"))
    started, cpu_started = time.perf_counter(), time.process_time()
    values = experiment.measure(quick)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    common.note(f"{experiment.name}: {seconds:.0f} s, {cpu_seconds:.0f} s of the processor")
    settings = common.Options(torch.device("cpu"), quick)
    document = common.document(f"method {experiment.name}", settings, facts, values, [])
    del document["targets"]
    return document | {"seconds": seconds, "cpu_seconds": cpu_seconds}


def publish(chosen: Sequence[Experiment], output: Path | None) -> None:
    """Pictures of the chosen; without ``output`` also tables, and the claims of all there are."""
    from benchmarks.paper import pictures

    folder = output or RESULTS
    results = {name: read(folder / f"{name}.json") for name in EXPERIMENTS}
    tables, claims = [], []
    for name, values in results.items():
        experiment = EXPERIMENTS[name]
        if values is None:
            if experiment in chosen:
                common.note(f"{folder} has no results of {name}")
            continue
        claims += [(experiment, claim) for claim in experiment.claims(values)]
        if experiment in chosen:
            pictures.save(
                experiment, values, (output or pages.DOCS / "images") / f"method_{name}.svg"
            )
            tables += experiment.tables(values)
    if output is None:
        pages.write([*tables, claims_table(claims)], pages.DOCS)


def read(path: Path) -> Values | None:
    if not path.exists():
        return None
    results: Values = json.loads(path.read_text())["results"]
    return results
