"""Pieces of messages."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from torch import Tensor

_LEAST = 0.6  # as difflib itself has it


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


def nearest_first(name: str, names: Iterable[str]) -> list[str]:
    """All names, those that are spelt most like ``name`` first."""
    return sorted(set(names), key=lambda other: (-_alike(name, other), other))


def suggestion(name: str, names: Iterable[str]) -> str:
    """ "did you mean ...?" with the name that is spelt most like it; "" where none is."""
    first = nearest_first(name, names)[:1]
    return f"did you mean {first[0]}?" if first and _alike(name, first[0]) >= _LEAST else ""


def _alike(name: str, other: str) -> float:
    return SequenceMatcher(None, name.lower(), other.lower()).ratio()


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
