"""Memory of a run, as the system counts it."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


def host_memory() -> tuple[int, int]:
    """(now, most so far) bytes of this process's resident memory; the same twice where unknown."""
    if _STATUS.exists():
        lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
        now, most = (int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
        return now, most
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    most *= 1 if sys.platform == "darwin" else 1024
    return most, most


def device_memory(device: torch.device) -> int:
    """Most bytes so far that torch had on a CUDA device; 0 for another."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def free_device_memory(device: torch.device | None) -> int:
    """Bytes that nobody has on a CUDA device; 0 for another."""
    if device is None or device.type != "cuda":
        return 0
    return torch.cuda.mem_get_info(device)[0]
