"""Models with compiled parts: while they are quantized these run as they were written."""

from __future__ import annotations

import subprocess
import sys

import pytest

_MODEL = """
import sys
import torch
from torch import nn
from adaround_ext import quantize_

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)
        self.own = None

    def act(self, x):
        return x.relu() + 1 if torch.compiler.is_compiling() else x.relu()

    def forward(self, x):
        if {lazy} and self.own is None:
            self.own = torch.compile(self.act, backend="eager")
        return self.second((self.own or self.act)(self.first(x)))

model = Model()
before = torch.compile
if {early}:
    model.own = torch.compile(model.act, backend="eager")
quantize_(model, [torch.randn(40, 6)], progress=False, preset="fast")
assert torch.compile is before
print("torch._dynamo" in sys.modules)
x = torch.randn(4, 6)
hidden = model.first(x).relu()
assert torch.allclose(model(x), model.second(hidden + ({lazy} or {early})), atol=1e-6)
"""


@pytest.mark.parametrize(("lazy", "early"), [(False, False), (True, False), (False, True)])
def test_compiled_while_it_runs(lazy: bool, early: bool) -> None:
    """Compiled code, which would add 1, does not run within; dynamo is imported only if needed."""
    code = _MODEL.format(lazy=lazy, early=early)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(lazy or early)]
