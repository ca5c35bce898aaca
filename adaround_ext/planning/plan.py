"""What will be quantized: which layers, how, in what order, and what is left alone and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from adaround_ext.checks import check_flag
from adaround_ext.config import AdaRoundConfig
from adaround_ext.layers.matrix import SUPPORTED, MatrixLayer, matrix_layer
from adaround_ext.planning.adapters import adapter_note
from adaround_ext.planning.overrides import RESERVED, LayerSettings, Overrides, module_names
from adaround_ext.tensors import extent
from adaround_ext.tracing.dataflow import Dataflow
from adaround_ext.tracing.padding import PaddingMasks
from adaround_ext.tracing.trace import ModuleCall, Trace, Value

FilterFn = Callable[[nn.Module, str], bool]
_NORMS = "Norm"
# The activation functions that config.activation knows, by ATen's name.
_ACTIVATIONS = {"relu": "relu", "relu_": "relu", "gelu": "gelu", "silu": "silu", "silu_": "silu"}


@dataclass(frozen=True, eq=False)
class Target:
    """A layer to quantize; ``tied`` are other layers that hold the same weight.

    rows_chosen: whether the model's data decide which rows it gets. padding: the name of the mask
    that tells which of them are none, as :meth:`PaddingMasks.name_of` has it.
    """

    name: str
    matrix: MatrixLayer
    tied: tuple[tuple[str, nn.Module], ...]
    calls: tuple[ModuleCall, ...]  # of the layer and of those tied to it, in order
    config: AdaRoundConfig
    rows_chosen: bool = False
    padding: str | None = None

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.matrix.layer, *(module for _, module in self.tied))

    @property
    def inputs(self) -> tuple[Value, ...]:
        return tuple(call.inputs[0] for call in self.calls)

    @property
    def cost(self) -> float:
        """About proportional to the time that solving takes."""
        return float(self.matrix.rows) * self.matrix.cols**2


@dataclass(frozen=True)
class Plan:
    """Targets in execution order, and the reason for every module that is none."""

    targets: list[Target]
    skipped: dict[str, str]
    notes: list[str]


def make_plan(
    model: nn.Module,
    trace: Trace,
    config: AdaRoundConfig,
    overrides: Overrides | None,
    filter_fn: FilterFn | None,
    activation_aware: bool,
    refused: Mapping[nn.Module, str] | None = None,
    flow: Dataflow | None = None,
    masks: PaddingMasks | None = None,
    complete: Callable[[nn.Module, Mapping[str, Any]], dict[str, Any]] | None = None,
) -> Plan:
    """refused: layers that cannot be quantized, and why. flow, masks: of the trace. complete: a
    layer's settings, from those that overrides give.

    Raises ValueError and TypeError that name ``overrides``, ``filter_fn``, ``activation_aware`` or
    the layer.
    """
    check_flag("activation_aware", activation_aware)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of module and name, got {filter_fn!r}")
    names = module_names(model)
    found, skipped = _find(model, trace, names, filter_fn, refused or {})
    notes: list[str] = []

    def calls(layer: _Layer) -> list[ModuleCall]:
        modules = (layer.matrix.layer, *(m for _, m in layer.tied))
        return sorted((c for m in modules for c in trace.calls_of(m)), key=lambda c: c.begin)

    ordered = sorted(((layer, calls(layer)) for layer in found), key=lambda pair: pair[1][0].begin)
    changes = LayerSettings({} if overrides is None else overrides, config, names)
    targets: list[Target] = []
    last = len(ordered) - 1
    for index, (layer, own) in enumerate(ordered):
        name, matrix, tied = layer.name, layer.matrix, layer.tied
        known = names[matrix.layer] + [other for other, _ in tied]
        known += [RESERVED[0]] * (index == 0) + [RESERVED[1]] * (index == last)
        settings = changes.of(known, matrix.layer)
        if settings is None:
            skipped[name] = "overrides say skip"
            continue
        if complete is not None:
            settings = complete(matrix.layer, settings)
        if len(tied) and settings.get("bias", config.bias) != "keep":
            settings = {**settings, "bias": "keep"}
            notes.append(f"{name}: biases are kept, its weight is tied")
        if activation_aware and "activation" not in settings:
            activation = _activation(trace, own)
            if activation is not None:
                settings = {**settings, "activation": activation}
        target = Target(
            name, matrix, tied, tuple(own), changes.config(settings),
            rows_chosen=flow is not None and any(map(flow.chooses_rows, own)),
            padding=_padding(own, flow, masks),
        )  # fmt: skip
        _check_groups(target)
        _check_finite(target)
        targets.append(target)
    notes += changes.unused(skipped)
    adapters = adapter_note(target.name for target in targets)
    notes += [adapters] if adapters else []
    if not targets:
        reasons = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:5])
        raise ValueError(
            f"model must have a layer to quantize, got none ({reasons or 'no layers'})"
        )
    return Plan(targets, skipped, notes)


def _padding(
    calls: list[ModuleCall], flow: Dataflow | None, masks: PaddingMasks | None
) -> str | None:
    if flow is None or masks is None:
        return None
    return masks.name_of(frozenset().union(*map(flow.arguments, calls)))


class _Layer(NamedTuple):
    name: str
    matrix: MatrixLayer
    tied: tuple[tuple[str, nn.Module], ...]


def _find(
    model: nn.Module,
    trace: Trace,
    names: Mapping[nn.Module, list[str]],
    filter_fn: FilterFn | None,
    refused: Mapping[nn.Module, str],
) -> tuple[list[_Layer], dict[str, str]]:
    """The layers that can and shall be quantized, and why others are not."""
    owners: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for module, known in names.items():
        for _, parameter in module.named_parameters(recurse=False):
            owners[id(parameter)].append((known[0], module))
    skipped: dict[str, str] = {}
    found: list[_Layer] = []
    done: set[nn.Module] = set()
    shared = _shared_memory(model)
    for module, (name, *_) in names.items():
        if module in done:
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
        tied = tuple((other, m) for other, m in owners[id(module.weight)] if m is not module)
        reason = _untied(matrix, tied) or shared.get(id(module.weight))
        for layer in (module, *(m for _, m in tied)):
            reason = reason or refused.get(layer)
        if reason is not None:
            skipped[name] = reason
            continue
        done.update(m for _, m in tied)
        for other, _ in tied:
            skipped.pop(other, None)
        if filter_fn is not None and not filter_fn(module, name):
            skipped[name] = "filter_fn returned False"
            continue
        found.append(_Layer(name, matrix, tied))
    return found, skipped


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
    found: dict[int, str] = {}
    extents = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.layout != torch.strided or tensor.is_meta or is_lazy(tensor):
            continue
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        if any(size > 1 and step == 0 for size, step in steps):
            found[id(tensor)] = "entries of its weight share memory"
        if tensor.numel() and tensor.data_ptr():
            extents.append((str(tensor.device), *extent(tensor), name, id(tensor)))
    extents.sort()
    last = None  # of those before, the one that ends last
    for item in extents:
        device, begin, end, name, key = item
        if last is not None and last[0] == device and begin < last[2]:
            found.setdefault(key, f"its weight shares memory with {last[3]}")
            found.setdefault(last[4], f"its weight shares memory with {name}")
        if last is None or last[0] != device or end > last[2]:
            last = item
    return found


def _activation(trace: Trace, calls: list[ModuleCall]) -> str | None:
    """The activation function that is all that ever reads the outputs, as config has it."""
    found: set[str | None] = set()
    for call in calls:
        reader = trace.only_reader(call)
        name = None if reader is None else reader.name.split(".")[1]
        if reader is not None and name in ("hardtanh", "hardtanh_"):
            found.add("relu6" if reader.arguments[:2] in ((0, 6), (0.0, 6.0)) else None)
        elif reader is not None and name == "gelu" and "tanh" in reader.arguments:
            found.add(None)
        else:
            found.add(_ACTIVATIONS.get(name or ""))
    return found.pop() if len(found) == 1 else None


def _check_groups(target: Target) -> None:
    size = target.config.group_size
    if size is not None and target.matrix.cols % size:
        raise ValueError(
            f"group_size must divide the {target.matrix.cols} columns of {target.name}, "
            f"got {size}: "
            'give it another by overrides, as {"' + target.name + '": {"granularity": '
            '"per_channel", "group_size": None}}'
        )


def _check_finite(target: Target) -> None:
    weight = target.matrix.weight
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise ValueError(
            f"weight of {target.name} must be finite, got {bad} NaN or infinite values"
        )
