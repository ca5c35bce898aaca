"""Turns of a process's threads: one after the other, where what is set is the whole process's.

The precision of products, cuDNN's flags and the states of random numbers are not a thread's: two
that set them at once would compute with each other's, and leave the process with one of them.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_logger = logging.getLogger("adaround_ext")
_turn = threading.RLock()


@contextmanager
def one_caller() -> Iterator[None]:
    """Waits until no other thread is in here; the same thread may come in again."""
    turn = _turn
    if not turn.acquire(blocking=False):
        _logger.info("waiting for another thread of this process that quantizes")
        turn.acquire()
    try:
        yield
    finally:
        turn.release()


def _renew() -> None:
    """In a child process, whose only thread is the one that made it."""
    global _turn
    _turn = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
