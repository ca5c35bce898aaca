"""Waits of OpenMP's threads for each other: in a loop, or asleep where the machine is busy.

At the end of a parallel region GNU's OpenMP has threads spin for milliseconds, which is fastest on
a machine that does nothing else. Beside other work a thread spins while the one that it waits for
has no core, and small regions take many times as long. The library spins far shorter when
the process has more OpenMP threads than there are cores: so one more team of them, asleep, is made
while the process has to wait for cores. What is computed stays the same.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_LOOK_INTERVAL = 0.2  # seconds
# Of the time that threads would run, what they wait for cores: above it, and again below it.
_BUSY_SHARE, _QUIET_SHARE = 0.2, 0.05
_REGION_ELEMENTS = 1 << 18  # of which torch gives all threads some
_TASKS = Path("/proc/self/task")


@contextmanager
def short_waits_when_busy() -> Iterator[None]:
    """Inside, waiting threads sleep while other processes take the cores."""
    threads = torch.get_num_threads()
    if 2 * threads - 1 <= _cores() or threads == 1 or not _TASKS.is_dir():
        yield
        return
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended,), name="adaround_ext waits", daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(ended: threading.Event) -> None:
    """Looks at how long this process waits for cores, and has a team or none."""
    team: _Team | None = None
    ran, waited = _times()
    while not ended.wait(_LOOK_INTERVAL):
        before = ran, waited
        ran, waited = _times()
        share = (waited - before[1]) / max(ran - before[0] + waited - before[1], 1)
        if team is None and share > _BUSY_SHARE:
            team = _Team()
        elif team is not None and share < _QUIET_SHARE:
            team.end()
            team = None
    if team is not None:
        team.end()


class _Team:
    """A thread with OpenMP threads of its own, all of them asleep."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sleep, name="adaround_ext team", daemon=True)
        self._thread.start()

    def _sleep(self) -> None:
        torch.zeros(_REGION_ELEMENTS).add_(1)  # makes the team
        self._ended.wait()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def _times() -> tuple[int, int]:
    """Nanoseconds that the threads of this process have run, and waited for a core."""
    ran = waited = 0
    for task in _TASKS.iterdir():
        try:
            first, second, _ = (task / "schedstat").read_text().split()
        except (OSError, ValueError):  # it has ended, or the system does not count
            continue
        ran, waited = ran + int(first), waited + int(second)
    return ran, waited


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
