"""A sleeping team of OpenMP threads is there while the process waits for cores, and only then."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adaround_ext.process import omp_waits
from adaround_ext.process.omp_waits import short_waits_when_busy
from tests.support.global_state import unchanged
from tests.support.helpers import threads

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir(), reason="needs Linux, which counts what threads wait"
)
TEAM, WATCH = "adaround_ext team", "adaround_ext waits"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(omp_waits, "_LOOK_INTERVAL", 0.005)
    monkeypatch.setattr(omp_waits, "_cores", lambda: 2)
    with threads(2):
        yield


def names() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name in (TEAM, WATCH)]


def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What follows decides on the share of the time that is waited."""
    share, clock = [0.0], [0.0, 0.0]

    def times() -> tuple[int, int]:
        clock[0] += 100 * (1 - share[0])
        clock[1] += 100 * share[0]
        return int(clock[0]), int(clock[1])

    monkeypatch.setattr(omp_waits, "_times", times)
    return share


def until(wanted: list[str]) -> bool:
    end = time.monotonic() + 10
    while sorted(names()) != sorted(wanted) and time.monotonic() < end:
        time.sleep(0.002)
    return sorted(names()) == sorted(wanted)


def test_a_team_comes_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    share = waits(monkeypatch)
    with unchanged(), short_waits_when_busy():
        assert until([WATCH])
        time.sleep(0.05)
        assert names() == [WATCH]
        for _ in range(2):
            share[0] = 0.5
            assert until([WATCH, TEAM])
            share[0] = 0.1  # neither busy nor quiet: as it was
            time.sleep(0.05)
            assert TEAM in names()
            share[0] = 0.0
            assert until([WATCH])
    assert not names()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left(error: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    waits(monkeypatch)[0] = 1.0
    with unchanged(), pytest.raises(error), short_waits_when_busy():
        assert until([WATCH, TEAM])
        raise error
    assert not names()


def test_where_it_cannot_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread has nobody to wait for; with many cores one more team is not too many threads."""
    with threads(1), short_waits_when_busy():
        assert not names()
    monkeypatch.setattr(omp_waits, "_cores", lambda: 3)
    with short_waits_when_busy():
        assert not names()


def test_what_the_system_counts() -> None:
    ran, waited = omp_waits._times()
    end = time.perf_counter() + 0.2
    while time.perf_counter() < end:
        torch.ones(1 << 12).sum()
    after = omp_waits._times()
    assert after[0] - ran + after[1] - waited > 0.05e9 and after[1] >= waited
