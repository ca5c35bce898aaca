"""Pieces of messages."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


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


def describe(batch: Any) -> str:
    """What a batch holds, in one line."""
    if isinstance(batch, Mapping):
        values = [f"{key} ({describe_value(value)})" for key, value in batch.items()]
        return f"a mapping with {', '.join(values) or 'nothing in it'}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {', '.join(map(describe_value, batch)) or 'nothing'}"
    return describe_value(batch)


def describe_value(value: Any) -> str:
    """A value in a few words: the dtype and shape of a tensor."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return type(value).__name__
