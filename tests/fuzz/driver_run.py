"""One case of the driver: called, and judged."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from adaround_ext import LayerResult, ModelReport, optimize_layer, quantize_
from adaround_ext.grid import quant_range
from adaround_ext.layers.matrix import SUPPORTED, matrix_layer
from adaround_ext.report.layer import LayerReport
from adaround_ext.result import QuantizedWeight
from tests.fuzz import driver_models, driver_state, driver_values
from tests.fuzz.bits import bits
from tests.fuzz.driver_cases import DriverCase, driver_cases
from tests.fuzz.verdict import check_error, require
from tests.support import models
from tests.support.global_state import process_state

Case = DriverCase
cases = driver_cases
# Values by which a bias may grow so that the asymmetric form cancels all digits of a loss.
_SPREAD = ("large", "extreme", "outlier")
# Little work, unless a case asks for more.
_QUICK = {"preset": "fast", "steps": 3, "search_steps": 10, "rounds": 1, "scale_candidates": 3}
_WORDS = {
    *driver_values.SETTINGS, *driver_values.MODEL_SETTINGS, *driver_values.BAD_SETTINGS,
    *driver_values.BAD_MODEL_SETTINGS, "layer", "layers", "inputs", "targets",
    "calibration", "model", "weight", "weights", "qmin", "sample", "samples",
}  # fmt: skip


def run(case: DriverCase) -> str:
    """How the case ended: "refused", "raised" (what is not ours) or "right"."""
    torch.manual_seed(case.seed)
    model, x = (driver_models.LAYERS | driver_models.BAD_LAYERS | driver_models.MODELS
                | driver_models.BAD_MODELS)[case.model]()  # fmt: skip
    model, x = _prepared(case, model, x)
    arguments = _arguments(case, model, x)
    settings = {
        name: driver_values.decode(value, _rows(model))
        for name, value in (_QUICK | case.settings).items()
    }
    held = [m for m in _modules(model) if isinstance(m, nn.Module)]
    given = [t for t in pytree.tree_leaves((arguments, settings)) if isinstance(t, Tensor)]
    writes = case.call == "quantize_"
    before, process = _states(held, given, False), process_state()
    kept = _states(held, given, writes)
    handed = iter(model) if case.model == "iterator" else model
    result, error = _call(case, handed, arguments, settings)
    driver_state.require_same(process, process_state())
    if error is not None:
        driver_state.require_same(before, _states(held, given, False))
        forward = settings.get("forward_fn") or models.run
        own = writes and _raises_itself(forward, model, [x, *_batches(arguments[0])], error)
        return "raised" if own else _judge_error(error, case, model)
    driver_state.require_same(kept, _states(held, given, writes))
    if writes:
        _check_model(case, model, result)
    else:
        _check_layers(case, model, result, settings)
    return "right"


def _prepared(case: DriverCase, model: Any, x: Tensor) -> tuple[Any, Tensor]:
    """In the case's dtype and mode; models that are odd in either stay as they are."""
    dtype = getattr(torch, case.dtype)
    for module in _modules(model):
        if isinstance(module, nn.Module):
            module.train(case.train)
            if case.model in driver_models.LAYERS or case.model in driver_models.MODELS:
                module.to(dtype)
    if x.is_floating_point():
        x = x.to(dtype)
    return model, driver_values.values(x, case.values)


def _arguments(case: DriverCase, model: Any, x: Tensor) -> list[Any]:
    """inputs and targets, or the calibration data."""
    arguments = [driver_values.data(x, case.data)]
    if case.targets != "none":
        arguments.append(driver_values.data(_outputs(model, x), case.targets))
    return arguments


def _outputs(model: Any, x: Tensor) -> Tensor:
    """A little beside what the layer gives; anything where it gives nothing."""
    layer = _modules(model)[0] if _modules(model) else None
    with torch.no_grad(), contextlib.suppress(Exception):
        return layer(x) * 1.1  # type: ignore[operator, no-any-return, misc]
    return torch.randn(len(x), 4)


def _modules(model: Any) -> list[Any]:
    return list(model) if isinstance(model, list) else [model]


def _rows(model: Any) -> int:
    weight = getattr(_modules(model)[0] if _modules(model) else None, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() else 4


def _states(held: list[nn.Module], given: list[Tensor], written: bool) -> driver_state.State:
    state = {f"argument {i}": driver_state.tensor_state(t) for i, t in enumerate(given)}
    for i, module in enumerate(held):
        found = (driver_state.written_state if written else driver_state.module_state)(module)
        state |= {f"{name} of module {i}": value for name, value in found.items()}
    return state


def _call(
    case: DriverCase, model: Any, arguments: list[Any], settings: dict[str, Any]
) -> tuple[Any, Exception | None]:
    function = quantize_ if case.call == "quantize_" else optimize_layer
    if case.call == "quantize_":
        settings = {"progress": False} | settings
    quiet = contextlib.redirect_stderr(io.StringIO())  # the bar
    with quiet, torch.set_grad_enabled(case.grad):
        try:
            return function(model, *arguments, **settings), None  # type: ignore[operator]
        except Exception as error:
            return None, error


def _judge_error(error: Exception, case: DriverCase, model: Any) -> str:
    if isinstance(error, driver_values.Planted):
        return "raised"
    paths = case.settings.keys() & {"cache_dir", "checkpoint_dir"}
    if isinstance(error, OSError) and paths:
        return "refused"
    require(not isinstance(error, RuntimeError) or isinstance(error, NotImplementedError),
            f"RuntimeError, for bad input: {error}")  # fmt: skip
    names = {name for name, _ in model.named_modules()} if isinstance(model, nn.Module) else set()
    check_error(error, _WORDS | names - {""})
    return "refused"


def _raises_itself(forward: Any, model: Any, batches: list[Any], error: Exception) -> bool:
    """Whether the model alone fails in the same way on one of the batches."""
    if not isinstance(model, nn.Module) or not callable(forward):
        return False
    model.eval()
    for batch in batches:
        try:
            with torch.no_grad():
                forward(model, batch)
        except Exception as own:
            if type(own) is type(error) and _plain(own) == _plain(error):
                return True
    return False


def _plain(error: Exception) -> str:
    """The text without numbers: of another batch they are others."""
    return re.sub(r"\d+", "N", str(error))


def _batches(data: Any) -> Iterator[Any]:
    """Of data that can be read again."""
    if isinstance(data, Tensor):
        yield from data.split(32) if data.dim() else ()
    elif isinstance(data, dict):
        yield data
    elif isinstance(data, (list, tuple, DataLoader)):
        yield from data


def _check_report(case: DriverCase, report: LayerReport, row_scales: bool) -> None:
    losses = report.losses
    require(math.isfinite(report.energy), f"energy {report.energy}")
    # Weights of which nearest does not fit the dtype may have no better either.
    require(losses["final"] < math.inf or losses["nearest"] == math.inf, f"lost: {losses}")
    # Quadratic forms, by products in float32: good to a share of the largest of these numbers. An
    # energy that is lost itself, as squares near the ends of float32 are, is no measure.
    numbers = [abs(v) for v in (*losses.values(), report.energy) if math.isfinite(v)]
    largest = max(numbers, default=0.0)
    slack = 1e-6 * largest + 1e-40
    if report.energy > 0 and case.values not in _SPREAD:
        require(losses["final"] >= -slack, f"negative: {losses}, energy {report.energy}")
    if row_scales:
        worse = f"{losses['final']} is worse than nearest, {losses['nearest']}"
        least = 1e-5 * abs(losses["nearest"]) + 1e-10 * largest + 1e-40
        require(losses["final"] <= losses["nearest"] + least, worse)
    for name in ("flipped", "clipped", "undecided"):
        require(0 <= getattr(report, name) <= 1, f"{name} is no share")


def _check_codes(weight: QuantizedWeight | LayerResult, qmin: int, qmax: int) -> None:
    codes, scale, zero_point = weight.codes, weight.scale, weight.zero_point
    require(codes.dtype == (torch.int8 if qmin < 0 else torch.uint8), f"codes are {codes.dtype}")
    low, high = (int(value) for value in codes.aminmax())
    require(qmin <= low and high <= qmax, f"codes in [{low}, {high}] beyond [{qmin}, {qmax}]")
    require(bool(((scale > 0) & scale.isfinite()).all()), "scales are not positive and finite")
    inside = (zero_point >= qmin) & (zero_point <= qmax)
    require(bool(inside.all()), "zero points lie beyond the range")


def _check_layers(case: DriverCase, model: Any, result: Any, settings: dict[str, Any]) -> None:
    modules = _modules(model)
    results = result if isinstance(result, list) else [result]
    require(len(results) == len(modules), f"{len(results)} results of {len(modules)} layers")
    config = settings.get("config")
    for module, found in zip(modules, results, strict=True):
        symmetric = settings.get("symmetric", True if config is None else config.symmetric)
        narrow = settings.get("narrow_range", False if config is None else config.narrow_range)
        _check_codes(found, *quant_range(found.report.bits, symmetric, narrow))
        _check_report(case, found.report, len(found.scale) > 1 or len(found.codes) == 1)
        again = QuantizedWeight(found.codes, found.scale, found.zero_point, found.report.bits)
        expected = again.dequantize(matrix_layer(module))
        require(torch.equal(bits(found.weight_q), bits(expected)), "weight_q is not its codes")
        require(found.weight_q.shape == module.weight.shape, "weight_q has another shape")
        known = found.bias is not None and math.isfinite(found.report.losses["final"])
        require(not known or bool(found.bias.isfinite().all()), "bias is not finite")


def _check_model(case: DriverCase, model: nn.Module, report: ModelReport) -> None:
    require(bool(report.layers), "a report of no layer")
    for entry in report.layers:
        module = model.get_submodule(entry.name)
        weight = module.quantized_weight
        require(isinstance(weight, QuantizedWeight), f"{entry.name} has no codes")
        config = entry.config
        qmin, qmax = quant_range(config["bits"], config["symmetric"], config["narrow_range"])
        _check_codes(weight, qmin, qmax)  # type: ignore[arg-type]
        _check_report(case, entry.report, len(weight.scale) > 1)  # type: ignore[union-attr, arg-type]
        expected = weight.dequantize(matrix_layer(module))  # type: ignore[union-attr, operator]
        same = torch.equal(bits(module.weight), bits(expected))  # type: ignore[arg-type]
        require(same, f"the weight of {entry.name} is not its codes")
    left = {name for name, m in model.named_modules() if isinstance(m, SUPPORTED)}
    left -= {entry.name for entry in report.layers} | set(report.skipped)
    left -= {name for entry in report.layers for name in entry.tied}
    require(not left, f"nothing is said of {sorted(left)}")
