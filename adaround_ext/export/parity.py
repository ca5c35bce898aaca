"""Parity: exported models run in their runtimes, beside the simulated model they came from."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from math import inf, isfinite, sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext.checks import check_module
from adaround_ext.export.formats import format_module
from adaround_ext.export.half_precision import HalfPrecision, changed
from adaround_ext.export.manifest import path_of, read_manifest
from adaround_ext.export.parity_report import OutputParity, ParityReport, RunnerParity
from adaround_ext.export.runner import Runner, module_runner
from adaround_ext.tensors import tensors
from adaround_ext.tracing.arguments import Arguments
from adaround_ext.tracing.evaluation import evaluation

TOLERANCE = 1e-5  # of the relative error: float32 sums in another order


def verify(
    model: nn.Module,
    folders: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    data: Iterable[Any],
    *,
    tolerance: float = TOLERANCE,
) -> ParityReport:
    """Runs exported directories in their runtimes beside ``model``, the simulated one.

    In 16 bits equality is promised where the model's own operators run. Elsewhere its weights must
    be stored bit by bit, and outputs be no farther from the model's than 16 bits make them: some
    times the distance between these and those of a copy of the model in float32, which is run for
    that.

    Args:
        model: The quantized model that was exported.
        folders: One directory that an export wrote, or several.
        data: Batches as :func:`adaround_ext.quantize_` takes them; one tensor or mapping is one
            batch.
        tolerance: The relative error, ||a - b||_2 / ||b||_2, up to which outputs count as equal
            where equality is promised.

    Returns:
        The errors of every output, for every way of running each export.

    Raises:
        TypeError: For what is no module, no paths, no batches or no number.
        ValueError: A directory is damaged or of an unknown format; or the data can show nothing:
            there is none, it is NaN, or an output of the model has no finite number.
        FileNotFoundError: A directory has no manifest.
        ImportError: A runtime is not installed.
    """
    check_module(model)
    paths = _paths(folders)
    reader = Arguments(model, "data")
    batches = _batches(data, reader)
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance must be a number, got {tolerance!r}")
    if not 0 <= tolerance < inf:
        raise ValueError(f"tolerance must be finite and at least 0, got {tolerance}")
    with evaluation(model):
        expected = [module_runner("simulated", model).run(*batch) for batch in batches]
        _check_outputs(expected)
        half = HalfPrecision(model, batches, expected, _relative_error)
        runs = [
            _judged(kind, runner, _compare(kind, runner, batches, expected), half, tolerance)
            for path in paths
            for kind, runner in _runners(path, model)
        ]
    return ParityReport(
        type(model).__name__, len(batches), tolerance, tuple(runs), tuple(reader.notes)
    )


def _paths(folders: object) -> list[Path]:
    if isinstance(folders, (str, os.PathLike)) or not isinstance(folders, Iterable):
        folders = [folders]
    paths = [path_of(folder) for folder in folders]
    if not paths:
        raise ValueError("folders must hold at least one export, got none")
    return paths


def _batches(data: object, reader: Arguments) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise TypeError(f"data must be an iterable of batches, got {type(data).__name__}")
    rule = "data must hold what the model takes"
    given = [data] if isinstance(data, (Tensor, Mapping)) else data
    batches = [reader.check(batch, index, rule) for index, batch in enumerate(given)]
    if not batches:
        raise ValueError("data must hold at least one batch, got none")
    for index, batch in enumerate(batches):
        inputs = list(tensors(batch))
        if inputs and not any(tensor.numel() for tensor in inputs):
            raise ValueError(f"data must hold samples, got none in batch {index}")
        bad = sum(int(tensor.isnan().sum()) for tensor in inputs)
        if bad:
            raise ValueError(f"data must not be NaN, got {bad} such values in batch {index}")
    return batches


def _check_outputs(expected: Sequence[Sequence[Tensor]]) -> None:
    """That there is something to compare: the same NaN in both models shows nothing."""
    for index in range(len(expected[0])):
        of_all_batches = [outputs[index] for outputs in expected if index < len(outputs)]
        if not any(bool(tensor.isfinite().any()) for tensor in of_all_batches):
            raise ValueError(f"data must give finite numbers, got none in output {index}")


def _runners(folder: Path, model: nn.Module) -> list[tuple[str, Runner]]:
    kind = read_manifest(folder).kind
    return [(kind, runner) for runner in format_module(kind).runners(folder, model)]


def _compare(
    kind: str,
    runner: Runner,
    batches: Sequence[tuple[tuple[Any, ...], dict[str, Any]]],
    expected: Sequence[list[Tensor]],
) -> tuple[OutputParity, ...]:
    got = [runner.run(*batch) for batch in batches]
    counts = {len(outputs) for outputs in (*got, *expected)}
    if len(counts) != 1:
        raise ValueError(
            f"{kind}, {runner.name} must give the {len(expected[0])} outputs of the simulated "
            f"model, got {len(got[0])}"
        )
    return _parities(got, expected)


def _judged(
    kind: str,
    runner: Runner,
    outputs: tuple[OutputParity, ...],
    half: HalfPrecision,
    tolerance: float,
) -> RunnerParity:
    """By what the runner promises, as far as the model's dtypes let anything be promised."""
    run = RunnerParity(kind, runner.name, runner.exact, runner.note, outputs)
    if not runner.exact:
        return run
    if runner.same_operators or not half.dtypes:
        return dataclasses.replace(run, allowed=tolerance)
    near = run.relative_error <= tolerance  # then there is nothing to measure
    return dataclasses.replace(
        run,
        exact=False,
        note=f"the model is {half.names}: other operators and orders of sums round otherwise",
        allowed=tolerance if near else max(tolerance, half.allowed),
        changed=() if runner.stored is None else changed(runner.stored(), half.model),
    )


def _parities(
    got: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]
) -> tuple[OutputParity, ...]:
    """By output, over all batches."""
    by_output = zip(zip(*got, strict=True), zip(*expected, strict=True), strict=True)
    return tuple(_parity(a, b) for a, b in by_output)


def _relative_error(got: Sequence[Sequence[Tensor]], expected: Sequence[Sequence[Tensor]]) -> float:
    """Of the worst output."""
    return max((output.relative_error for output in _parities(got, expected)), default=0.0)


def _parity(got: Sequence[Tensor], expected: Sequence[Tensor]) -> OutputParity:
    shape = tuple(expected[0].shape)
    if any(a.shape != b.shape for a, b in zip(got, expected, strict=True)):
        return OutputParity(shape, inf, inf, 0.0)
    error = power = largest = 0.0
    same = vectors = 0
    for a, b in zip(got, expected, strict=True):
        left, right = a.detach().cpu().double(), b.detach().cpu().double()
        # Equal infinities, as of masked logits, and NaN beside NaN are equal.
        equal = (left == right) | (left.isnan() & right.isnan())
        difference = torch.where(equal, 0.0, left - right)
        error += float(difference.square().sum())
        power += float(torch.where(right.isfinite(), right, 0.0).square().sum())
        largest = (
            max(largest, float(difference.abs().nan_to_num(inf).max())) if left.numel() else 0.0
        )
        if b.is_floating_point() and b.dim() > 0 and b.shape[-1] > 0:
            same += int((left.argmax(-1) == right.argmax(-1)).sum())
            vectors += left[..., 0].numel()
    relative = sqrt(error / power) if power and isfinite(error) else (0.0 if error == 0 else inf)
    return OutputParity(shape, largest, relative, same / vectors if vectors else None)
