"""No tensor, file or thread stays behind; for memory and times: python -m benchmarks leaks."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.model.census import NAMES, census
from benchmarks.model.leaks import layer_call, model_call

pytestmark = pytest.mark.usefixtures("one_thread")
Call = Callable[[int, random.Random, torch.device], bool]
COUNTED = ("tensors", "descriptors", "threads", "files")


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def counts() -> dict[str, int]:
    found = dict(zip(NAMES, census(), strict=True))
    return {name: found[name] for name in COUNTED}


@pytest.mark.parametrize(("call", "kinds"), [(layer_call, 18), (model_call, 6)])
def test_counts_are_as_before(call: Call, kinds: int) -> None:
    """Every kind of call twice, those that raise among them; libraries come up in the first."""
    draw, readings, returned = random.Random(0), [], []
    for _ in range(2):
        returned += [call(number, draw, torch.device("cpu")) for number in range(kinds)]
        readings.append(counts())
    assert readings[0] == readings[1]
    assert True in returned and False in returned


def test_what_stays_is_seen(tmp_path: Path) -> None:
    before = counts()
    kept = [torch.zeros(1)]
    file = (tmp_path / "kept").open("w")
    after = counts()
    assert len(kept) == after["tensors"] - before["tensors"] == 1
    file.close()
    assert (after["descriptors"], after["files"]) == (before["descriptors"] + 1, 1)
