"""Several processes on one model: the bits of one process, and one message when a rank fails.

The ranks are processes of their own under gloo, forked from a server that has everything imported:
a fresh start takes seconds. All cases of a world size run in one go.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from adaround_ext import quantize_
from adaround_ext.cli import main
from adaround_ext.distributed import Ranks, _released
from tests.support.distributed_cases import CASES, FAST, rank_of, run_case

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
WORLDS = (2, 4)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.distributed_cases"])


def start(world: int, folder: Path, command: str, *arguments: str) -> list[BaseProcess]:
    """The ranks, each running a command of distributed_cases; ``folder`` for what they leave."""
    folder.mkdir(exist_ok=True)
    processes = [
        _context.Process(target=rank_of, args=(rank, world, str(folder), command, *arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    return list(processes)


def ends(processes: list[BaseProcess], folder: Path) -> list[tuple[int | None, str]]:
    """Exit status and the end of stderr of each."""
    try:
        for process in processes:
            process.join(timeout=120)
    finally:
        for process in processes:
            process.kill()
    texts = [(folder / f"{rank}.log").read_text() for rank in range(len(processes))]
    return [(process.exitcode, text) for process, text in zip(processes, texts, strict=True)]


@pytest.fixture(scope="module", params=WORLDS)
def run_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every rank has left what it made of every case."""
    folder = tmp_path_factory.mktemp("ranks")
    for status, text in ends(start(request.param, folder, "run"), folder):
        assert status == 0, text
    return folder


@pytest.fixture(scope="module")
def found(run_folder: Path) -> list[dict[str, Any]]:
    """What every rank made of every case."""
    return [torch.load(path) for path in sorted(run_folder.glob("*.pt"))]


@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_one_process(name: str, found: list[dict[str, Any]]) -> None:
    expected = run_case(name, None)
    for rank in found:
        assert rank[name].keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(rank[name][key], tensor), key


def test_the_fast_reduction_has_the_same_result_at_all_ranks(found: list[dict[str, Any]]) -> None:
    expected = run_case("convolutions", None)
    first, *others = (rank[FAST] for rank in found)
    for key, tensor in first.items():
        assert all(torch.equal(tensor, other[key]) for other in others)
        if key.endswith("codes"):  # other last bits of the statistics move few codes, if any
            assert (tensor != expected[key]).double().mean() < 0.05


def test_a_checkpoint_of_the_fast_reduction_is_for_as_many_ranks(run_folder: Path) -> None:
    with pytest.raises(ValueError, match="of a run with another reduction"):
        run_case("convolutions", None, checkpoint_dir=str(run_folder / FAST))


@pytest.mark.parametrize(
    ("mistake", "rank", "message"),
    [
        ("nan", 1, "calibration must be finite"),
        ("late", 1, "the 20th call"),
        ("solver", 0, "no memory left"),
        ("checkpoint", 0, "checkpoint_dir must be empty"),
    ],
)
def test_one_rank_fails_and_all_say_so(
    mistake: str, rank: int, message: str, tmp_path: Path
) -> None:
    found = ends(start(2, tmp_path, "fail", mistake), tmp_path)
    assert all(status == 1 for status, _ in found)
    last = [text.strip().splitlines()[-1] for _, text in found]
    assert message in last[rank] and f"rank {rank}" not in last[rank]
    assert f"RuntimeError: rank {rank} stopped during" in last[1 - rank]
    assert message in last[1 - rank]


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("model", "model must be the same on all ranks, got another on 1"),
        ("data", "calibration must be the same on all ranks, got another on 1"),
        ("bits", "configuration must be the same on all ranks, got another on 1"),
        ("reduction", "reduction must be the same on all ranks, got another on 1"),
        ("memory_budget", "memory_budget must be the same on all ranks, got another on 1"),
    ],
)
def test_ranks_that_were_given_different_things(
    difference: str, message: str, tmp_path: Path
) -> None:
    for status, text in ends(start(2, tmp_path, "differ", difference), tmp_path):
        assert status == 1 and message in text


def test_a_rank_that_dies_leaves_a_message_and_a_checkpoint(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    (status, text), (killed, _) = ends(start(2, tmp_path, "die", str(checkpoint)), tmp_path)
    assert killed == -signal.SIGKILL and status == 1
    assert "another rank stopped answering during" in text and "checkpoint_dir" in text
    done = {path.name: path.stat().st_mtime_ns for path in checkpoint.glob("layer_*")}
    assert done
    again = tmp_path / "again"
    for status, text in ends(start(2, again, "resume", str(checkpoint)), again):
        assert status == 0, text
    assert done == {name: (checkpoint / name).stat().st_mtime_ns for name in done}
    expected = run_case("convolutions", None)
    for rank in range(2):
        resumed = torch.load(again / f"{rank}.pt")
        assert all(torch.equal(resumed[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("weights", [[1.0], [5, 1, 1, 1], [1] * 16, [0, 0], [3, 0, 0, 9]])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_consecutive_and_leave_nothing_out(weights: list[float], size: int) -> None:
    ranks = Ranks()
    ranks.size = size
    shares = ranks.share(weights)
    assert len(shares) == size
    assert [item for share in shares for item in share] == list(range(len(weights)))
    loads = [sum(weights[i] for i in share) for share in shares]
    assert max(loads) <= sum(weights) / size + max(weights)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reduction": "ring"}, ValueError, "reduction must be one of ordered, fast, got 'ring'"),
        ({"process_group": 2}, TypeError, "process_group must be a group of torch.distributed"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = torch.nn.Linear(4, 4)
    with pytest.raises(error, match=message):
        quantize_(model, torch.randn(8, 4), progress=False, **arguments)


def test_a_call_ends_when_no_thread_holds_its_tensors() -> None:
    """A thread that lets go of one while the process ends would abort it."""
    tensor, graph = torch.ones(3), list[torch.Tensor]()
    with _released(([tensor], 2)):
        graph.append(tensor * torch.ones(3, requires_grad=True))  # holds it for the gradient
        threading.Timer(0.2, graph.clear).start()
    assert not graph


def test_the_command_line_under_torchrun(folder: Path) -> None:
    """One rank writes and speaks; the model is that of one process."""
    module = "nets_of_the_cli"
    command = ["quantize", f"{module}:net", "--data", f"{module}:images", "--preset", "fast"]
    assert main([*command, "--quiet", "--output", "one"]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "adaround_ext", *command, "--json", "--output", "two"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{folder}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == 2
    names = {path.name for path in Path("one").iterdir()}
    assert names == {path.name for path in Path("two").iterdir()}
    weights = [(Path(name) / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
