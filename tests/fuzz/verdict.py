"""What every case is judged by."""

from __future__ import annotations

import re

ACCEPTED = (ValueError, TypeError, RuntimeError, NotImplementedError)
_INTERNAL = (
    "INTERNAL ASSERT",
    "API call failed",
    "report a bug",
    "bad_alloc",
    "std::",
    "vector::",
    "unknown exception",
)
_ALLOCATION = re.compile("allocate memory|could not be (made contiguous|allocated)")


class Wrong(AssertionError):
    """A case that ended as it must not."""


def require(condition: bool, text: str) -> None:
    if not condition:
        raise Wrong(text)


def check_error(error: BaseException, words: set[str]) -> None:
    """An exception of the right kind, whose text names one of ``words`` and nothing internal."""
    kind, text = type(error).__name__, str(error)
    require(isinstance(error, (*ACCEPTED, MemoryError)), f"{kind} is no kind for bad input: {text}")
    for fragment in _INTERNAL:
        require(fragment not in text, f"{kind} shows the inside: {text}")
    named = any(re.search(rf"\b{re.escape(word)}\b", text) for word in words)
    require(named or is_out_of_memory(error), f"{kind} names no argument: {text!r}")


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or bool(_ALLOCATION.search(str(error)))
