"""Pieces of messages."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def warning_lines(text: str) -> list[str]:
    """A warning among the lines of a summary."""
    return textwrap.wrap(
        text, 100, initial_indent="  WARNING      ", subsequent_indent=" " * 15,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
