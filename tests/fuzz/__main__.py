"""python -m tests.fuzz: random cases into the native ops and the driver, or one case again."""

from __future__ import annotations

import argparse
import collections
import json
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import common
from tests.fuzz import harness

DRIVER_SHARE = 10  # one case of the driver in so many: each takes as long as some of the ops


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="of both targets together")
    parser.add_argument("--seed", type=int, help="of the first batch; random without it")
    parser.add_argument("--target", choices=harness.TARGETS, help="both without it")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="where counts go")
    parser.add_argument(
        "--replay", metavar="CASE", help="run this one case, as a failure prints it"
    )
    return parser


def _batches(cases: int, target: str | None) -> Iterator[tuple[str, int]]:
    """Targets and how many cases of each, a child at a time."""
    of_driver = cases // DRIVER_SHARE
    parts = {"ops": cases - of_driver, "driver": of_driver}
    for name, count in parts.items() if target is None else [(target, cases)]:
        for begin in range(0, count, harness.BATCH):
            yield name, min(harness.BATCH, count - begin)


def main() -> int:
    options = _parser().parse_args()
    if options.replay is not None:
        if options.target is None:
            sys.exit("python -m tests.fuzz: --replay needs --target")
        outcome = harness.replay(options.target, [json.loads(options.replay)])
        print(*outcome.failures or [f"ended as it should: {dict(outcome.counts)}"], sep="\n")
        return bool(outcome.failures)
    facts = common.machine_facts(torch.device("cpu"))
    seed = random.randrange(2**32) if options.seed is None else options.seed
    print(f"fuzzing {options.cases} cases, seed {seed}", flush=True)
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    failures: list[harness.Failure] = []
    started = time.perf_counter()
    for number, (target, count) in enumerate(_batches(options.cases, options.target)):
        outcome = harness.run_batch(target, seed + number, count)
        counts[target] += outcome.counts
        for failure in outcome.failures:
            print(f"{target}: {failure}", flush=True)
        failures += outcome.failures
        if len(failures) >= harness.MOST_FAILURES:
            print("too many failures: stopped")
            break
    for target, ended in counts.items():
        print(f"{target}: {sum(ended.values())} cases, {dict(ended)}")
    seconds = time.perf_counter() - started
    print(f"{len(failures)} failures in {seconds:.0f} s, seed {seed}")
    if options.output is not None:
        found = {"seed": seed, "seconds": seconds, "cases": counts}
        found |= {"failures": list(map(str, failures))}
        common.write_json(options.output, {"machine": facts, "results": found})
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
