"""The process in which cases run: it may crash or hang, and leaves behind how far it came.

In the folder it is given: "case", the index and the JSON of the case at hand, written before the
case runs; "failures", a JSON line each; "counts", at the end, how often cases ended in what way.
"""

from __future__ import annotations

import collections
import dataclasses
import faulthandler
import importlib
import json
import resource
import sys
import traceback
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import hypothesis

from tests.emulation import EMULATED
from tests.emulation.library import load
from tests.fuzz.verdict import Wrong

MEMORY = 3 << 29  # bytes that cases may take beyond what the process has: far below 2^31 elements


def main() -> None:
    task = json.loads(sys.argv[1])
    target = importlib.import_module(task["target"])
    if EMULATED:
        load()
    warnings.simplefilter("ignore")  # of torch, about what is tried on purpose
    _limit_memory()
    recorder = _Recorder(target, Path(task["folder"]), task["seconds"])
    if task["replay"]:
        for index, case in enumerate(task["replay"][task["first"] :], task["first"]):
            recorder.run(index, target.Case(**case))
    else:
        _generate(target, recorder, task["seed"], task["count"], task["first"])
    recorder.finish()


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def _generate(target: ModuleType, recorder: _Recorder, seed: int, count: int, first: int) -> None:
    """Draws the same ``count`` cases for a seed each time, and runs those from ``first`` on."""
    drawn = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(target.cases())
    def each(case: Any) -> None:
        nonlocal drawn
        if drawn >= first:
            recorder.run(drawn, case)
        drawn += 1

    each()


class _Recorder:
    """Runs cases one by one and writes down what the parent must know if this process dies."""

    def __init__(self, target: ModuleType, folder: Path, seconds: float) -> None:
        self._target = target
        self._folder = folder
        self._seconds = seconds
        self._now = open(folder / "case", "w", buffering=1)  # noqa: SIM115  open while we live
        self._counts: collections.Counter[str] = collections.Counter()

    def run(self, index: int, case: Any) -> None:
        text = json.dumps(dataclasses.asdict(case))
        self._now.seek(0)
        self._now.truncate()
        self._now.write(f"{index}\n{text}\n")
        self._now.flush()
        # Ends the process even where a native loop never comes back to Python.
        faulthandler.dump_traceback_later(self._seconds, exit=True)
        try:
            self._counts[self._target.run(case)] += 1
        except Exception as error:
            reason = str(error) if isinstance(error, Wrong) else traceback.format_exc()
            self._fail(index, text, reason)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _fail(self, index: int, case: str, reason: str) -> None:
        self._counts["wrong"] += 1
        with open(self._folder / "failures", "a") as file:
            file.write(json.dumps({"index": index, "case": case, "reason": reason}) + "\n")

    def finish(self) -> None:
        (self._folder / "counts").write_text(json.dumps(self._counts))


if __name__ == "__main__":
    faulthandler.enable()
    main()
