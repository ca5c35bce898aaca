"""Rows of a layer solved on threads of the package: same bits, nothing left behind, prompt ends."""

from __future__ import annotations

import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import LayerResult, lone_threads, optimize_layer
from adaround_ext import solve as solve_module
from adaround_ext.lone_threads import check_stop, on_one_thread, run_apart
from adaround_ext.problem import Problem, Solved
from tests.global_state import unchanged
from tests.helpers import threads

FEW: dict[str, Any] = {"steps": 20, "search_steps": 30, "scale_candidates": 4, "bits": 3}
GROUPS = {"granularity": "per_group", "group_size": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "balanced": {},
    "fast": {"preset": "fast"},
    "best": {"preset": "best"},
    "asymmetric": {"symmetric": False},
    "groups": GROUPS,
    "asymmetric groups": GROUPS | {"symmetric": False, "preset": "fast"},
    "groups that are no whole vectors": {"granularity": "per_group", "group_size": 6},
    "unrefined": {"refine": False, "starts": ("nearest", "adaround")},
    "min-max": {"scale": "min_max"},
    "bfloat16": {"products": "bfloat16", "scale_dtype": torch.float16},
    "tensor": {"granularity": "per_tensor"},
}
STEPS = 400_000  # half a minute's
# Whole blocks of 16, a part of one, fewer blocks than threads; rows that are no whole vectors.
SHAPES = [(64, 48), (37, 48), (70, 96), (5, 48), (1, 96), (37, 66), (1100, 18)]


def linear(rows: int, cols: int) -> tuple[nn.Module, Tensor, Tensor]:
    layer = nn.Linear(cols, rows)
    x = torch.randn(300, cols) @ torch.randn(cols, cols) + 0.5
    return layer, x, (layer(x * 1.05) + 0.1).detach()


def solved(count: int, *args: Any, **settings: Any) -> LayerResult:
    with threads(count):
        result = optimize_layer(*args, **FEW | settings)
    assert isinstance(result, LayerResult)
    return result


def assert_same(one: LayerResult, other: LayerResult) -> None:
    for name in ("codes", "scale", "zero_point", "weight_q", "bias"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name
    for name in ("losses", "energy", "starts", "fallback_rows", "flipped", "undecided"):
        assert getattr(one.report, name) == getattr(other.report, name), name


@pytest.mark.parametrize("bias", ["keep", "create"])
@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_any_number_of_threads(
    rows: int, cols: int, settings: dict[str, Any], targets: bool, bias: str
) -> None:
    if cols % settings.get("group_size", 1):
        pytest.skip("columns are not whole groups")
    if bias == "create" and rows > 70:
        pytest.skip("as with fewer rows")
    layer, x, y = linear(rows, cols)
    given = (layer, x, y if targets else None)
    expected = solved(1, *given, bias=bias, **settings)
    for count in (2, 3, 4):
        assert_same(solved(count, *given, bias=bias, **settings), expected)


def test_convolution_and_layers_together() -> None:
    conv, x = nn.Conv2d(16, 40, 3, padding=1), torch.randn(9, 16, 7, 8)
    assert_same(solved(3, conv, x), solved(1, conv, x))
    layers = [nn.Linear(48, rows) for rows in (20, 50, 3)]
    x = torch.randn(300, 48) + 0.5
    results = []
    for count in (1, 2, 4):
        with threads(count):
            results.append(optimize_layer(layers, x, **FEW))
    for one, other in zip(results[0] * 2, results[1] + results[2], strict=True):
        assert_same(one, other)


def spied(monkeypatch: pytest.MonkeyPatch, look: Callable[[Problem], object]) -> None:
    real = solve_module._solve_rows

    def spy(problem: Problem, config: Any) -> Solved:
        look(problem)
        return real(problem, config)

    monkeypatch.setattr(solve_module, "_solve_rows", spy)


def test_each_part_is_on_a_thread_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    caller = threading.get_ident()

    def look(problem: Problem) -> None:
        where = threading.get_ident() == caller
        flags = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        seen.append((problem.first_row, len(problem.weight), where, torch.get_num_threads(), flags))

    spied(monkeypatch, look)
    layer, x, _ = linear(70, 48)
    with (
        threads(2),
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.inference_mode(),
        unchanged(),
    ):
        optimize_layer(layer, x, **FEW)
    off = (False, False)
    assert sorted(seen) == [(0, 32, False, 1, off), (32, 38, False, 1, off)]
    seen.clear()
    solved(1, layer, x)
    assert seen == [(0, 70, True, 1, off)]


def test_seconds_are_those_on_the_wall() -> None:
    layer, x, _ = linear(96, 64)
    with threads(2):
        optimize_layer(layer, x, **FEW)
        begin = time.perf_counter()
        report = optimize_layer(layer, x, **FEW | {"search_steps": 4000}).report
    wall = time.perf_counter() - begin
    parts = dict(report.seconds)
    total = parts.pop("total")
    assert total == pytest.approx(sum(parts.values()))
    assert 0.3 * wall < total <= wall


def process_threads() -> tuple[int, str]:
    """What a thread has that is yet to use torch."""
    found: list[tuple[int, str]] = []

    def look() -> None:
        count = torch.get_num_threads()
        text = torch.__config__.parallel_info()
        found.append((count, re.sub(r"(?m)^.*environment.*$", "", text)))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_numbers_of_threads_stay(count: int) -> None:
    lone_threads._pool.cache_clear()  # so that threads start within
    with threads(count):
        before = process_threads()
        assert before[0] == count
        layer, x, _ = linear(70, 48)
        with unchanged():
            optimize_layer(layer, x, **FEW)
        assert process_threads() == before
        assert on_one_thread(torch.get_num_threads, torch.device("cpu")) == 1
        assert process_threads() == before and torch.get_num_threads() == count


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, StopIteration])
@pytest.mark.parametrize("part", [0, 1])
def test_a_part_that_fails(
    part: int, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other part ends early."""

    def look(problem: Problem) -> None:
        if (problem.first_row > 0) == part:
            raise kind("out of order")

    spied(monkeypatch, look)
    layer, x, _ = linear(70, 48)
    begin = time.perf_counter()
    with threads(2), unchanged(), pytest.raises(kind, match="out of order"):
        optimize_layer(layer, x, **FEW | {"steps": STEPS})
    assert time.perf_counter() - begin < 10


def test_an_interruption_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from the keyboard, while the parts are annealed."""
    main = threading.main_thread().ident
    assert main is not None
    sent: list[threading.Timer] = []

    def look(problem: Problem) -> None:
        if problem.first_row == 0:
            sent.append(threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)))
            sent[0].start()

    spied(monkeypatch, look)
    layer, x, _ = linear(70, 48)
    with threads(2), unchanged(), pytest.raises(KeyboardInterrupt):
        optimize_layer(layer, x, **FEW | {"steps": STEPS})
    monkeypatch.undo()
    assert_same(solved(2, layer, x), solved(1, layer, x))


def test_tasks() -> None:
    """Results in order; of errors that of the first task; what goes on is told to stop."""
    assert run_apart([lambda i=i: i for i in range(5)]) == [*range(5)]
    assert run_apart([]) == []

    def fails(text: str) -> None:
        raise ValueError(text)

    def goes_on() -> None:
        while True:
            check_stop()

    with pytest.raises(ValueError, match="one"):
        run_apart([goes_on, lambda: fails("one"), goes_on])
    check_stop()  # here nothing is to stop


def test_free_memory_of_the_threads_is_given_back() -> None:
    """Also where something small at the end of it is still there."""
    resident = Path("/proc/self/statm")
    if not resident.exists():
        pytest.skip("needs Linux")

    def task() -> Tensor:
        many = [torch.zeros(10_000) for _ in range(2_000)]  # 80 MB
        return many[-1]

    def megabytes() -> float:
        return int(resident.read_text().split()[1]) * resource.getpagesize() / 1e6

    run_apart([lambda: None, lambda: None])
    before = megabytes()
    held = run_apart([task, task])
    assert megabytes() - before < 30 and len(held) == 2
