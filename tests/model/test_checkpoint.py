"""A run that ends in the middle goes on where it was, and ends with the same bits."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, quantize_
from adaround_ext.model import checkpoint
from adaround_ext.model.checkpoint import model_digest
from tests.model.test_quantize import codes
from tests.support import models

pytestmark = pytest.mark.usefixtures("one_thread")
FAST: dict[str, Any] = {"preset": "fast", "bits": 3, "progress": False}


class _Killed(BaseException):
    pass


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(3)]


def interrupted(
    model: nn.Module,
    after: int,
    monkeypatch: pytest.MonkeyPatch,
    data: Iterable[Any] | None = None,
    **arguments: Any,
) -> None:
    """quantize_ that ends when ``after`` layers have been written."""
    saved = 0
    save = checkpoint.Checkpoint.save

    def counted(self: Any, index: int, result: Any) -> None:
        nonlocal saved
        save(self, index, result)
        saved += 1
        if saved == after:
            raise _Killed

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(checkpoint.Checkpoint, "save", counted)
        quantize_(model, batches() if data is None else data, **FAST | arguments)


@pytest.mark.parametrize("after", [1, 2, 4, 7])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"mode": "parallel"},
        {"cache_dtype": torch.bfloat16, "memory_budget": 0},
        {"activations": ActivationConfig(), "equalize": True},
    ],
    ids=["sequential", "parallel", "rounded", "activations"],
)
def test_same_bits_after_an_interruption(
    after: int, arguments: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.ResidualNet()
    whole, broken = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(whole, batches(), **FAST, **arguments)
    interrupted(broken, after, monkeypatch, checkpoint_dir=tmp_path, **arguments)
    assert all(
        torch.equal(a, b) for a, b in zip(broken.parameters(), model.parameters(), strict=True)
    )
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("layer_*")}
    assert len(files) == after
    report = quantize_(broken, batches(), checkpoint_dir=tmp_path, **FAST, **arguments)
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())
    assert any(f"{after} layers from checkpoint_dir" in note for note in report.notes)
    one, two = codes(whole), codes(broken)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    state = whole.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in broken.state_dict().items())


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    model, again = models.ResidualNet(), models.ResidualNet()
    again.load_state_dict(model.state_dict())
    quantize_(model, batches(), checkpoint_dir=tmp_path, **FAST)
    assert quantize_(again, batches(), checkpoint_dir=tmp_path, **FAST).passes == 0
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in again.state_dict().items())


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ("weight", "model"),
        ("data", "calibration"),
        ("bits", "configuration"),
        ("mode", "mode"),
        ("file", "unreadable"),
    ],
)
def test_another_run_is_refused(change: str, part: str, tmp_path: Path) -> None:
    model, data, arguments = models.ResidualNet(), batches(), dict(FAST)
    other = copy.deepcopy(model)
    quantize_(model, data, checkpoint_dir=tmp_path, **arguments)
    if change == "weight":
        with torch.no_grad():
            other.head.bias[0] += 1
    elif change == "data":
        data[2][0, 0, 0, 0] += 1
    elif change == "bits":
        arguments["overrides"] = {"head": {"bits": 4}}
    elif change == "mode":
        arguments["mode"] = "parallel"
    else:
        (tmp_path / "checkpoint.json").write_text("{")
    state = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=rf"checkpoint_dir must be that .*{part}"):
        quantize_(other, data, checkpoint_dir=tmp_path, **arguments)
    assert all(torch.equal(t, state[n]) for n, t in other.state_dict().items())


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"checkpoint_dir must be empty.*thesis\.tex"):
        quantize_(models.ResidualNet(), batches(), checkpoint_dir=tmp_path, **FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


_SCRIPT = """
import sys
import torch
from adaround_ext import quantize_
from tests.support import models
from tests.model.test_checkpoint import FAST, batches

torch.set_num_threads(1)
torch.manual_seed(0)
model = models.ResidualNet()
print("ready", flush=True)
for round in range(1000):  # so that there is always something to kill
    quantize_(model, batches(), checkpoint_dir=f"{sys.argv[1]}/{round}", **FAST)
"""


def test_killed_and_resumed(tmp_path: Path) -> None:
    """SIGKILL at whatever moment; python -m benchmarks kill_and_resume does it many times."""
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    while not list(tmp_path.glob("0/layer_00003*")):
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    torch.manual_seed(0)
    whole = models.ResidualNet()  # as the process had it
    again = copy.deepcopy(whole)
    quantize_(again, batches(), checkpoint_dir=tmp_path / "0", **FAST)
    quantize_(whole, batches(), **FAST)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in whole.state_dict().items())


def test_parameters_that_hold_no_data_are_told_apart_by_their_shapes() -> None:
    digests = [model_digest(nn.Linear(3, cols, device="meta")) for cols in (4, 5, 4)]
    assert digests[0] == digests[2] != digests[1]
