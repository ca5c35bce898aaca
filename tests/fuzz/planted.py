"""Cases that end badly on purpose: on them the harness itself is tried."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import time

from hypothesis import strategies as st

from tests.fuzz.verdict import require


@dataclasses.dataclass(frozen=True)
class Case:
    end: str
    number: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Some are wrong, and a few crash."""
    number = draw(st.integers(0, 2**32))
    ends = {7: "crash", 11: "wrong", 23: "wrong"}
    return Case(ends.get(number % 30, "right"), number)


def run(case: Case) -> str:
    if case.end == "crash":
        os.abort()
    elif case.end == "exit":
        os._exit(3)
    elif case.end == "hang":
        time.sleep(1000)
    elif case.end == "native hang":
        ctypes.PyDLL(None).sleep(1000)  # nothing else of Python runs meanwhile
    elif case.end == "error":
        raise KeyError("in the judge itself")
    require(case.end == "right", "garbage came back")
    return case.end
