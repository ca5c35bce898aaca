"""A function in a fresh interpreter: its result, its seconds and a peak of memory that is its own.

The function is named "module:function" and called with a Meter and keyword arguments that JSON can
hold. It loads what it needs, does the measured part inside ``with meter:``, and returns what JSON
can hold.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adaround_ext.process.memory import host_memory
from adaround_ext.report.model import ModelReport
from benchmarks import common


class Meter:
    """Seconds of what runs inside ``with meter:``, and bytes of memory: before, and at the peak.

    Before it, what loading freed goes back to the system, so that it is not reused unseen.
    """

    def __init__(self) -> None:
        self.seconds, self.before, self.peak = 0.0, 0, 0

    def __enter__(self) -> None:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # the C library may not be GNU's
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):  # else the peak is that since the process began
            Path("/proc/self/clear_refs").write_text("5")
        self.before, _ = host_memory()
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begin
        self.peak = host_memory()[1]


@dataclass(frozen=True)
class Run:
    """What a function returned, and what its meter says."""

    result: Any
    seconds: float
    before: int
    peak: int

    @property
    def peak_mb(self) -> float:
        """1e6 bytes of host memory above those before."""
        return (self.peak - self.before) / 1e6


def run(function: str, **arguments: Any) -> Run:
    """Calls "module:function" in a fresh interpreter; what it prints goes to stderr.

    RuntimeError where it fails, its own error is on stderr.
    """
    command = [sys.executable, "-m", "benchmarks.model.measured", function, json.dumps(arguments)]
    done = subprocess.run(command, cwd=common.FOLDER.parent, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{function} must succeed, got exit status {done.returncode}")
    return Run(**json.loads(done.stdout))


def call(function: str, arguments: dict[str, Any]) -> Run:
    """The same in this process."""
    module, name = function.split(":")
    meter = Meter()
    result = getattr(importlib.import_module(module), name)(meter, **arguments)
    return Run(result, meter.seconds, meter.before, meter.peak)


def summary(report: ModelReport) -> dict[str, Any]:
    """What the examples tell of a whole model's report, as plain values."""
    return {
        "layers": len(report.layers),
        "average_bits": report.average_bits,
        "passes": report.passes,
        "relative_error": report.relative_error,
        "nearest_error": report.nearest_error,
        "seconds_by_part": report.seconds,
        "memory": report.memory,
        "notes": report.notes,
    }


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        finished = call(sys.argv[1], json.loads(sys.argv[2]))
    print(json.dumps(asdict(finished)))
