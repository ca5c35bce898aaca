"""What the ranks of test_distributed.py do."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adaround_ext import ActivationConfig, quantize_
from adaround_ext.model import solve_units
from adaround_ext.rounding import gram_solver
from tests.model.test_quantize import codes
from tests.support import models

Case = tuple[Callable[[], nn.Module], Callable[[], list[Any]], dict[str, Any]]
FAST = "fast reduction"
QUICK: dict[str, Any] = {"preset": "fast", "bits": 3, "progress": False}
FEW: dict[str, Any] = {"steps": 20, "search_steps": 30, "scale_candidates": 3}


def images(count: int = 9) -> list[Tensor]:
    return [torch.randn(4, 3, 8, 8) for _ in range(count)]


def tokens() -> list[dict[str, Tensor]]:
    return [{"ids": models.tokens(4, n)} for n in (6, 3, 5, 6, 2, 4, 6)]


def wide() -> nn.Module:
    """Rows for several blocks of 16 each, one of them not full, and a layer of few rows."""
    return nn.Sequential(
        nn.Linear(40, 87), nn.ReLU(), nn.Linear(87, 33), nn.GELU(), nn.Linear(33, 3)
    )


class Sorted(nn.Module):
    """Rows in the order of the data; a second layer that only later batches have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(40, 40), nn.Linear(40, 87)
        self.last, self.late = nn.Linear(87, 3), nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if len(x) > 16:
            x = x + self.late(torch.tanh(x))
        return self.last(torch.relu(self.second(x[x[:, 0].argsort()])))


def sizes() -> list[Tensor]:
    return [torch.randn(n, 40) + 0.5 for n in (16, 16, 8, 16, 24, 16, 16, 17)]


def rows(count: int = 11) -> list[Tensor]:
    return [torch.randn(16, 40) + 0.5 for _ in range(count)]


# name: (model, batches, arguments of quantize_)
CASES: dict[str, Case] = {
    "convolutions": (models.ResidualNet, images, {}),
    "parallel": (models.ResidualNet, images, {"mode": "parallel"}),
    "shared inputs": (models.Transformer, tokens, {"padding_mask": None}),
    "rows": (wide, rows, {"preset": "best", **FEW}),
    "groups of columns": (
        wide,
        rows,
        {
            "preset": "balanced",
            **FEW,
            "overrides": {"0": {"granularity": "per_group", "group_size": 8, "symmetric": False}},
        },
    ),
    "one scale a layer": (wide, rows, {"granularity": "per_tensor"}),
    "few batches": (wide, lambda: rows(1), {}),
    "positions": (models.ResidualNet, images, {"positions": 5}),
    "activations": (models.ResidualNet, images, {"activations": ActivationConfig()}),
    "activation aware": (models.ResidualNet, images, {"activation_aware": True, "steps": 20}),
    "routes": (models.Experts, lambda: [torch.randn(24, 8) for _ in range(5)], {}),
    "chosen rows": (Sorted, sizes, {"bits": 8}),
    "rounded recordings": (
        models.ResidualNet,
        images,
        {"cache_dtype": torch.bfloat16, "memory_budget": 0},
    ),
}


def run_case(
    name: str, process_group: dist.ProcessGroup | None, **arguments: Any
) -> dict[str, Tensor]:
    """Codes and parameters of a quantized model."""
    make, data, own = CASES[name]
    torch.manual_seed(0)
    model, batches = make(), data()
    settings = {**QUICK, **own, **arguments}
    quantize_(model, batches, process_group=process_group, **settings)
    return model.state_dict() | {f"{layer}.codes": own for layer, own in codes(model).items()}


def run(group: dist.ProcessGroup, folder: str) -> None:
    """Every case, its result in a file."""
    found = {name: run_case(name, group) for name in CASES}
    checkpoint = f"{folder}/{FAST}"
    found[FAST] = run_case("convolutions", group, reduction="fast", checkpoint_dir=checkpoint)
    torch.save(found, Path(folder) / f"{dist.get_rank()}.pt")


def fail(group: dist.ProcessGroup, folder: str, mistake: str) -> None:
    """One rank fails at some moment."""
    torch.manual_seed(0)
    model, batches = models.ResidualNet(), images()
    arguments: dict[str, Any] = {}
    second = dist.get_rank() == 1
    if mistake == "nan" and second:
        batches[2][0] = torch.nan
    if mistake == "late" and second:
        model.stem.register_forward_pre_hook(_fails("the 20th call", 20))
    if mistake == "solver" and not second:
        gram_solver.search_scales = _fails("no memory left", 0)  # type: ignore[assignment]
    if mistake == "checkpoint":
        arguments["checkpoint_dir"] = folder  # which holds the ranks' own files
    quantize_(model, batches, process_group=group, **QUICK, **arguments)


def _fails(message: str, after: int) -> Callable[..., None]:
    calls = iter(range(after))

    def call(*_: object) -> None:
        if next(calls, None) is None:
            raise ValueError(message)

    return call


def differ(group: dist.ProcessGroup, folder: str, difference: str) -> None:
    """The second rank has another model, other data or another argument."""
    torch.manual_seed(0)
    model, batches, settings = models.ResidualNet(), images(), dict(QUICK)
    if dist.get_rank() == 1:
        if difference == "model":
            nn.init.normal_(model.stem.weight)
        elif difference == "data":
            batches.pop()
        else:
            settings[difference] = {"bits": 4, "reduction": "fast", "memory_budget": 0}[difference]
    quantize_(model, batches, process_group=group, **settings)


def die(group: dist.ProcessGroup, folder: str, checkpoint: str) -> None:
    """The second rank is gone when it should solve its fifth problem."""
    solve, left = solve_units.solve, iter(range(4))

    def until(*given: Any) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return solve(*given)

    if dist.get_rank() == 1:
        solve_units.solve = until  # type: ignore[assignment]
    run_case("convolutions", group, checkpoint_dir=checkpoint)


def resume(group: dist.ProcessGroup, folder: str, checkpoint: str) -> None:
    """The run that died, again."""
    found = run_case("convolutions", group, checkpoint_dir=checkpoint)
    torch.save(found, Path(folder) / f"{dist.get_rank()}.pt")


COMMANDS = {"run": run, "fail": fail, "differ": differ, "die": die, "resume": resume}


def rank_of(rank: int, world: int, folder: str, command: str, *arguments: str) -> None:
    """One rank: what it says goes to RANK.log in ``folder``."""
    os.dup2(os.open(f"{folder}/{rank}.log", os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    group = dist.group.WORLD
    assert group is not None
    COMMANDS[command](group, folder, *arguments)
    dist.destroy_process_group()
