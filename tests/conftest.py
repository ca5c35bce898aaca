"""Fixtures that every test file shares."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext

import pytest

# Read when torch is loaded. Threads that wait spin: two of them on busy cores take 60 times longer.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from adaround_ext.ops.library import build_info
from adaround_ext.replay import calibration
from tests.emulation import EMULATED, PRETENDED
from tests.emulation.library import load
from tests.emulation.pretended import cuda_device
from tests.support.cli_fixtures import bert, folder, llama, run, text  # noqa: F401  fixtures
from tests.support.sensitive_models import branches  # noqa: F401  a fixture

if EMULATED:
    load()
_no_cuda = not PRETENDED and not (torch.cuda.is_available() and build_info()["cuda_loaded"])
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(_no_cuda, reason="no CUDA device or CUDA build")),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Each device in turn."""
    own = torch.device(request.param, 0 if request.param == "cuda" else None)
    with cuda_device() if PRETENDED and own.type == "cuda" else nullcontext(own) as found:
        yield found


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """quantize_ sums its statistics as optimize_layer does: for comparisons bit by bit."""
    monkeypatch.setattr(calibration, "_SEGMENT_SAMPLES", 1 << 20)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small problems, where threads only wait for each other: on busy cores, ten times as long.

    The former number comes back after the test, which may set its own.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
