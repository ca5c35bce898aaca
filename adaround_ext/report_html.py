"""A model's report as a page: one file, without a script or style from anywhere else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from html import escape
from math import isfinite
from typing import TYPE_CHECKING, Any

from adaround_ext.report_plot import as_bytes, as_count, as_percent, as_time, short_name, svg_chart

if TYPE_CHECKING:
    from adaround_ext.model_report import LayerEntry, ModelReport

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

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1e21; --faint: #656b73;
  --line: #e3e5e8; --band: #f6f7f8; --accent: #0068a8; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --ink: #e6e8ea; --faint: #9aa1a9;
  --line: #2d3136; --band: #1b1e22; --accent: #62b3ec; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  font-variant-numeric: tabular-nums; }
main { max-width: 80rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.01em; }
h1, td.name, td.notes, dt, dd, li { overflow-wrap: anywhere; }
h2 { margin: 3rem 0 .5rem; font-size: 1.15rem; }
h3 { margin: 1.5rem 0 .25rem; font-size: .95rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.about, .faint { color: var(--faint); }
.faint { font-size: .85rem; }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
  gap: 1.25rem 1.5rem; margin: 1.75rem 0 0; }
.figures div { border-top: 2px solid var(--ink); padding-top: .4rem; }
.figures div:first-child { border-color: var(--accent); }
p.faint, .figures span { line-height: 1.4; }
.figures span { display: block; }
.figures dt { font-size: .85rem; color: var(--faint); }
.figures dd { margin: 0; }
.figures b { display: block; font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; margin-bottom: .6rem;
  font-size: .85rem; color: var(--faint); }
.legend span::before { content: ""; display: inline-block; width: .6rem; height: .6rem;
  margin-right: .4rem; border: 1.5px solid var(--faint); border-radius: 50%; }
.legend .final::before { background: var(--accent); border-color: var(--accent); }
.chart { display: flex; max-width: calc((var(--axis) + var(--width)) * 1px); }
.chart svg { display: block; width: 100%; height: auto; }
.chart .axis { flex: none; width: calc(var(--axis) * 1px); }
.chart .plot { flex: 0 1 auto; min-width: 0; overflow-x: auto; }
.chart .plot svg { width: calc(var(--width) * 1px); }
.chart text { font-size: 11px; fill: var(--faint); }
.chart .title { font-size: 12px; font-weight: 600; fill: var(--ink); }
.chart .end { text-anchor: end; }
.chart .band { fill: var(--band); }
.chart .grid { stroke: var(--line); fill: none; }
.chart .stem { stroke: var(--faint); stroke-opacity: .45; fill: none; }
.chart .nearest { fill: var(--paper); stroke: var(--faint); stroke-width: 1.3; }
.chart .final, .chart .bar { fill: var(--accent); }
.chart .hit { fill: transparent; }
.chart .layer:hover .hit { fill: var(--accent); fill-opacity: .13; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .82rem; line-height: 1.4; }
.wide table { width: 100%; }
th, td { padding: .32rem .7rem .32rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
th { font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 400; }
.n { text-align: right; white-space: nowrap; }
td.name { min-width: 17rem; position: sticky; left: 0; background: var(--paper); }
td.notes { min-width: 13rem; padding-right: 0; color: var(--faint); }
th button { all: unset; cursor: pointer; color: inherit; }
th button:hover { color: var(--accent); }
th button:focus-visible, .plot:focus-visible { outline: 2px solid var(--accent);
  outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.share { width: 10rem; }
.share i { display: block; height: .55rem; margin-top: .32rem; background: var(--accent); }
.pair { display: flex; flex-wrap: wrap; gap: .5rem 4rem; align-items: flex-start; }
.pair dl { flex: 0 1 18rem; }
.values { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr));
  gap: 0 2.5rem; margin: 0; font-size: .82rem; line-height: 1.4; }
.values div { display: flex; justify-content: space-between; gap: 1rem; padding: .32rem 0;
  border-bottom: 1px solid var(--line); }
.values dd { margin: 0; text-align: right; }
dl.reasons dt { font-weight: 600; margin-top: .75rem; }
dl.reasons dd { margin: 0; }
@media (max-width: 40rem) { main { padding: 1.5rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  td.name { min-width: 9rem; } }
@media print {
  @page { margin: 12mm; }
  :root { color-scheme: light; --paper: #fff; --ink: #000; --faint: #444; --line: #ccc;
    --band: #f3f3f3; --accent: #005a94; }
  html { font-size: 12px; }
  body { font-size: 9pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  h2 { margin-top: 1.5rem; }
  h2, h3, .legend { break-after: avoid; }
  tr, .chart, .values div { break-inside: avoid; }
  .figures { grid-template-columns: repeat(6, 1fr); gap: .75rem; }
  .figures b { font-size: 1.1rem; }
  .wide { overflow: visible; }
  .wide table { font-size: 6pt; }
  td.name { position: static; }
  td.name { min-width: 13rem; }
  td.notes { min-width: 0; }
  .wide th, .wide td { padding-right: .35rem; }
  .chart .axis { flex: var(--axis) 1 0; width: auto; }
  .chart .plot { flex: var(--width) 1 0; overflow: visible; }
  .chart .plot svg, .chart .axis svg { width: 100%; }
}
"""

_SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const column = head.cellIndex, numbers = head.classList.contains("n");
    const now = head.getAttribute("aria-sort");
    const down = now ? now === "ascending" : numbers;
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const order = numbers ? (a, b) => key(a) - key(b) : (a, b) => key(a).localeCompare(key(b));
    const rows = [...body.rows].sort(order);
    body.append(...(down ? rows.reverse() : rows));
  });
}
"""


def page(report: ModelReport) -> str:
    """The whole page; nothing in the report is trusted to be without markup."""
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    # Nothing is loaded, and no script runs but the page's own.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    parts = [_head(report)]
    if report.layers:
        parts += [_chart(report), _layers(report)]
    parts += [_notes(report), _skipped(report), _costs(report)]
    if report.layers:
        parts.append(_configuration(report.layers))
    parts.append(_versions(report))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.model)}: {report.average_bits:.2f} bits a weight</title>\n"
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _head(report: ModelReport) -> str:
    count = len(report.layers)
    if not count:
        about = "No layer was quantized."
    else:
        about = f"{count} layer{'s' * (count != 1)} rounded by AdaRound, mode {report.mode}"
        about += f": {_MODES[report.mode]}." if report.mode in _MODES else "."
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
        f'<header>\n<h1>{escape(report.model)}</h1>\n<p class="about">{escape(about)}</p>\n'
        f'<dl class="figures">{figures}</dl>\n</header>'
    )


def _chart(report: ModelReport) -> str:
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


def _layers(report: ModelReport) -> str:
    head = "".join(
        f'<th scope="col"{marks}><button type="button">{title}</button></th>'
        for title, marks in _COLUMNS
    )
    places = {id(entry): place for place, entry in enumerate(report.layers, 1)}
    rows = "\n".join(
        _row(places[id(entry)], entry) for entry in report.worst(max(1, len(report.layers)))
    )
    return (
        "<section>\n<h2>Layers</h2>\n"
        '<p class="faint">The highest error first; a click on a heading sorts. Moved: codes that '
        "are not those of rounding to nearest. Clipped: weights beyond the grid. Fallback: "
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
    scale = {"per_tensor": "tensor", "per_channel": "channel"}.get(
        config["granularity"], f"{config['group_size']} columns"
    )
    shape = f" {_TIMES} ".join(map(str, entry.shape))
    bits = f"{config['bits']}{'' if config['symmetric'] else ' asym.'}"
    cells = (
        _number(place, str(place)),
        f'<td class="name"><code>{escape(entry.name)}</code></td>',
        f"<td>{escape(entry.kind)}</td>",
        _number(entry.weights, shape),
        _number(config["bits"], escape(bits)),
        f"<td>{escape(scale)}</td>",
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


def _notes(report: ModelReport) -> str:
    items = "\n".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f"<section>\n<h2>Notes</h2>\n<ul>\n{items}\n</ul>\n</section>" if items else ""


def _skipped(report: ModelReport) -> str:
    """By reason, which many modules may have in common."""
    reasons: dict[str, list[str]] = {}
    for name, reason in report.skipped.items():
        reasons.setdefault(reason, []).append(name)
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
