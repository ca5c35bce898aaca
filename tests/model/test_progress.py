"""The bar of quantize_: it is seen at every width, and does not promise what it cannot know."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from adaround_ext import quantize_
from adaround_ext.model import progress
from adaround_ext.model.progress import FittingBar
from tests.report.test_model import layer_report

LONG = "model.decoder.layers.11.self_attention.attention.query_key_value_projection.linear"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def line(bar: FittingBar) -> str:
    return str(bar)


@pytest.mark.parametrize("columns", [64, 80, 110, 200])
@pytest.mark.parametrize("name", ["fc", LONG])
def test_the_bar_is_seen_at_every_width(columns: int, name: str, clock: list[float]) -> None:
    with FittingBar([1.0] * 10, True) as bar:
        bar.dynamic_ncols = lambda _: (columns, 40)
        bar.begin([f"{name}.{i}" for i in range(40)])
        first = line(bar)
        clock[0] += 7200
        for _ in range(2):
            bar.finish(name, 1.0, layer_report(0.5, 0.25), False)
        second = line(bar)
    for text in (first, second):
        assert len(text) <= columns
        assert len(text.split("|")[1]) >= 20
    assert first.endswith("9 more") and first.startswith("  0% |")
    assert second.endswith(" 0.25") and second.startswith(" 20% |")
    assert ", 8:00:00 left  " in second
    if columns >= 110:
        assert first.endswith(f"{name[-10:]}.0 and 39 more")
        assert second.endswith(f"{name[-10:]}: 0.5 -> 0.25")


def test_a_narrow_terminal_shows_the_bar_alone(clock: list[float]) -> None:
    with FittingBar([1.0], True) as bar:
        bar.dynamic_ncols = lambda _: (30, 40)
        bar.begin([LONG])
        assert len(line(bar)) <= 30 and "linear" not in line(bar)


def test_time_is_told_when_enough_is_done(clock: list[float]) -> None:
    # As in a CNN: the first cost a ten-thousandth of the last, but passes of the model too.
    costs = [1.0, 10.0, 100.0, 1e3, 1e4, 1e4, 1e4, 1e4]
    with FittingBar(costs, True) as bar:
        assert bar.seconds_left() is None and "left" not in line(bar)
        clock[0] += 1
        bar.finish("a", costs[0], layer_report(), False)
        assert bar.seconds_left() is None and "left" not in line(bar)  # a sixteenth is done
        clock[0] += 1
        bar.finish("b", costs[1], layer_report(), False)
        left = bar.seconds_left()
        assert left is not None and 10 < left < 20  # by cost alone it would be two hours
        assert f", 00:{left:.0f} left" in line(bar) or f", 00:{int(left)} left" in line(bar)
        for cost in costs[2:]:
            bar.finish("c", cost, layer_report(), False)
        assert bar.n == 1 and bar.seconds_left() == 0 and "100% |" in line(bar)


def test_what_a_checkpoint_had_tells_nothing_about_time(clock: list[float]) -> None:
    with FittingBar([1.0] * 10, True) as bar:
        for _ in range(6):
            bar.finish("restored", 1.0, layer_report(), True)
        clock[0] += 5
        assert bar.seconds_left() is None
        bar.finish("fitted", 1.0, layer_report(), False)
        assert bar.seconds_left() == pytest.approx(15)


@pytest.mark.parametrize("costs", [[], [0.0, 0.0]])
def test_nothing_to_do_costs_nothing(costs: list[float]) -> None:
    with FittingBar(costs, True) as bar:
        assert bar.seconds_left() is None


def test_quantize_shows_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    quantize_(model, torch.randn(32, 8), preset="fast")
    shown = capsys.readouterr().err
    assert shown.rstrip().splitlines()[-1].rpartition("\r")[2].startswith("100% |")
    assert re.search(r"2: [\d.e-]+ -> [\d.e-]+", shown)
    quantize_(model, torch.randn(32, 8), preset="fast", progress=False)
    assert capsys.readouterr().err == ""
