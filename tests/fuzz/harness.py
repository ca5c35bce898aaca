"""Runs batches of cases in child processes, and says of each that failed how to run it again."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGETS = {"ops": "tests.fuzz.op_run", "driver": "tests.fuzz.driver_run"}
BATCH = 500  # cases a child: little is drawn again after a crash, and few children start
CASE_SECONDS = 20.0  # a case takes milliseconds; a loaded machine is not a hang
MOST_FAILURES = 20
_START_SECONDS = 120.0
_ENVIRONMENT = {"OMP_NUM_THREADS": "1"}  # cases are small: threads would wait for each other
_ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A case that crashed, hung or ended in what is wrong."""

    kind: str  # "crash", "hang" or "wrong"
    target: str
    seed: int
    index: int
    case: str
    reason: str

    def __str__(self) -> str:
        again = shlex.join(["python", "-m", "tests.fuzz", "--target", self.target])
        return (
            f"{self.kind} in case {self.index} of seed {self.seed}: {self.reason}\n"
            f"  again: {again} --replay {shlex.quote(self.case)}"
        )


@dataclasses.dataclass
class Outcome:
    """counts: how cases ended, by the words of the target's ``run``.

    "ended" are those before a child died.
    """

    counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    failures: list[Failure] = dataclasses.field(default_factory=list)


def run_batch(
    target: str, seed: int, count: int = BATCH, case_seconds: float = CASE_SECONDS
) -> Outcome:
    """The ``count`` cases of a seed, of a target or another module with cases, Case and run."""
    return _run_all(target, {"seed": seed, "count": count, "replay": []}, case_seconds)


def replay(target: str, cases: list[dict[str, Any]], case_seconds: float = CASE_SECONDS) -> Outcome:
    """These cases, as failures print them."""
    return _run_all(target, {"seed": 0, "count": len(cases), "replay": cases}, case_seconds)


def _run_all(target: str, task: dict[str, Any], case_seconds: float) -> Outcome:
    """In one child and, after a crash or a hang, in others that go on behind it."""
    outcome = Outcome()
    first = 0
    while first < task["count"] and len(outcome.failures) < MOST_FAILURES:
        died = _run_child(target, task | {"first": first}, case_seconds, outcome)
        if died is None:
            break
        first = died + 1
    return outcome


def _run_child(
    target: str, task: dict[str, Any], case_seconds: float, outcome: Outcome
) -> int | None:
    """Adds to the outcome; returns the index of the case at which the child died, if it did."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = task | {
            "target": TARGETS.get(target, target),
            "folder": name,
            "seconds": case_seconds,
        }
        command = [sys.executable, "-m", "tests.fuzz.child", json.dumps(given)]
        most = _START_SECONDS + case_seconds * task["count"]
        try:
            child = subprocess.run(
                command,
                env=os.environ | _ENVIRONMENT,
                cwd=_ROOT,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=most,
            )
            code, text = child.returncode, child.stdout + child.stderr
        except subprocess.TimeoutExpired:
            code, text = None, ""
        failures = folder / "failures"
        for line in failures.read_text().splitlines() if failures.exists() else ():
            failure = json.loads(line)
            outcome.failures.append(Failure("wrong", target, task["seed"], **failure))
        counts = folder / "counts"
        if counts.exists():
            outcome.counts.update(json.loads(counts.read_text()))
            return None
        if not (folder / "case").exists() or not (folder / "case").read_text():
            raise RuntimeError(f"the child of {target} did not start: exit {code}\n{text}")
        index, case = (folder / "case").read_text().splitlines()
        wrong = sum(f.kind == "wrong" and f.index >= task["first"] for f in outcome.failures)
        outcome.counts.update(ended=int(index) - task["first"] - wrong, wrong=wrong)
        hung = code is None or "Timeout (" in text
        kind, how = ("hang", f"no end in {case_seconds} s") if hung else ("crash", _ending(code))
        outcome.counts[kind] += 1
        outcome.failures.append(
            Failure(kind, target, task["seed"], int(index), case, f"{how}\n{text[-2000:]}")
        )
        return int(index)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit {code}"
