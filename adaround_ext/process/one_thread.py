"""One thread of the package on which operators have one thread.

A library's factorisation has the same bits each time on one thread only.
``torch.set_num_threads`` is for the calling thread, and for threads that have not used torch yet.
So this one has its own number, and nothing that a caller's threads have is changed meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from typing import TypeVar

import torch

T = TypeVar("T")


def on_one_thread(task: Callable[[], T], device: torch.device) -> T:
    """What ``task`` returns, whose operators on the CPU have one thread: here, if that is so."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return task()
    future = _pool().submit(_without_gradients, task)
    try:
        return future.result()
    finally:
        wait([future])  # also where the caller is interrupted: the task's memory is the caller's


def _without_gradients(task: Callable[[], T]) -> T:
    with torch.no_grad():  # a thread's own, as inference mode and autocast are, which start as off
        return task()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "adaround_ext", _begin)


def _begin() -> None:
    before = torch.get_num_threads()  # a thread's first question sets the number, too
    torch.set_num_threads(1)
    # It is now that of threads to come: one of them gives them theirs back.
    restoring = threading.Thread(target=torch.set_num_threads, args=(before,))
    restoring.start()
    restoring.join()


if hasattr(os, "register_at_fork"):  # a child process has none of the threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
