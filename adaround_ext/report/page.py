"""A model's report as a page: one file, without a script or style from anywhere else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from html import escape
from math import isfinite
from typing import TYPE_CHECKING, Any

from adaround_ext.report.figure import short_name, svg_chart
from adaround_ext.report.style import SCRIPT, STYLE
from adaround_ext.report.text import as_bytes, as_count, as_percent, as_time

if TYPE_CHECKING:
    from adaround_ext.report.model import LayerEntry, ModelReport

_TIMES = "\N{MULTIPLICATION SIGN}"
_NONE = "\N{EN DASH}"
_MODES = {
    "sequential": "each layer on inputs that the layers quantized before it produce",
    "parallel": "each layer on the inputs that it has in full precision",
}
_N = ' class="n"'
# (title, attributes); of numbers the class is n.
_COLUMNS = (
    ("#", _N), ("Layer", ""), ("Kind", ""), ("Shape", _N), ("Bits", _N), ("Scale per", ""),
    ("Nearest", _N), ("Final", f'{_N} aria-sort="descending"'), ("Ratio", _N), ("Moved", _N),
    ("Clipped", _N), ("Fallback", _N), ("Time", _N), ("Notes", ""),
)  # fmt: skip


def page(report: ModelReport) -> str:
    """The whole page; nothing in the report is trusted to be without markup."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    # Nothing is loaded, and no script runs but the page's own.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    parts = [summary(report)]
    if report.layers:
        parts += [chart(report), layers(report, sorts=True)]
    parts += [notes(report), skipped(report), _costs(report)]
    if report.layers:
        parts.append(_configuration(report.layers))
    parts.append(_versions(report))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.model)}: {report.average_bits:.2f} bits a weight</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def summary(report: ModelReport) -> str:
    count = len(report.layers)
    if not count:
        about = "No layer was quantized."
    else:
        about = f"{count} layer{'s' * (count != 1)} rounded by AdaRound, mode {report.mode}"
        about += f": {_MODES[report.mode]}." if report.mode in _MODES else "."
    warning = report.warning
    few = "" if warning is None else f'<p class="warning">{escape(warning)}</p>\n'
    error, nearest = report.relative_error, report.nearest_error
    if nearest:
        ratio = f"{error / nearest:.2f}{_TIMES}"
        beside = f"{as_percent(error)}, nearest {as_percent(nearest)}"
    else:
        ratio, beside = (_NONE, "no layer has an error") if count else (_NONE, "no layers")
    stored = report.average_bits * report.quantized_parameters / 8
    device = report.memory.get("device_peak")
    peak = report.memory.get("host_peak")
    total = report.seconds.get("total")
    tiles = (
        ("Error over nearest", ratio, beside),
        ("Bits a weight", f"{report.average_bits:.2f}" if count else _NONE,
         f"{as_bytes(stored)} of codes, scales and zero points"),
        ("Quantized weights", as_count(report.quantized_parameters),
         f"of {as_count(report.parameters)} parameters"),
        ("Codes moved", as_percent(report.flipped) if count else _NONE, "from rounding to nearest"),
        ("Time", _NONE if total is None else as_time(total),
         f"{report.samples} samples, {report.passes} passes"),
        ("Peak memory", _NONE if peak is None else as_bytes(peak),
         "of the process" if device is None else f"device {as_bytes(device)}"),
    )  # fmt: skip
    # A number and its unit stay on one line.
    figures = "".join(
        f'<div><dt>{title}</dt><dd><b>{value}</b><span class="faint">'
        f"{more.replace(' %', '&nbsp;%')}</span></dd></div>"
        for title, value, more in tiles
    )
    return (
        f'<header>\n<h1>{escape(report.model)}</h1>\n<p class="about">{escape(about)}</p>\n{few}'
        f'<dl class="figures">{figures}</dl>\n</header>'
    )


def chart(report: ModelReport) -> str:
    relative = [entry.report.relative for entry in report.layers]
    above = sum(r["final"] > r["nearest"] for r in relative)
    text = (
        "The squared error of each layer's outputs over their energy, on the calibration data; "
        "layers in execution order, the axis is logarithmic."
    )
    if above:
        text += f" It is above that of rounding to nearest in {above}."
    if any(entry.shared_inputs for entry in report.layers):
        text += " Layers that were solved together each show the time of all."
    return (
        f'<section>\n<h2>Error by layer</h2>\n<p class="faint">{text}</p>\n'
        '<div class="legend"><span>rounding to nearest</span><span class="final">final</span>'
        f"</div>\n{svg_chart(report)}\n</section>"
    )


def layers(report: ModelReport, sorts: bool) -> str:
    """All of them; sorts: whether there is a script that does."""
    button = '<button type="button">{}</button>' if sorts else "{}"
    head = "".join(
        f'<th scope="col"{marks}>{button.format(title)}</th>' for title, marks in _COLUMNS
    )
    sorting = " a click on a heading sorts." if sorts else ""
    places = {id(entry): place for place, entry in enumerate(report.layers, 1)}
    rows = "\n".join(
        _row(places[id(entry)], entry) for entry in report.worst(max(1, len(report.layers)))
    )
    return (
        "<section>\n<h2>Layers</h2>\n"
        f'<p class="faint">The highest error first{";" if sorts else "."}{sorting} Moved: codes '
        "that are not those of rounding to nearest. Clipped: weights beyond the grid. Fallback: "
        "rows that kept rounding to nearest.</p>\n"
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n'
        "</table></div>\n</section>"
    )


def _row(place: int, entry: LayerEntry) -> str:
    report, config = entry.report, entry.config
    relative = report.relative
    nearest, final = relative["nearest"], relative["final"]
    ratio = final / nearest if nearest else 0.0
    seconds = report.seconds.get("total", 0.0)
    shape = f" {_TIMES} ".join(map(str, entry.shape))
    bits = f"{config['bits']}{'' if config['symmetric'] else ' asym.'}"
    cells = (
        _number(place, str(place)),
        f'<td class="name"><code>{escape(entry.name)}</code></td>',
        f"<td>{escape(entry.kind)}</td>",
        _number(entry.weights, shape),
        _number(config["bits"], escape(bits)),
        f"<td>{escape(entry.granularity)}</td>",
        _number(nearest, as_percent(nearest)),
        _number(final, as_percent(final)),
        _number(ratio, f"{ratio:.2f}" if nearest and isfinite(ratio) else _NONE),
        _number(report.flipped, as_percent(report.flipped)),
        _number(report.clipped, as_percent(report.clipped)),
        _number(report.fallback_rows, str(report.fallback_rows)),
        _number(seconds, as_time(seconds)),
        f'<td class="notes">{escape("; ".join(_remarks(entry)))}</td>',
    )
    return f"<tr>{''.join(cells)}</tr>"


def _number(value: float, text: str) -> str:
    value = value if isfinite(value) else -1.0
    return f'<td class="n" data-value="{value:.9g}">{text}</td>'


def _remarks(entry: LayerEntry) -> Iterable[str]:
    if entry.calls != 1:
        yield f"runs {entry.calls} times a forward"
    if entry.tied:
        yield f"same weight as {', '.join(entry.tied)}"
    if entry.shared_inputs:
        yield "shares inputs with " + ", ".join(short_name(entry, n) for n in entry.shared_inputs)
    yield from entry.report.notes


def notes(report: ModelReport) -> str:
    items = "\n".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f"<section>\n<h2>Notes</h2>\n<ul>\n{items}\n</ul>\n</section>" if items else ""


def skipped(report: ModelReport) -> str:
    """By reason, which many modules may have in common."""
    reasons: dict[str, list[str]] = {}
    for name, reason in report.skipped.items():
        reasons.setdefault(reason, []).append(name or "the model")
    if not reasons:
        return ""
    items = "\n".join(
        f"<dt>{escape(reason)} ({len(names)})</dt>"
        f"<dd>{', '.join(f'<code>{escape(name)}</code>' for name in names)}</dd>"
        for reason, names in reasons.items()
    )
    return f'<section>\n<h2>Skipped modules</h2>\n<dl class="reasons">\n{items}\n</dl>\n</section>'


def _costs(report: ModelReport) -> str:
    parts = {name: value for name, value in report.seconds.items() if name != "total"}
    total = report.seconds.get("total") or sum(parts.values())
    times = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="n">{as_time(value)}</td>'
        f'<td class="share"><i style="width:{min(100.0, 100 * value / total):.1f}%"></i></td></tr>'
        for name, value in sorted(parts.items(), key=lambda item: -item[1])
        if total > 0
    )
    memory = _pairs((name, as_bytes(value)) for name, value in report.memory.items())
    tables = (f"<table>{times}</table>" if times else "") + memory
    if not tables:
        return ""
    return f'<section>\n<h2>Time and memory</h2>\n<div class="pair">{tables}</div>\n</section>'


def _configuration(layers: Iterable[LayerEntry]) -> str:
    """What all layers have in common, then what differs and where."""
    found: dict[str, dict[str, list[str]]] = {}
    for entry in layers:
        for name, value in entry.config.items():
            found.setdefault(name, {}).setdefault(_value(value), []).append(entry.name)
    common = _pairs((k, next(iter(v))) for k, v in found.items() if len(v) == 1)
    differing = []
    for name, values in found.items():
        if len(values) > 1:
            usual, *others = sorted(values.items(), key=lambda item: -len(item[1]))
            lines = [f"<code>{escape(usual[0])}</code> in {len(usual[1])}"]
            for value, names in others:
                few = ", ".join(names[:8]) + (", \N{HORIZONTAL ELLIPSIS}" if names[8:] else "")
                lines.append(
                    f"<code>{escape(value)}</code> in {len(names)}: "
                    f'<span class="faint">{escape(few)}</span>'
                )
            items = "".join(f"<li>{line}</li>" for line in lines)
            differing.append(f"<h3>{escape(name)}</h3>\n<ul>{items}</ul>")
    parts = "\n".join([common, *differing])
    return f"<section>\n<h2>Configuration</h2>\n{parts}\n</section>"


def _value(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:60] + "\N{HORIZONTAL ELLIPSIS}"


def _versions(report: ModelReport) -> str:
    rows: Mapping[str, str] = report.versions | {"seed": str(report.seed)}
    return f"<section>\n<h2>Versions</h2>\n{_pairs(rows.items())}\n</section>"


def _pairs(items: Iterable[tuple[str, str]]) -> str:
    rows = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in items
    )
    return f'<dl class="values">{rows}</dl>' if rows else ""
