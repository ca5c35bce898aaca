"""A model with a fragile branch, and its sensitivity, once a file of tests."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import Sensitivity, sensitivity

QUIET: dict[str, Any] = {"progress": False}


class Branches(nn.Module):
    """Summed branches: the fragile one is scaled up, and small."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40)
        self.fragile = nn.Linear(24, 12)
        self.second = nn.Linear(40, 40)
        self.third = nn.Linear(40, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(self.second(self.first(x).relu()).relu())
        return 20 * self.fragile(x) + y


@pytest.fixture(scope="module")
def branches() -> tuple[Branches, Tensor, Sensitivity]:
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(96, 24)
    return model, x, sensitivity(model, x, progress=False)
