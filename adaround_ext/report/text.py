"""Numbers in words: percentages, times, bytes, counts and shapes; names cut to what tells most."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from math import isfinite


def warning_lines(text: str) -> list[str]:
    """A warning among the lines of a summary."""
    return textwrap.wrap(
        text, 100, initial_indent="  WARNING      ", subsequent_indent=" " * 15,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def as_percent(share: float) -> str:
    """Three digits, as 12.5 %."""
    if not isfinite(share):
        return "n/a"
    return f"{100 * share:.3g} %" if abs(share) < 9.995 else f"{100 * share:,.0f} %"


def as_time(seconds: float) -> str:
    """In the unit that fits, as 12.5 s."""
    if not isfinite(seconds):
        return "n/a"
    if 0 < seconds < 0.0995:
        return f"{1000 * seconds:.2g} ms"
    if seconds < 99.95:
        return f"{_three_digits(seconds)} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def as_bytes(count: float) -> str:
    """In the binary unit that fits, as 12.5 MiB."""
    if count < 1023.5:
        return f"{count:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        count /= 1024
        if count < 1023.5 or unit == "GiB":
            break
    return f"{_three_digits(count)} {unit}"


def as_count(count: int) -> str:
    """From ten thousand on with three digits, as 12.5 k."""
    if count < 10_000:
        return str(count)
    for scale, unit in ((1e3, "k"), (1e6, "M"), (1e9, "G")):
        if count < 999.5 * scale or unit == "G":
            break
    return f"{_three_digits(count / scale)} {unit}"


def as_shape(shape: Sequence[int]) -> str:
    """As 384x1536."""
    return "x".join(map(str, shape)) or "scalar"


def _three_digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def tail(name: str, length: int) -> str:
    """The end of a long name, which tells more than its beginning."""
    return name if len(name) <= length else "\N{HORIZONTAL ELLIPSIS}" + name[1 - length :]


def short_name(name: str, block: str | None) -> str:
    """A layer's name within its block."""
    return name.removeprefix(f"{block}.")
