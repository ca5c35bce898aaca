"""Any number of threads gives a layer the same bits, and leaves them as they were."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import LayerResult, optimize_layer
from adaround_ext.process import one_thread
from adaround_ext.process.one_thread import on_one_thread
from tests.support.global_state import unchanged
from tests.support.helpers import threads

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


@pytest.mark.parametrize(("targets", "bias"), [(False, "create"), (True, "keep")])
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
    one_thread._pool.cache_clear()  # so that threads start within
    with threads(count):
        before = process_threads()
        assert before[0] == count
        layer, x, _ = linear(70, 48)
        with unchanged():
            optimize_layer(layer, x, **FEW)
        assert process_threads() == before
        assert on_one_thread(torch.get_num_threads, torch.device("cpu")) == 1
        assert process_threads() == before and torch.get_num_threads() == count
