"""Census of what may grow from call to call: memory, objects, tensors, files, threads."""

from __future__ import annotations

import ctypes
import gc
import os
import tempfile

import torch

from benchmarks.common import status_bytes

# memory: resident bytes. objects: that the garbage collector knows. tensors: among them.
# descriptors, threads: of the process. files: below the folder for temporary files.
NAMES = ("memory", "objects", "tensors", "descriptors", "threads", "files")


def census() -> tuple[int, ...]:
    """A number for each of :data:`NAMES`.

    After a full collection, and after malloc has given back what is free: else pieces freed between
    others that are still in use stay with the process, and how many there are depends on the sizes
    that were asked for last. They are used again, so they do not add up, but they move resident
    memory by megabytes.
    """
    gc.collect()
    _trim()
    objects = gc.get_objects()
    # By type: asking some lazy modules for their class would import them.
    tensors = sum(issubclass(type(item), torch.Tensor) for item in objects)
    descriptors, threads = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    files = sum(len(names) + len(folders) for _, folders, names in os.walk(tempfile.gettempdir()))
    return status_bytes("VmRSS"), len(objects), tensors, descriptors, threads, files


def _trim() -> None:
    """glibc only; elsewhere memory is as malloc leaves it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
