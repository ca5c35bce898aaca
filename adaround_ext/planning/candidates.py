"""Candidates: the layers of a model that can be quantized, and a reason for each other module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from adaround_ext.layers.matrix import SUPPORTED, MatrixLayer, matrix_layer
from adaround_ext.tensors import extent
from adaround_ext.tracing.trace import ModuleCall, Trace

FilterFn = Callable[[nn.Module, str], bool]
_NORMS = "Norm"


class Candidate(NamedTuple):
    """A layer that can be quantized; ``calls``: of it and those tied to it, in order."""

    name: str
    matrix: MatrixLayer
    tied: tuple[tuple[str, nn.Module], ...]
    calls: tuple[ModuleCall, ...]


def find_candidates(
    model: nn.Module,
    trace: Trace,
    names: Mapping[nn.Module, list[str]],
    filter_fn: FilterFn | None,
    reasons: Mapping[nn.Module, str],
) -> tuple[list[Candidate], dict[str, str]]:
    """The layers that can and shall be quantized, and why others are not, by name.

    names: of :func:`module_names`. filter_fn, reasons: as :func:`make_plan` has them.
    """
    holders = _holders(names)
    shared = _shared_memory(model)
    skipped: dict[str, str] = {}
    candidates: list[Candidate] = []
    joined: set[nn.Module] = set()  # tied to a layer that is there already
    for module, (name, *_) in names.items():
        if module in joined:
            continue
        reason = _no_layer(module, trace)
        if reason is not None:
            if reason:
                skipped[name] = reason
            continue
        try:
            matrix = matrix_layer(module)
        except (TypeError, ValueError) as error:
            skipped[name] = str(error)
            continue
        tied = tuple((other, m) for other, m in holders[id(module.weight)] if m is not module)
        modules = (module, *(m for _, m in tied))
        reason = _untied(matrix, tied) or shared.get(id(module.weight))
        for layer in modules:
            reason = reason or reasons.get(layer)
        if reason is not None:
            skipped[name] = reason
            continue
        joined.update(modules[1:])
        for other, _ in tied:
            skipped.pop(other, None)
        if filter_fn is not None and not filter_fn(module, name):
            skipped[name] = "filter_fn returned False"
            continue
        calls = sorted((c for m in modules for c in trace.calls_of(m)), key=lambda c: c.begin)
        candidates.append(Candidate(name, matrix, tied, tuple(calls)))
    return candidates, skipped


def _holders(names: Mapping[nn.Module, list[str]]) -> dict[int, list[tuple[str, nn.Module]]]:
    """By id of each parameter, the modules that hold it, with their names."""
    holders: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for module, (name, *_) in names.items():
        for _, parameter in module.named_parameters(recurse=False):
            holders[id(parameter)].append((name, module))
    return holders


def _no_layer(module: nn.Module, trace: Trace) -> str | None:
    """None for a layer to quantize, else why it is left alone; "" where nobody would ask."""
    if isinstance(module, SUPPORTED):
        calls = trace.calls_of(module)
        if not calls:
            return "it was not called: nothing is known of its inputs"
        if any(len(call.inputs) != 1 for call in calls):
            return "it was called with other arguments than its input"
        return None
    matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]
    if not matrices or _NORMS in type(module).__name__:
        return ""
    return f"{type(module).__name__} is not supported"


def _untied(matrix: MatrixLayer, tied: tuple[tuple[str, nn.Module], ...]) -> str | None:
    """Why tied layers cannot be one, or None."""
    for name, module in tied:
        try:
            other = matrix_layer(module)
        except (TypeError, ValueError):
            return f"its weight is also that of {name} ({type(module).__name__})"
        if other.geometry != matrix.geometry or type(module) is not type(matrix.layer):
            return f"its weight is also that of {name}, which uses it in another way"
    return None


def _shared_memory(model: nn.Module) -> dict[int, str]:
    """By id, the parameters whose entries lie in other ones' memory, or on each other."""
    reasons: dict[int, str] = {}
    extents: list[tuple[str, int, int, str, int]] = []  # device, begin, end, name, id
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout != torch.strided or tensor.is_meta or is_lazy(tensor):
            continue
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        if any(size > 1 and step == 0 for size, step in steps):
            reasons[id(tensor)] = "entries of its weight share memory"
        if tensor.numel() and tensor.data_ptr():
            extents.append((str(tensor.device), *extent(tensor), name, id(tensor)))
    extents.sort()
    last = None  # of those before, the one that ends last
    for item in extents:
        device, begin, end, name, key = item
        if last is not None and last[0] == device and begin < last[2]:
            reasons.setdefault(key, f"its weight shares memory with {last[3]}")
            reasons.setdefault(last[4], f"its weight shares memory with {name}")
        if last is None or last[0] != device or end > last[2]:
            last = item
    return reasons
