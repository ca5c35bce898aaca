"""The documents, cut into what tests look at."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
NAMES = [
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
]
# English documents and what the Chinese ones are called.
PAIRS = [("README.md", "README.zh.md"), ("docs/method.md", "docs/method.zh.md")]
_FENCED = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """Fenced code: its language, text, and line in the document."""

    language: str
    text: str
    line: int


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str | None = None) -> list[Block]:
    """The fenced blocks of a document, those of one language where that is given."""
    text = read(name)
    found = [
        Block(m[1].strip(), m[2], text.count("\n", 0, m.start()) + 2)
        for m in _FENCED.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def prose(name: str) -> str:
    """A document without its fenced blocks."""
    return _FENCED.sub("", read(name))


def tables(name: str) -> list[list[list[str]]]:
    """The tables of a document: for each its rows, without the line below the head, as cells."""
    found: list[list[list[str]]] = []
    inside = False
    for line in prose(name).splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        if not inside:
            found.append([])
        inside = True
        if not re.fullmatch(r"[|: -]+", line):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
    return found


def links(name: str) -> list[str]:
    """What the links and pictures of a document lead to, other sites left out."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(name))
    return [target for target in targets if not target.startswith(("http:", "https:"))]
