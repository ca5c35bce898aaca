"""Chart of a model's layers: error, codes moved and time, and where each stands in the drawing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import ceil, floor, inf, log10
from typing import NamedTuple

from adaround_ext.report.records import LayerEntry
from adaround_ext.report.text import as_percent, as_time, short_name, tail

MOST_NAMED = 60  # more layers than this are numbered
# In pixels: the panels from top to bottom, the room between them, the axis at their left.
_TOP, _ERROR, _BARS, _GAP, _AXIS = 22, 220, 56, 40, 58
_LETTER = 6.1  # width of a letter of a label


@dataclass(frozen=True)
class Series:
    """What a chart shows, whatever draws it; a number a layer, and 0 for what is not finite.

    Attributes:
        nearest: Relative output errors of rounding to nearest.
        final: Those of the result.
        moved: Shares of the codes that are not those of rounding to nearest.
        seconds: Each layer's, with all that were solved together.
    """

    nearest: tuple[float, ...]
    final: tuple[float, ...]
    moved: tuple[float, ...]
    seconds: tuple[float, ...]

    @property
    def span(self) -> tuple[float, float]:
        """Ends of a logarithmic axis: all errors that are not next to 0, and some room."""
        values = [value for value in (*self.nearest, *self.final) if value > 0]
        low, high = min(values, default=0.01), max(values, default=0.1)
        low = max(low, 1e-8 * high)  # what float32 makes of an error of 0 would flatten all others
        room = max(1.25, (high / low) ** 0.06)
        return low / room, high * room

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Errors with their labels, for that axis."""
        low, high = self.span
        decades = range(floor(log10(low)), ceil(log10(high)) + 1)
        if log10(high / low) < 2.2:
            steps = (1, 1.5, 2, 3, 4, 5, 7) if high < 5 * low else (1, 2, 5)
            ticks = [step * 10.0**d for d in decades for step in steps]
        else:
            ticks = [10.0**d for d in decades][:: 1 + len(decades) // 9]
        return [(tick, as_percent(tick)) for tick in ticks if low <= tick <= high]


class Band(NamedTuple):
    """A block's layers: where they begin, how wide they are, and the name, "" without room."""

    left: float
    width: float
    shaded: bool
    name: str


class Column(NamedTuple):
    """A layer: places of its errors, (top, height) of its bars, its label and all in words."""

    x: float
    nearest: float
    final: float
    bars: list[tuple[float, float]]
    label: str
    text: str


@dataclass(frozen=True)
class Drawing:
    """A chart in pixels, from the upper left corner of its layers; ``chart.html.jinja`` draws it.

    Attributes:
        axis: Width of the axis at the left.
        width: Of the layers.
        height: Of everything.
        top: Upper end of the first panel.
        bottom: Lower end of the last one.
        pitch: From a layer to the next.
        radius: Of a point.
        named: Whether every layer has its name; else a few have their numbers.
        ticks: Places and labels, of all panels.
        titles: Places and texts, of all panels but the first.
        bands: The blocks.
        columns: The layers.
    """

    axis: int
    width: float
    height: float
    top: int
    bottom: int
    pitch: float
    radius: float
    named: bool
    ticks: list[tuple[float, str]]
    titles: list[tuple[float, str]]
    bands: list[Band]
    columns: list[Column]


def series_of(layers: Sequence[LayerEntry]) -> Series:
    """The numbers that a chart of these layers shows."""
    reports = [entry.report for entry in layers]
    errors = [report.relative for report in reports]
    return Series(
        nearest=tuple(_finite(error["nearest"]) for error in errors),
        final=tuple(_finite(error["final"]) for error in errors),
        moved=tuple(_finite(report.flipped) for report in reports),
        seconds=tuple(_finite(report.seconds.get("total", 0.0)) for report in reports),
    )


def drawing_of(layers: Sequence[LayerEntry]) -> Drawing:
    """The chart of at least one layer, every number in its place."""
    series = series_of(layers)
    span = series.span
    pitch = min(28.0, max(3.0, 900 / len(layers)))
    named = len(layers) <= MOST_NAMED
    labels = _labels(layers, named)
    tops = (_TOP + _ERROR + _GAP, _TOP + _ERROR + 2 * _GAP + _BARS)
    bottom = tops[1] + _BARS
    largest = [_round_up(max(values)) for values in (series.moved, series.seconds)]
    ticks = _error_ticks(series)
    for top, label in zip(tops, (as_percent(largest[0]), f"{largest[1]:g} s"), strict=True):
        ticks += [(top, label), (top + _BARS, "0")]
    columns = []
    for index, (entry, label) in enumerate(zip(layers, labels, strict=True)):
        values = (series.moved[index], series.seconds[index])
        heights = [_BARS * value / most for value, most in zip(values, largest, strict=True)]
        columns.append(
            Column(
                x=4 + pitch * (index + 0.5),
                nearest=_height_of(series.nearest[index], span),
                final=_height_of(series.final[index], span),
                bars=[(top + _BARS - h, h) for top, h in zip(tops, heights, strict=True)],
                label=label,
                text=_in_words(entry),
            )
        )
    return Drawing(
        axis=_AXIS,
        width=max(320.0, pitch * len(layers) + 8),
        height=bottom + (16 + _LETTER * max(map(len, labels)) if named else 24),
        top=_TOP,
        bottom=bottom,
        pitch=pitch,
        radius=min(4.2, max(1.4, 0.3 * pitch)),
        named=named,
        ticks=ticks,
        titles=[(top - 9, text) for top, text in zip(tops, ("Codes moved", "Time"), strict=True)],
        bands=_bands(layers, pitch),
        columns=columns,
    )


def _labels(layers: Sequence[LayerEntry], named: bool) -> list[str]:
    """Names, or the first layer's number and every fiftieth's."""
    if named:
        return [tail(short_name(entry.name, entry.block), 30) for entry in layers]
    return [str(i) if i % 50 == 0 or i == 1 else "" for i in range(1, len(layers) + 1)]


def _height_of(error: float, span: tuple[float, float]) -> float:
    """From the top, in pixels; errors next to 0 lie on the lower end of the axis."""
    low, high = span
    share = log10(high / error) / log10(high / low) if error > low else 1
    return _TOP + _ERROR * share


def _error_ticks(series: Series) -> list[tuple[float, str]]:
    """Places and labels, with a 0 at the lower end where errors lie there."""
    span = series.span
    ticks = [(_height_of(value, span), label) for value, label in series.ticks]
    if min(*series.nearest, *series.final) >= span[0]:
        return ticks
    end = _TOP + _ERROR
    return [(end, "0"), *(tick for tick in ticks if end - tick[0] > 13)]


def _bands(layers: Sequence[LayerEntry], pitch: float) -> list[Band]:
    """Every other block is shaded; they are named, in the longest way that fits half of them."""
    runs = [(block or "", len(list(run))) for block, run in groupby(layers, lambda e: e.block)]
    counts = [count for _, count in runs]
    ways = [
        [".".join(block.split(".")[-pieces:]) for block, _ in runs]
        for pieces in (9, 2, 1)  # the last ones of their names
    ]

    def fits(name: str, count: int) -> bool:
        return not name.isdigit() and _LETTER * len(name) + 6 <= pitch * count

    names = next(
        (way for way in ways if 2 * sum(map(fits, way, counts)) >= len(runs)), [""] * len(runs)
    )
    bands, left = [], 4.0
    for index, (name, count) in enumerate(zip(names, counts, strict=True)):
        width = pitch * count
        bands.append(Band(left, width, index % 2 == 1, name if fits(name, count) else ""))
        left += width
    return bands


def _in_words(entry: LayerEntry) -> str:
    relative = entry.report.relative
    return (
        f"{entry.name}\nerror {as_percent(relative['final'])}, nearest "
        f"{as_percent(relative['nearest'])}\ncodes moved {as_percent(entry.report.flipped)}, "
        f"{as_time(entry.report.seconds.get('total', 0.0))}"
    )


def _round_up(value: float) -> float:
    """To 1, 2, 2.5 or 5 times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** floor(log10(value))
    return next((s * power for s in (1, 2, 2.5, 5) if value <= s * power), 10 * power)


def _finite(value: float) -> float:
    return value if -inf < value < inf else 0.0
