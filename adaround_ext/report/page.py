"""Page of a model's report: one file without a script or style from anywhere else; or a cell."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any, NamedTuple

from adaround_ext.report.chart import drawing_of
from adaround_ext.report.records import LayerEntry, ModelNumbers
from adaround_ext.report.templates import in_cell, render, text_of
from adaround_ext.report.text import as_bytes, as_count, as_percent, as_time, short_name

_TIMES = "\N{MULTIPLICATION SIGN}"
_NONE = "\N{EN DASH}"
_NO_BREAK = "\N{NO-BREAK SPACE}"
_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
_MODES = {
    "sequential": "each layer on inputs that the layers quantized before it produce",
    "parallel": "each layer on the inputs that it has in full precision",
}
_MOST_LETTERS = 60  # of a setting
_MOST_NAMES = 8  # of layers with an unusual setting


def page(report: ModelNumbers) -> str:
    """The whole page; nothing in the report is trusted to be without markup."""
    script = text_of("page.js")
    common, differing = _settings(report.layers)
    html = render(
        "page.html.jinja",
        **_values(report),
        whole=True,
        style=text_of("page.css"),
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        times=_times(report),
        memory=[(name, as_bytes(value)) for name, value in report.memory.items()],
        common=common,
        differing=differing,
        versions=list((report.versions | {"seed": str(report.seed)}).items()),
    )
    return str(html)


def cell(report: ModelNumbers) -> str:
    """What the page begins with, all layers, and what was noted and skipped, for a notebook."""
    return in_cell(render("sections.html.jinja", **_values(report), whole=False))


class _Row(NamedTuple):
    """A layer in the table: its number, and what is not in its records as it is shown."""

    place: int
    entry: LayerEntry
    bits: str
    ratio: float
    ratio_text: str
    seconds: float
    remarks: list[str]


def _values(report: ModelNumbers) -> dict[str, Any]:
    """What ``sections.html.jinja`` names for the page and for a cell."""
    places = {id(entry): place for place, entry in enumerate(report.layers, 1)}
    skipped: dict[str, list[str]] = {}  # by reason, which many modules may have in common
    for name, reason in report.skipped.items():
        skipped.setdefault(reason, []).append(name or "the model")
    return {
        "report": report,
        "about": _about(report),
        "tiles": _tiles(report),
        "chart": drawing_of(report.layers) if report.layers else None,
        "chart_text": _chart_text(report),
        "rows": [_row(places[id(e)], e) for e in report.worst(max(1, len(report.layers)))],
        "skipped": skipped,
    }


def _about(report: ModelNumbers) -> str:
    count = len(report.layers)
    if not count:
        return "No layer was quantized."
    about = f"{count} layer{'s' * (count != 1)} rounded by AdaRound, mode {report.mode}"
    return f"{about}: {_MODES[report.mode]}." if report.mode in _MODES else f"{about}."


def _tiles(report: ModelNumbers) -> list[tuple[str, str, str]]:
    """The figures at the top: title, value and more about it."""
    any_layer = bool(report.layers)
    error, nearest = report.relative_error, report.nearest_error
    ratio, beside = _NONE, "no layer has an error" if any_layer else "no layers"
    if nearest:
        ratio = f"{error / nearest:.2f}{_TIMES}"
        beside = f"{as_percent(error)}, nearest {as_percent(nearest)}"
    stored = report.average_bits * report.quantized_parameters / 8
    device = report.memory.get("device_peak")
    peak = report.memory.get("host_peak")
    total = report.seconds.get("total")
    tiles = (
        ("Error over nearest", ratio, beside),
        ("Bits a weight", f"{report.average_bits:.2f}" if any_layer else _NONE,
         f"{as_bytes(stored)} of codes, scales and zero points"),
        ("Quantized weights", as_count(report.quantized_parameters),
         f"of {as_count(report.parameters)} parameters"),
        ("Codes moved", as_percent(report.flipped) if any_layer else _NONE,
         "from rounding to nearest"),
        ("Time", _NONE if total is None else as_time(total),
         f"{report.samples} samples, {report.passes} passes"),
        ("Peak memory", _NONE if peak is None else as_bytes(peak),
         "of the process" if device is None else f"device {as_bytes(device)}"),
    )  # fmt: skip
    # A number and its unit stay on one line.
    return [(title, value, more.replace(" %", f"{_NO_BREAK}%")) for title, value, more in tiles]


def _chart_text(report: ModelNumbers) -> str:
    relative = [entry.report.relative for entry in report.layers]
    above = sum(errors["final"] > errors["nearest"] for errors in relative)
    text = (
        "The squared error of each layer's outputs over their energy, on the calibration data; "
        "layers in execution order, the axis is logarithmic."
    )
    if above:
        text += f" It is above that of rounding to nearest in {above}."
    if any(entry.shared_inputs for entry in report.layers):
        text += " Layers that were solved together each show the time of all."
    return text


def _row(place: int, entry: LayerEntry) -> _Row:
    relative, config = entry.report.relative, entry.config
    ratio = relative["final"] / relative["nearest"] if relative["nearest"] else 0.0
    return _Row(
        place=place,
        entry=entry,
        bits=f"{config['bits']}{'' if config['symmetric'] else ' asym.'}",
        ratio=ratio,
        ratio_text=f"{ratio:.2f}" if relative["nearest"] and isfinite(ratio) else _NONE,
        seconds=entry.report.seconds.get("total", 0.0),
        remarks=list(_remarks(entry)),
    )


def _remarks(entry: LayerEntry) -> Iterator[str]:
    if entry.calls != 1:
        yield f"runs {entry.calls} times a forward"
    if entry.tied:
        yield f"same weight as {', '.join(entry.tied)}"
    if entry.shared_inputs:
        names = (short_name(name, entry.block) for name in entry.shared_inputs)
        yield f"shares inputs with {', '.join(names)}"
    yield from entry.report.notes


def _times(report: ModelNumbers) -> list[tuple[str, float, float]]:
    """Name, seconds and percentage of the total of each part, the longest first."""
    seconds = {name: value for name, value in report.seconds.items() if name != "total"}
    total = report.seconds.get("total") or sum(seconds.values())
    if total <= 0:
        return []
    longest_first = sorted(seconds.items(), key=lambda item: -item[1])
    return [(name, value, min(100.0, 100 * value / total)) for name, value in longest_first]


def _settings(
    layers: Sequence[LayerEntry],
) -> tuple[list[tuple[str, str]], dict[str, list[tuple[str, int, str]]]]:
    """Settings that all layers have in common; then those that differ, the usual value first.

    These by name, each value with the number of its layers and, but for the usual one, their names.
    """
    users: dict[str, dict[str, list[str]]] = {}
    for entry in layers:
        for name, value in entry.config.items():
            text = str(value)
            text = text if len(text) <= _MOST_LETTERS else text[:_MOST_LETTERS] + _ELLIPSIS
            users.setdefault(name, {}).setdefault(text, []).append(entry.name)
    common = [(name, next(iter(values))) for name, values in users.items() if len(values) == 1]
    differing: dict[str, list[tuple[str, int, str]]] = {}
    for name, values in users.items():
        usual, *others = sorted(values.items(), key=lambda item: -len(item[1]))
        if others:
            differing[name] = [
                (usual[0], len(usual[1]), ""),
                *((value, len(names), _few(names)) for value, names in others),
            ]
    return common, differing


def _few(names: Sequence[str]) -> str:
    more = f", {_ELLIPSIS}" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
