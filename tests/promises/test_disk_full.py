"""A disk that is full: the folder, what was needed and the cause."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaround_ext import quantize_
from adaround_ext.model.sample_store import GrowingTensor
from adaround_ext.replay.cache import ActivationCache

pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def full_disk(at: int) -> Iterator[None]:
    """No file may have more bytes: the nearest to it that a test may do to the machine."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def cache(folder: str | None, tensor: torch.Tensor) -> None:
    with ActivationCache(0, folder) as held:
        held.put("x", tensor)


def growing(folder: str | None, tensor: torch.Tensor) -> None:
    GrowingTensor(folder).append(tensor)


@pytest.mark.parametrize("write", [cache, growing])
@pytest.mark.parametrize("at", [0, 5000])
def test_what_is_said(write: Callable[..., None], at: int, tmp_path: Path) -> None:
    tensor = torch.randn(100, 1000)
    rule = rf"cache_dir must have room .*bytes free in {tmp_path} where 400000 more are needed: .+"
    with pytest.raises(OSError, match=rule) as caught, full_disk(at):
        write(str(tmp_path), tensor)
    assert caught.value.errno
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_the_system() -> None:
    rule = rf"cache_dir \(None: .*\) must have room .*free in {tempfile.gettempdir()} where"
    with pytest.raises(OSError, match=rule), full_disk(100):
        cache(None, torch.randn(100, 1000))


@pytest.mark.parametrize("settings", [{"memory_budget": 0}, {"objective": "sampled"}])
def test_quantize(settings: dict[str, Any], tmp_path: Path) -> None:
    """The model is as it was, and nothing stays in the folder."""
    model = nn.Sequential(nn.Linear(512, 8), nn.ReLU(), nn.Linear(8, 4))
    before = model[0].weight.detach().clone()
    batches = (torch.randn(64, 512) for _ in range(4))
    with pytest.raises(OSError, match=f"cache_dir must have room .* {tmp_path}"), full_disk(1000):
        quantize_(
            model, batches, cache_dir=os.fspath(tmp_path), preset="fast", progress=False, **settings
        )
    assert torch.equal(model[0].weight, before)
    assert list(tmp_path.iterdir()) == []
