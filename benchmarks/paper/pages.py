"""Tables in documents, each between ``<!-- table: NAME -->`` and ``<!-- /table -->``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from benchmarks import common
from benchmarks.paper.experiment import Cell, Table, Text

Language = Literal["en", "zh"]
DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES: dict[Language, str] = {"en": "method.md", "zh": "method.zh.md"}


def said(value: Cell, language: Language) -> str:
    """A cell in one language; numbers with three digits that count."""
    if isinstance(value, Text):
        return value.en if language == "en" else value.zh
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def markdown(table: Table, language: Language) -> str:
    """The table's lines: its first column to the left, numbers to the right."""
    rows = [[said(value, language) for value in row] for row in table.rows]
    lines = [[said(value, language) for value in table.header]]
    lines.append([":--" if i == 0 or _words(rows, i) else "--:" for i in range(len(lines[0]))])
    return "".join(f"| {' | '.join(line)} |\n" for line in [*lines, *rows])


def _words(rows: list[list[str]], column: int) -> bool:
    return not all(re.match(r"[-+−]?\d|-$", row[column]) for row in rows)


def show(table: Table) -> None:
    """On the terminal, in English."""
    rows = [[said(value, "en") for value in row] for row in table.rows]
    common.print_table(table.title, [said(value, "en") for value in table.header], rows)


def replaced(text: str, name: str, table: str) -> str | None:
    """``text`` with what lies between the table's markers replaced; None without such markers."""
    start = f"<!-- table: {name} -->\n"
    pattern = re.compile(f"({re.escape(start)})((?!<!-- table: ).*\n)*?(<!-- /table -->)")
    if pattern.search(text) is None:
        return None
    return pattern.sub(lambda match: f"{match[1]}{table}{match[3]}", text)


def write(tables: Sequence[Table], folder: Path) -> None:
    """Puts the tables into both documents in the folder, and says what has no place there."""
    for language, name in PAGES.items():
        path = folder / name
        if not path.exists():
            common.note(f"{path} does not exist: no tables written there")
            continue
        old = text = path.read_text()
        for table in tables:
            new = replaced(text, table.name, markdown(table, language))
            if new is None:
                common.note(f"{path} has no marker for the table {table.name}")
            else:
                text = new
        if text != old:
            path.write_text(text)
            common.note(f"wrote {path}")
