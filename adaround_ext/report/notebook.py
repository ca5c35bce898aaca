"""Reports in the cells of a notebook: parts of the page, in a style that ends with them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from adaround_ext.report.page import chart, layers, notes, skipped, summary
from adaround_ext.report.style import STYLE
from adaround_ext.report.text import as_count, as_percent

if TYPE_CHECKING:
    from adaround_ext.mixed_precision.result import Sensitivity
    from adaround_ext.report.layer import LayerReport
    from adaround_ext.report.model import ModelReport

_OWN = """
& { padding: 1rem; max-width: 80rem; }
h1 { font-size: 1.4rem; } h2 { margin: 1.5rem 0 .5rem; }
.wide { max-height: 30rem; overflow: auto; }
th { position: sticky; top: 0; background: var(--paper); z-index: 1; }
"""


def model_fragment(report: ModelReport) -> str:
    """What the page begins with, all layers, and what was noted and skipped."""
    parts = [summary(report)]
    if report.layers:
        parts += [chart(report), layers(report, sorts=False)]
    return _scoped([*parts, notes(report), skipped(report)])


def layer_fragment(report: LayerReport) -> str:
    """Its line, and the error of each stage."""
    rows = [
        [escape(name), f"{report.losses[name]:.4g}", as_percent(share)]
        for name, share in report.relative.items()
    ]
    head = ("weights", "loss", "of the outputs' energy")
    said = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    parts = [f"<p>{escape(str(report))}</p>", _table(head, rows)]
    return _scoped([*parts, f"<ul>{said}</ul>" if said else ""])


def sensitivity_fragment(found: Sensitivity) -> str:
    """The table of its text."""
    chosen = None if found.average_bits is None else found.suggest()
    head = ["layer", "weights", *(f"{bits} bits" for bits in found.bits)]
    head += [] if chosen is None else ["chosen"]
    rows = []
    for name in found.worst():
        errors = [as_percent(found.network[name][bits]) for bits in found.bits]
        row = [f"<code>{escape(name)}</code>", as_count(found.weights[name]), *errors]
        rows.append(row if chosen is None else [*row, str(chosen[name])])
    title = f"{found.model}: error of the outputs with one layer quantized, worst layers first"
    said = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    parts = [f"<p>{escape(title)}</p>", _table(head, rows)]
    return _scoped([*parts, f"<ul>{said}</ul>" if said else ""])


def _table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """The first cell of a row is its name, the others are numbers; cells are markup."""

    def line(cells: Sequence[str], tag: str) -> str:
        first, *others = cells
        numbers = "".join(f'<{tag} class="n">{cell}</{tag}>' for cell in others)
        return f"<tr><{tag}>{first}</{tag}>{numbers}</tr>"

    titles = line([escape(title) for title in head], "th")
    body = "".join(line(row, "td") for row in rows)
    return (
        f'<div class="wide"><table style="width: auto"><thead>{titles}</thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def _scoped(parts: Iterable[str]) -> str:
    """One element; its rules are nested in a rule of its class, and reach nothing else."""
    style = (STYLE + _OWN).replace(":root", "&").replace("body {", "& {")
    inside = "\n".join(part for part in parts if part)
    return (
        f'<div class="adaround-report">\n<style>.adaround-report {{{style}}}</style>\n{inside}\n'
        "</div>"
    )
