"""The random numbers that a model draws: the same in every run of it."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def gpus(devices: Iterable[torch.device | None]) -> list[torch.device]:
    """Those of the devices that are one, each once."""
    return [d for d in dict.fromkeys(devices) if d is not None and d.type == "cuda"]


def seed_all(seed: int, devices: Iterable[torch.device]) -> None:
    """Seeds the CPU's generator and those of some GPUs.

    ``torch.manual_seed`` would also change the state of all others, which the caller may use, and
    takes longer than a small model where there is no GPU.
    """
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
