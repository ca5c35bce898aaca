"""Plan: the layers to quantize in execution order with their settings, and why not others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adaround_ext.checks import check_flag
from adaround_ext.config import AdaRoundConfig
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.planning.adapters import adapter_note
from adaround_ext.planning.candidates import Candidate, FilterFn, find_candidates
from adaround_ext.planning.overrides import RESERVED, LayerSettings, Overrides, module_names
from adaround_ext.presets import choose_objective
from adaround_ext.tracing.dataflow import Dataflow
from adaround_ext.tracing.padding import PaddingMasks
from adaround_ext.tracing.trace import ModuleCall, Trace, Value

Complete = Callable[[nn.Module, Mapping[str, Any]], dict[str, Any]]
# The activation functions that config.activation knows, by ATen's name.
_ACTIVATIONS = {"relu": "relu", "relu_": "relu", "gelu": "gelu", "silu": "silu", "silu_": "silu"}


@dataclass(frozen=True, eq=False)
class Target:
    """A layer to quantize; ``tied`` are other layers that hold the same weight.

    objective, reason: as :func:`choose_objective` has them for ``config``. rows_chosen: whether the
    model's data decide which rows it gets. padding: the name of the mask that tells which of them
    are none, as :meth:`PaddingMasks.name_of` has it.
    """

    name: str
    matrix: MatrixLayer
    tied: tuple[tuple[str, nn.Module], ...]
    calls: tuple[ModuleCall, ...]  # of the layer and of those tied to it, in order
    config: AdaRoundConfig
    objective: str
    reason: str
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
    overrides: Overrides | None = None,
    filter_fn: FilterFn | None = None,
    activation_aware: bool = False,
    reasons: Mapping[nn.Module, str] | None = None,
    flow: Dataflow | None = None,
    masks: PaddingMasks | None = None,
    complete: Complete | None = None,
) -> Plan:
    """The plan for a model as a trace shows it.

    Args:
        model: its layers are looked at, and not run.
        trace: of a run on calibration data.
        config: of every layer, where ``overrides`` say nothing else.
        overrides: settings of some layers, as :func:`adaround_ext.quantize_` has them.
        filter_fn: of a module and its name: False leaves the layer alone.
        activation_aware: whether an activation function that directly follows a layer is part of
            its loss.
        reasons: layers that cannot be quantized, and why.
        flow: of the trace; None where nobody will ask which rows a layer gets.
        masks: of the trace; None where nobody will ask where padding is.
        complete: a layer's settings, from the layer and those that overrides give.

    Returns:
        The targets in execution order, and what is skipped, with the reason.

    Raises:
        TypeError, ValueError: naming ``overrides``, ``filter_fn``, ``activation_aware`` or the
            layer.
    """
    check_flag("activation_aware", activation_aware)
    if filter_fn is not None and not callable(filter_fn):
        raise TypeError(f"filter_fn must be a function of module and name, got {filter_fn!r}")
    names = module_names(model)
    candidates, skipped = find_candidates(model, trace, names, filter_fn, reasons or {})
    settings = LayerSettings({} if overrides is None else overrides, config, names)
    planner = _Planner(trace, config, settings, activation_aware, flow, masks, complete)
    targets: list[Target] = []
    for layer, aliases in _in_order(candidates, names):
        target = planner.target(layer, aliases)
        if target is None:
            skipped[layer.name] = "overrides say skip"
        else:
            targets.append(target)
    notes = planner.notes + settings.unused(skipped)
    adapters = adapter_note(target.name for target in targets)
    notes += [adapters] if adapters else []
    if not targets:
        shown = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:5])
        raise ValueError(f"model must have a layer to quantize, got none ({shown or 'no layers'})")
    return Plan(targets, skipped, notes)


@dataclass
class _Planner:
    """Makes targets of layers; arguments as :func:`make_plan` has them."""

    trace: Trace
    config: AdaRoundConfig
    settings: LayerSettings
    activation_aware: bool
    flow: Dataflow | None
    masks: PaddingMasks | None
    complete: Complete | None
    notes: list[str] = field(default_factory=list)

    def target(self, layer: Candidate, aliases: list[str]) -> Target | None:
        """The target, checked; None where overrides skip it. aliases: all names that mean it."""
        config = self._config(layer, aliases)
        if config is None:
            return None
        objective, reason = choose_objective(config)
        target = Target(
            layer.name, layer.matrix, layer.tied, layer.calls, config, objective, reason,
            rows_chosen=self.flow is not None and any(map(self.flow.chooses_rows, layer.calls)),
            padding=self._padding(layer.calls),
        )  # fmt: skip
        _check_groups(target)
        _check_finite(target)
        return target

    def _config(self, layer: Candidate, aliases: list[str]) -> AdaRoundConfig | None:
        settings = self.settings.of(aliases, layer.matrix.layer)
        if settings is None:
            return None
        if self.complete is not None:
            settings = self.complete(layer.matrix.layer, settings)
        if len(layer.tied) and settings.get("bias", self.config.bias) != "keep":
            settings = {**settings, "bias": "keep"}
            self.notes.append(f"{layer.name}: biases are kept, its weight is tied")
        if self.activation_aware and "activation" not in settings:
            activation = _activation(self.trace, layer.calls)
            if activation is not None:
                settings = {**settings, "activation": activation}
        return self.settings.config(settings)

    def _padding(self, calls: Sequence[ModuleCall]) -> str | None:
        if self.flow is None or self.masks is None:
            return None
        return self.masks.name_of(frozenset().union(*map(self.flow.arguments, calls)))


def _in_order(
    candidates: Iterable[Candidate], names: Mapping[nn.Module, list[str]]
) -> Iterator[tuple[Candidate, list[str]]]:
    """Layers in execution order, each with all names by which overrides may mean it."""
    ordered = sorted(candidates, key=lambda layer: layer.calls[0].begin)
    last = len(ordered) - 1
    for index, layer in enumerate(ordered):
        aliases = names[layer.matrix.layer] + [name for name, _ in layer.tied]
        aliases += [RESERVED[0]] * (index == 0) + [RESERVED[1]] * (index == last)
        yield layer, aliases


def _activation(trace: Trace, calls: Sequence[ModuleCall]) -> str | None:
    """The activation function that is all that ever reads the outputs, as config has it."""
    functions: set[str | None] = set()
    for call in calls:
        reader = trace.only_reader(call)
        name = None if reader is None else reader.name.split(".")[1]
        if reader is not None and name in ("hardtanh", "hardtanh_"):
            functions.add("relu6" if reader.arguments[:2] in ((0, 6), (0.0, 6.0)) else None)
        elif reader is not None and name == "gelu" and "tanh" in reader.arguments:
            functions.add(None)
        else:
            functions.add(_ACTIVATIONS.get(name or ""))
    return functions.pop() if len(functions) == 1 else None


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
