"""AdaRound for a whole model, in one call."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import nn

from adaround_ext.apply import apply_
from adaround_ext.blocks import BlockCall, Blocks, block_calls, find_blocks
from adaround_ext.cache import ActivationCache
from adaround_ext.calibration import Calibration, ForwardFn, PaddingMask
from adaround_ext.capture import Replay
from adaround_ext.checkpoint import Checkpoint
from adaround_ext.collect import Unit, make_units, parallel_segments, sequential_segments
from adaround_ext.config import AdaRoundConfig, make_config
from adaround_ext.fingerprint import model_digest
from adaround_ext.fitting import Fitter
from adaround_ext.memory import device_memory, host_memory
from adaround_ext.model_report import LayerEntry, ModelReport
from adaround_ext.native import build_info
from adaround_ext.plan import FilterFn, Overrides, Plan, Target, make_plan
from adaround_ext.prepare import BatchNorm, prepare_
from adaround_ext.trace import evaluation

_MEMORY_BUDGET = 1 << 29
_MODES = ("sequential", "parallel")


def quantize_(
    model: nn.Module,
    calibration: Iterable[Any],
    config: AdaRoundConfig | None = None,
    *,
    mode: Literal["sequential", "parallel"] = "sequential",
    overrides: Overrides | None = None,
    filter_fn: FilterFn | None = None,
    forward_fn: ForwardFn | None = None,
    blocks: Blocks = None,
    batch_norm: BatchNorm = "fold",
    equalize: bool = False,
    activation_aware: bool = False,
    padding_mask: PaddingMask = "attention_mask",
    memory_budget: int = _MEMORY_BUDGET,
    cache_dir: str | None = None,
    cache_dtype: torch.dtype | None = None,
    checkpoint_dir: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> ModelReport:
    """Quantizes the weights of all Linear and convolution layers of a model, in place.

    ...
    """
    config = make_config(config, settings)
    _check(model, mode, memory_budget)
    started = time.perf_counter()
    host_before, _ = host_memory()
    with ExitStack() as stack:
        cache = stack.enter_context(ActivationCache(memory_budget, cache_dir, dtype=cache_dtype))
        stack.enter_context(evaluation(model, config.seed))
        device = _device(model)
        data = Calibration(model, calibration, forward_fn, padding_mask, cache, device)
        laps = {"calibration": time.perf_counter() - started}
        undo = stack.enter_context(ExitStack())
        digest = model_digest(model) if checkpoint_dir is not None else ""
        prepared = prepare_(model, lambda: data.run(0), undo, batch_norm, equalize)
        seen = prepared.trace
        plan = make_plan(model, seen, config, overrides, filter_fn, activation_aware)
        units = make_units(plan.targets)
        calls = block_calls(model, seen, find_blocks(model, seen, blocks))
        sequential = mode == "sequential"
        segments = (
            sequential_segments(units) if sequential else parallel_segments(units, memory_budget)
        )
        checkpoint = None
        if checkpoint_dir is not None:
            parts = _fingerprint(digest, data, plan, calls)
            parts |= {"mode": mode, "batch_norm": batch_norm, "equalize": equalize}
            parts |= {"cache_dtype": str(cache_dtype)}
            checkpoint = Checkpoint(checkpoint_dir, parts)
        replay = Replay(model, data, calls, cache, _common(calls, plan), config.seed)
        laps["tracing"] = time.perf_counter() - started - laps["calibration"]
        fitter = Fitter(replay, data, segments, sequential, checkpoint, None, cache_dir, progress)
        fitter.run()
        for target, fitted in fitter.fitted.items():
            apply_(target, fitted.weight, fitted.bias)
        undo.pop_all()  # from here on the changes stay
    laps |= fitter.seconds | {"total": time.perf_counter() - started}
    memory = {"host_before": host_before, "host_peak": host_memory()[1]}
    memory |= {f"cache_{place}": size for place, size in cache.peak.items() if place != "device"}
    if device is not None and device.type == "cuda":
        memory["device_peak"] = device_memory(device)
    return ModelReport(
        model=type(model).__name__,
        mode=mode,
        layers=_entries(units, calls, fitter),
        skipped=plan.skipped,
        blocks=tuple(dict.fromkeys(call.name for call in calls if len(call.layers) > 1)),
        parameters=sum(p.numel() for p in model.parameters()),
        passes=replay.passes,
        batches=data.batches,
        samples=data.samples,
        notes=tuple(data.notes + prepared.notes + plan.notes + fitter.notes),
        seconds=laps,
        memory=memory,
        versions=_versions(),
        seed=config.seed,
    )


def _check(model: object, mode: object, memory_budget: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int) or memory_budget < 0:
        raise ValueError(f"memory_budget must be a number of bytes, got {memory_budget!r}")


def _device(model: nn.Module) -> torch.device | None:
    """Where batches go: the one device of all parameters, or None."""
    devices = {p.device for p in model.parameters() if not p.is_meta}
    return devices.pop() if len(devices) == 1 else None


def _common(calls: list[BlockCall], plan: Plan) -> int:
    """How many leading block calls run before any layer that is quantized."""
    modules = {module for target in plan.targets for module in target.modules}
    for index, call in enumerate(calls):
        if call.layers & modules:
            return index
    return len(calls)


def _fingerprint(
    model: str, data: Calibration, plan: Plan, calls: list[BlockCall]
) -> dict[str, object]:
    layers = {target.name: _plain(target) for target in plan.targets}
    return {
        "model": model,
        "calibration": data.digest(),
        "configuration": layers,
        "blocks": [call.name for call in calls],
        "version": _versions(),
    }


def _plain(target: Target) -> dict[str, Any]:
    """A target's configuration as plain values; a callable activation as its name."""
    activation = target.config.activation
    if not callable(activation):
        return target.config.to_dict()
    plain = make_config(target.config, {"activation": None}).to_dict()
    return plain | {"activation": getattr(activation, "__qualname__", repr(activation))}


def _versions() -> dict[str, str]:
    return {
        "adaround_ext": str(build_info()["version"]),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _entries(units: list[Unit], calls: list[BlockCall], fitter: Fitter) -> tuple[LayerEntry, ...]:
    block = {m: call.name for call in calls for m in call.layers if m is not call.call.module}
    entries = []
    for unit in units:
        for target in unit.targets:
            layer = target.matrix.layer
            entries.append(
                LayerEntry(
                    name=target.name,
                    kind=type(layer).__name__,
                    shape=tuple(target.matrix.weight.shape),
                    calls=len(target.calls),
                    block=block.get(layer),
                    shared_inputs=tuple(t.name for t in unit.targets if t is not target),
                    tied=tuple(name for name, _ in target.tied),
                    config=_plain(target),
                    report=fitter.fitted[target].report,
                    rows=target.matrix.rows,
                )
            )
    return tuple(entries)
