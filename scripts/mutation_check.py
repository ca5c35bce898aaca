"""Do the tests notice bugs? Plants those of mutants.py and cuda_mutants.py, one at a time.

Each goes into a copy of the sources, which is built with sanitizers and tested as in
``scripts/sanitize.sh``. Fails where a bug is not noticed, or where its place is not found.

    python -m scripts.mutation_check [--only TEXT ...] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks import common
from scripts.cuda_mutants import CUDA_MUTANTS
from scripts.mutants import MUTANTS, THREADS, Mutant

_ROOT = Path(__file__).parent.parent
_BUILD_FAILED = 3  # of sanitize.sh
_LIMIT = 600  # seconds: a bug may make a loop endless


@dataclass(frozen=True)
class Outcome:
    """What happened to a mutant."""

    mutant: str
    file: str
    caught_by: str | None  # a test
    how: str | None  # "assertion", "sanitizer" or "time limit"
    seconds: float


def copy_sources(target: Path) -> None:
    """All that git does not ignore, and the libraries, for what is not built anew."""
    listed = subprocess.check_output(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=_ROOT, text=True
    )
    libraries = [f"adaround_ext/{path.name}" for path in (_ROOT / "adaround_ext").glob("*.so")]
    for name in listed.splitlines() + libraries:
        if (_ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(_ROOT / name, target / name)


def sanitize(
    tree: Path, kind: str, tests: Iterable[str], limit: float | None = None
) -> tuple[int, str]:
    """Exit status, negative after ``limit`` seconds, and output of the tests in the tree."""
    command = ["scripts/sanitize.sh", kind]
    if kind != THREADS:  # one after the other, each named before it starts
        files = [str(path) for name in tests for path in tree.glob(f"tests/*/test_{name}.py")]
        command += ["-vv", "--exitfirst", "--numprocesses=0", *files]
    process = subprocess.Popen(
        command,
        cwd=tree,
        env=os.environ | {"PYTHON": sys.executable, "SANITIZERS": "address"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output = process.communicate()[0]
    finally:  # an interrupt comes to this process alone
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode == _BUILD_FAILED:
        raise RuntimeError(f"the build failed:\n{output}")
    return process.returncode, output


def tested_tree(mutants: Sequence[Mutant], tree: Path) -> None:
    """Copies, builds and tests the sources without a bug."""
    copy_sources(tree)
    for kind in sorted({mutant.kind for mutant in mutants}):
        tests = {name for m in mutants if m.kind == kind for name in m.tests.split()}
        status, output = sanitize(tree, kind, sorted(tests))
        if status != 0:
            raise RuntimeError(f"the tests fail without a bug:\n{output}")


def try_mutant(mutant: Mutant, tree: Path) -> Outcome:
    """Plants and tests one bug in a fresh tree."""
    begin = time.monotonic()
    path = tree / mutant.file
    path.write_text(mutant.planted(path.read_text()))
    status, output = sanitize(tree, mutant.kind, mutant.tests.split(), _LIMIT)
    seconds = round(time.monotonic() - begin, 1)
    if status == 0:
        return Outcome(mutant.name, mutant.file, None, None, seconds)
    # The last that started: the one that failed, or was running when the process ended.
    names = re.findall(r"tests/\w+/test_\w+\.py::\w+(?:\[[^]]*\])?", output)
    if mutant.kind == THREADS:
        names = ["tests/native/threads_test.cpp"]
    if not names:
        raise RuntimeError(f"{mutant.name!r}: the tests did not run:\n{output}")
    how = "time limit" if status < 0 else "sanitizer" if "Sanitizer" in output else "assertion"
    return Outcome(mutant.name, mutant.file, names[-1], how, seconds)


def check(mutants: Sequence[Mutant], folder: Path) -> list[Outcome]:
    """All mutants, each in a copy of the tree that is built once."""
    for mutant in mutants:  # before anything slow
        mutant.planted((_ROOT / mutant.file).read_text())
    tree, built = folder / "tree", folder / "built"
    tested_tree(mutants, tree)
    tree.rename(built)
    outcomes = []
    for mutant in mutants:
        # To where it was built, with its times: only what reads the changed file is compiled.
        shutil.copytree(built, tree)
        outcomes.append(try_mutant(mutant, tree))
        shutil.rmtree(tree)
        found = outcomes[-1]
        print(f"{found.mutant} [{found.seconds:.0f} s]", flush=True)
        print(f"    {found.how}: {found.caught_by}" if found.how else "    SURVIVED", flush=True)
    return outcomes


def main() -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=[""], help="texts in names or files of mutants"
    )
    parser.add_argument("--output", type=Path, help="where to write the outcomes as JSON")
    options = parser.parse_args()
    facts = common.machine_facts(torch.device("cpu"))
    every = MUTANTS + CUDA_MUTANTS
    chosen = [m for m in every if any(text in m.name + m.file for text in options.only)]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = check(chosen, Path(folder))
    survived = [outcome.mutant for outcome in outcomes if outcome.caught_by is None]
    print(f"{len(outcomes) - len(survived)} of {len(outcomes)} bugs were noticed")
    if options.output:
        results = [asdict(outcome) for outcome in outcomes]
        common.write_json(options.output, {"machine": facts, "results": results})
    return bool(survived)


if __name__ == "__main__":
    sys.exit(main())
