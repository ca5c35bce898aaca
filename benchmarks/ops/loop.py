"""The annealing loop: seconds a step, what the host does for it, and where the time goes.

On CUDA the steps as a graph and one by one; float32, TF32 (on CUDA) and bfloat16 products. A step
is the product 2 D G (2 rows cols^2 operations) and rounding_step_ (36 bytes a weight with float32
products, 32 with bfloat16). Seconds are those of a run less those of a shorter run, so that what
comes once, as the capture of the graph, does not count.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from adaround_ext import AdaRoundConfig
from adaround_ext.grid import make_grid
from adaround_ext.layers import inputs as data
from adaround_ext.layers.matrix import matrix_layer
from adaround_ext.linalg.precision import full_precision
from adaround_ext.presets import settings
from adaround_ext.rounding.anneal import anneal
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.statistics.moments import GramStatistics
from benchmarks import common
from benchmarks.common import Options, Target

_CPU_SHAPES = [(384, 384), (1536, 384), (384, 1536), (1024, 1024)]
_CUDA_SHAPES = [(384, 384), (1024, 1024), (4096, 4096)]
_STEPS, _STEPS_OF_LARGE = 2000, 400
_LARGE = 1 << 22  # weights
_FEW = 4  # the shorter run has this fraction of the steps
_PROFILED = 480
_SAMPLES = 5
_PRODUCTS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
# On the H200, of a step of 384x384 in a graph with TF32 products.
_MOST_MICROSECONDS = 8.0


@dataclass(frozen=True)
class _Case:
    """The loop of one layer with random weights; :meth:`run` is ``steps`` steps of it."""

    weight: Tensor
    objective: GramObjective
    products: str

    @staticmethod
    def make(shape: tuple[int, int], products: str, device: torch.device) -> _Case:
        rows, cols = shape
        generator = torch.Generator(device).manual_seed(0)
        layer = nn.Linear(cols, rows, bias=False, device=device)
        mixing = torch.randn(cols, cols, generator=generator, device=device)
        inputs = torch.randn(2 * cols, cols, generator=generator, device=device) @ mixing
        view = matrix_layer(layer)
        moments = GramStatistics([view], positions=None, seed=0)
        moments.collect(data.batches([view], "layer", inputs, None))
        weight = view.weight_matrix().clone()
        objective = GramObjective(weight, moments, dtype=_PRODUCTS[products])
        return _Case(weight, objective, products)

    def run(self, steps: int) -> Tensor:
        """V at the end."""
        config = AdaRoundConfig(steps=steps, starts=("adaround",), products=self.products)
        grid = make_grid(self.weight, config)
        return anneal(
            self.weight,
            grid,
            self.objective,
            settings(config, "gram", self.weight.shape[1]),
            config,
        ).v


def run(options: Options) -> tuple[list[dict[str, Any]], list[Target]]:
    """Rows and targets; prints the table."""
    shapes = _CUDA_SHAPES if options.device.type == "cuda" else _CPU_SHAPES
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), full_precision(options.device):
        for shape in shapes[:1] if options.quick else shapes:
            for products in _PRODUCTS:
                if products == "tf32" and options.device.type != "cuda":
                    continue
                common.note(f"loop {shape[0]}x{shape[1]}, {products} products")
                rows += _measure(shape, products, options)
    names = ("shape", "products", "steps as", "us a step", "p20", "p80", "TFLOP/s", "launches")
    table = [[row[name] for name in names] for row in rows]
    common.print_table("The annealing loop", names, table)
    return rows, _targets(rows) if options.device.type == "cuda" else []


def _measure(shape: tuple[int, int], products: str, options: Options) -> list[dict[str, Any]]:
    case = _Case.make(shape, products, options.device)
    ways = {"launches": one_by_one, "graph": as_they_are}
    if options.device.type != "cuda":
        ways = {"launches": as_they_are}
    steps = _STEPS if shape[0] * shape[1] < _LARGE else _STEPS_OF_LARGE
    steps = steps // 4 if options.quick else steps
    solutions = {}
    for way, context in ways.items():
        with context():
            solutions[way] = case.run(steps)
    for way, v in solutions.items():
        common.assert_agree(f"V by {way}", v, solutions["launches"], 0.0)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(_SAMPLES):
        for way, context in ways.items():
            with context():
                long = common.seconds_of(lambda: case.run(steps), options.device)
                short = common.seconds_of(lambda: case.run(steps // _FEW), options.device)
            seconds[way].append((long - short) / (steps - steps // _FEW))
    operations = 2 * shape[0] * shape[1] ** 2
    rows = []
    for way, values in seconds.items():
        deciles = statistics.quantiles(values, n=10, method="inclusive")
        with ways[way]():
            counted = host_work(case.run, options.device)
        median = statistics.median(values)
        rows.append(
            {
                "shape": f"{shape[0]}x{shape[1]}",
                "products": products,
                "steps as": way,
                "us a step": 1e6 * median,
                "p20": 1e6 * deciles[1],
                "p80": 1e6 * deciles[7],
                "TFLOP/s": operations / median / 1e12,
            }
            | counted
        )
    return rows


@contextmanager
def as_they_are() -> Iterator[None]:
    """Steps as the package does them."""
    yield


@contextmanager
def one_by_one() -> Iterator[None]:
    """No graphs."""

    def plain(step: Callable[[], None], count: int, *_: object) -> None:
        for _ in range(count):
            step()

    with mock.patch("adaround_ext.rounding.anneal.repeat_captured", plain):
        yield


def host_work(run: Callable[[int], object], device: torch.device) -> dict[str, float]:
    """launches: what the host starts a step, kernels or graphs (on the CPU: operators of torch);
    host us: its time for all it does, a step. By torch's profiler, of the difference of two runs.
    """
    few = _PROFILED // _FEW
    counts, micros = [], []
    for steps in (_PROFILED, few):
        activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        run(steps)
        with profile(activities=activities) as profiler:
            run(steps)
            common.synchronize(device)
        events = [e for e in profiler.events() or [] if e.device_type.name == "CPU"]
        if device.type == "cuda":
            started = [e for e in events if e.name.startswith("cu") and "Launch" in e.name]
        else:
            started = [e for e in events if e.cpu_parent is None]
        counts.append(len(started))
        micros.append(sum(e.self_cpu_time_total for e in events if "Synchronize" not in e.name))
    steps = _PROFILED - few
    return {
        "launches": (counts[0] - counts[1]) / steps,
        "host us": (micros[0] - micros[1]) / steps,
    }


def _targets(rows: list[dict[str, Any]]) -> list[Target]:
    promised = {"shape": "384x384", "steps as": "graph", "products": "tf32"}
    (row,) = [one for one in rows if promised.items() <= one.items()]
    name = "384x384, microseconds a step in a graph, TF32 products"
    return [Target(name, row["us a step"], most=_MOST_MICROSECONDS)]
