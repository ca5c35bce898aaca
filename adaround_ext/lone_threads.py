"""Threads of the package on each of which an operator has one thread.

OpenMP's threads spin at the end of every parallel region until all have come: beside other work,
thousands of small regions take ten times as long as one large part a thread. And a library's
factorisation has the same bits each time on one thread only.

``torch.set_num_threads`` is for the calling thread, and for threads that have not used torch yet.
So these have their own number, and nothing that a caller's threads have is changed meanwhile.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")
_MOST = 1024  # they are started as they are needed, and wait for more work then
_starting = threading.Lock()
_here = threading.local()  # stopped: the event that ends the work of this thread


class _Stopped(BaseException):
    """What is worked on will not be asked for: no handler of errors is to catch it."""


def run_apart(tasks: Sequence[Callable[[], T]]) -> list[T]:
    """What the tasks return, each done on a thread of the package, all at once.

    The first error of the caller's thread (an interruption from the keyboard) or of a task is
    raised when all have stopped; :func:`check_stop` lets those that go on know.
    """
    stopped = threading.Event()
    futures: list[Future[T]] = []
    try:
        for task in tasks:
            futures.append(_pool().submit(_done, task, stopped))
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        stopped.set()
        wait(futures)
        if len(futures) > 1:
            _give_back()
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None and not isinstance(error, _Stopped):
            raise error
    return [future.result() for future in futures]


def on_one_thread(task: Callable[[], T], device: torch.device) -> T:
    """What ``task`` returns, whose operators on the CPU have one thread: here, if that is so."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return task()
    return run_apart([task])[0]


def check_stop() -> None:
    """Between the steps of a task: ends it where its result is not wanted any more."""
    stopped: threading.Event | None = getattr(_here, "stopped", None)
    if stopped is not None and stopped.is_set():
        raise _Stopped


def _done(task: Callable[[], T], stopped: threading.Event) -> T:
    _here.stopped = stopped
    with torch.no_grad():  # a thread's own, as inference mode and autocast are, which start as off
        return task()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_MOST, "adaround_ext", _begin)


def _begin() -> None:
    with _starting:
        before = torch.get_num_threads()  # a thread's first question sets the number, too
        torch.set_num_threads(1)
        # It is now that of threads to come: one of them gives them theirs back.
        restoring = threading.Thread(target=torch.set_num_threads, args=(before,))
        restoring.start()
        restoring.join()


def _give_back() -> None:
    """Glibc has memory for every thread, and what is free in it stays: a tenth of the peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


if hasattr(os, "register_at_fork"):  # a child process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
