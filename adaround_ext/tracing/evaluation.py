"""The random numbers that a model draws: the same in every run of it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

_NUMPY_SEEDS = 1 << 32  # NumPy takes no others


def gpus(devices: Iterable[torch.device | None]) -> list[torch.device]:
    """Those of the devices that are one, each once."""
    return [d for d in dict.fromkeys(devices) if d is not None and d.type == "cuda"]


def seed_all(seed: int, devices: Iterable[torch.device]) -> None:
    """Seeds torch on the CPU and on some GPUs, NumPy's global generator and Python's.

    ``torch.manual_seed`` would also change the state of all other GPUs, which the caller may use,
    and takes longer than a small model where there is no GPU.
    """
    np.random.seed(seed % _NUMPY_SEEDS)
    random.seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    torch.default_generator.manual_seed(seed)  # last: other threads draw from it, if any do


@contextmanager
def restored_random_state(devices: Iterable[torch.device]) -> Iterator[None]:
    """What was drawn or seeded inside is undone: of torch, of NumPy and of Python."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng([device.index for device in devices]):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
