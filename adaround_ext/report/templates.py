"""Templates of the page: files beside this module, into which data goes with its markup escaped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import isfinite
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from adaround_ext.report.text import as_bytes, as_percent, as_time

_FOLDER = Path(__file__).parent


def render(name: str, **values: object) -> Markup:
    """Fills in a template.

    Args:
        name: Of its file.
        values: What it may name; all that it puts out is escaped, unless it is Markup.

    Raises:
        jinja2.UndefinedError: It names something else.
    """
    return Markup(_environment().get_template(name).render(values))


@cache
def text_of(name: str) -> Markup:
    """A style sheet or script of ours, which goes into a page as it is."""
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


def in_cell(content: Markup) -> str:
    """An element for a notebook's cell, whose style ends with it.

    The style's rules are nested in a rule of its class, and reach nothing else of the notebook.
    """
    rules = str(text_of("page.css") + text_of("cell.css"))
    nested = Markup(rules.replace(":root", "&").replace("body {", "& {"))
    return str(render("cell.html.jinja", style=nested, content=content))


def table_in_cell(
    title: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    code: bool = False,
) -> str:
    """A title, a table and notes for a notebook's cell.

    Args:
        title: A sentence.
        head: Titles of the columns.
        rows: Of cells; the first is the row's name, the others are numbers.
        notes: Below the table.
        code: Whether the rows' names are names in code.
    """
    values = {"title": title, "head": head, "rows": rows, "notes": notes, "code": code}
    return in_cell(render("table.html.jinja", **values))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "as_bytes": as_bytes, "as_percent": as_percent, "as_time": as_time,
        "pixels": "{:.1f}".format,
        "sortable": lambda value: f"{value if isfinite(value) else -1.0:.9g}",
    }  # fmt: skip
    return environment
