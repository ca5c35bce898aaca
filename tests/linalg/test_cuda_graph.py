"""Steps in CUDA graphs: as many as were asked for, and the bits of plain ones.

Where there is no GPU a stand-in for torch's graphs records and replays, which shows the counting.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from adaround_ext import AdaRoundConfig, optimize_layer
from adaround_ext.linalg.cuda_graph import repeat_captured
from tests.conftest import DEVICES

COUNTS = [0, 1, 99, 102, 103, 127, 128, 153, 300, 500]


NOT_PERMITTED = RuntimeError("operation not permitted when stream is capturing")


class Recorder:
    """Stands in for torch.cuda's streams and graphs; with ``fails`` no step can be captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Exception | None = None) -> None:
        self.fails = fails
        self.recording = False
        self.recorded = self.done = self.replays = 0
        self.generators: list[Any] = []
        for name in ("current_stream", "Stream", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, lambda: self)
        for name in ("device", "stream"):
            monkeypatch.setattr(torch.cuda, name, nullcontext)

    def step(self) -> None:
        if self.recording and self.fails:
            raise self.fails
        if self.recording:
            self.recorded += 1
        else:
            self.done += 1

    def wait_stream(self, other: object) -> None: ...

    def synchronize(self) -> None: ...

    def register_generator_state(self, generator: object) -> None:
        self.generators.append(generator)

    def capture_begin(self, capture_error_mode: str) -> None:
        self.recording = True

    def capture_end(self) -> None:
        self.recording = False
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        assert not self.recording
        self.done += self.recorded
        self.replays += 1


@pytest.mark.parametrize("count", COUNTS)
def test_steps_are_counted(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Recorder(monkeypatch)
    generator, told = torch.Generator(), [0]
    repeat_captured(cuda.step, count, torch.device("cuda"), generator, told.append)
    assert cuda.done == sum(told) == count
    assert (cuda.replays > 0) == (count >= 103)
    assert cuda.generators == [generator] * (count >= 103)
    assert cuda.recorded <= 37


def test_none_are_left_over_where_that_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Recorder(monkeypatch)
    repeat_captured(cuda.step, 300, torch.device("cuda"))
    assert (cuda.recorded, cuda.replays) == (27, 11)  # after 3 plain ones


@pytest.mark.parametrize("count", [6, 7, 32])
def test_one_large_step_a_graph(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Recorder(monkeypatch)
    repeat_captured(cuda.step, count, torch.device("cuda"), chunk=1)
    assert (cuda.done, cuda.recorded) == (count, int(count >= 7))
    assert cuda.replays == (count - 3 if count >= 7 else 0)


@pytest.mark.parametrize("count", COUNTS)
def test_steps_that_cannot_be_captured(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Recorder(monkeypatch, NOT_PERMITTED)
    warned = pytest.warns(RuntimeWarning, match="one by one.*do not fit.*is capturing")
    told = [0]
    with warned if count >= 103 else nullcontext():
        repeat_captured(cuda.step, count, torch.device("cuda"), None, told.append)
    assert cuda.done == sum(told) == count
    assert not cuda.recording


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),  # of a library, or of the native ops
    ],
    ids=["allocator", "driver"],
)
@pytest.mark.parametrize("handled", [False, True])
def test_memory_that_runs_out_is_called_that(
    error: Exception, handled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever else is being handled, and whatever ending the capture says."""
    cuda = Recorder(monkeypatch, error)

    def solve() -> None:
        repeat_captured(cuda.step, 300, torch.device("cuda"))

    with pytest.warns(RuntimeWarning, match=r"one by one, since memory ran out .*out of memory"):
        if handled:
            try:
                raise KeyError("an earlier failure of the caller's")
            except KeyError:
                solve()
        else:
            solve()
    assert cuda.done == 300


@pytest.mark.parametrize("handled", ["CUDA out of memory", "something else"])
def test_other_failures_are_not(handled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Recorder(monkeypatch, NOT_PERMITTED)
    with pytest.warns(RuntimeWarning, match="since they do not fit into a CUDA graph: oper"):
        try:
            raise RuntimeError(handled)
        except RuntimeError:
            repeat_captured(cuda.step, 300, torch.device("cuda"))


@pytest.mark.parametrize("count", COUNTS)
def test_the_cpu_has_no_graphs(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Recorder(monkeypatch)
    repeat_captured(cuda.step, count, torch.device("cpu"), None, lambda steps: None)
    assert (cuda.done, cuda.replays) == (count, 0)


def _in_a_row(step: Callable[[], None], count: int, *_: object, **__: object) -> None:
    for _ in range(count):
        step()


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("layer", [nn.Linear(40, 24), nn.Conv2d(4, 8, 3, groups=2)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"products": "float32"},
        {"objective": "sampled", "activation": "relu"},
        {"granularity": "per_group", "group_size": 2, "starts": ("gptq",)},
    ],
    ids=["gram", "float32", "sampled", "groups"],
)
def test_bits_of_graphs(
    device: str, layer: nn.Module, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AdaRoundConfig(starts=("adaround",), steps=137, progress=False)
    layer = layer.to(device)
    x = torch.randn((50, 40) if isinstance(layer, nn.Linear) else (20, 4, 6, 6), device=device)
    replayed = optimize_layer(layer, x, config=config, **settings)
    for user in ("anneal", "scales"):
        monkeypatch.setattr(f"adaround_ext.rounding.{user}.repeat_captured", _in_a_row)
    plain = optimize_layer(layer, x, config=config, **settings)
    assert torch.equal(replayed.codes, plain.codes)
    assert replayed.report.losses == plain.report.losses
