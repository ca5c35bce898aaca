"""Batch norm folding: into the layers before, which quantization then sees as they are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adaround_ext.layers.matrix import matrix_layer
from adaround_ext.tracing.trace import ModuleCall, Trace
from adaround_ext.transforms.verified import (
    Changed,
    Journal,
    TracedLayers,
    channel_dim,
    make_verified,
)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Folded(Changed):
    """What was folded, by names in the model: (layer, batch norm), and why the others were not."""


@dataclass(frozen=True, eq=False)
class _Pair:
    layer: nn.Module
    norm: _BatchNorm


def fold_batch_norm_(model: nn.Module, trace: Trace, run: Callable[[], object]) -> Folded:
    """Folds every batch norm that directly follows a Linear, Conv or ConvTranspose layer into it.

    With running mean m and variance v, row by row in float64, rounded to the layer's dtype:
    ``weight' = weight gamma / sqrt(v + eps)``, ``bias' = (bias - m) gamma / sqrt(v + eps) + beta``.
    The layer's parameters keep their identity; a layer without a bias gets one. The batch norm
    becomes an nn.Identity in every module that holds it.

    A batch norm is left alone, with its reason, where anything else depends on what comes between
    (another reader, a shared weight, a hook), where it normalises another dimension than the
    layer's channels, where it has no running statistics, and where the model's outputs move by more
    than the tolerance of :func:`adaround_ext.transforms.verified.make_verified`.

    Args:
        model: Changed in place.
        trace: Of the model as it is now, in :func:`adaround_ext.tracing.evaluation.evaluation`.
        run: Calls the model on the batch that was traced, in the same way, and returns its output.

    Returns:
        What was folded, why the rest was not, and the way back.
    """
    traced = TracedLayers(model, trace)
    ran = dict.fromkeys(call.module for call in trace.calls if call.module in traced.names)
    norms = [module for module in {**ran, **traced.names} if isinstance(module, _BATCH_NORMS)]
    pairs, skipped = list[_Pair](), dict[str, str]()
    for norm in norms:
        pair = _find(traced, norm)
        if isinstance(pair, _Pair):
            pairs.append(pair)
        else:
            skipped[traced.names[norm]] = pair

    def fold(journal: Journal, some: Sequence[_Pair]) -> None:
        for pair in some:
            _fold(journal, model, pair)

    journal, accepted, reasons = make_verified(model, run, pairs, fold)
    skipped |= {traced.names[pair.norm]: reason for pair, reason in reasons.items()}
    names = tuple((traced.names[pair.layer], traced.names[pair.norm]) for pair in accepted)
    return Folded(names, skipped, journal)


def _find(traced: TracedLayers, norm: _BatchNorm) -> _Pair | str:
    """The pair of this batch norm and the layer before it, or why there is none."""
    calls = traced.trace.calls_of(norm)
    if not calls:
        return "it did not run"
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics"
    if norm._forward_hooks or norm._forward_pre_hooks:
        return "it has hooks"
    sources = [
        traced.produced_by.get(call.inputs[0]) if len(call.inputs) == 1 else None for call in calls
    ]
    first = sources[0]
    if first is None:
        return "its input is not the output of a Linear, Conv or ConvTranspose layer"
    layer, name = first.module, traced.names[first.module]
    layer_calls = traced.trace.calls_of(layer)
    if len(sources) != len(layer_calls) or set(sources) != set(layer_calls):
        return f"its calls and those of {name} are not in pairs"
    for call in calls:
        reason = _between(traced, traced.produced_by[call.inputs[0]], call)
        if reason is not None:
            return reason
    return traced.obstacle(layer) or _Pair(layer, norm)


def _between(traced: TracedLayers, source: ModuleCall, call: ModuleCall) -> str | None:
    """Why one call of a batch norm does not belong to the call of a layer that made its input."""
    value, name = call.inputs[0], traced.names[source.module]
    if value in traced.trace.outputs:
        return f"the model returns the output of {name}"
    if not all(call.spans(reader.time) for reader in traced.readers(value, source.end)):
        return f"something else reads the output of {name} too"
    if channel_dim(source.module, value) != 1:
        return f"it does not normalise the channels of {name}"
    last = [op for op in traced.trace.operators if call.spans(op.time)][-1:]
    if not any("batch_norm" in op.name and op.outputs[:1] == call.outputs for op in last):
        return "it does more than normalise"
    return None


def _fold(journal: Journal, model: nn.Module, pair: _Pair) -> None:
    layer, norm = matrix_layer(pair.layer), pair.norm
    device = layer.weight.device

    def wide(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device, torch.float64)

    assert norm.running_mean is not None and norm.running_var is not None
    factor = (wide(norm.running_var) + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * wide(norm.weight)
    offset = -wide(norm.running_mean)
    if layer.bias is not None:
        offset = offset + wide(layer.bias)
    offset = offset * factor
    if norm.bias is not None:
        offset = offset + wide(norm.bias)

    weight, bias = pair.layer.get_parameter("weight"), pair.layer._parameters["bias"]
    scaled = layer.weight_matrix().double() * factor[:, None]
    journal.write_(weight, layer.weight_from_matrix(scaled))
    if bias is not None:
        journal.write_(bias, offset)
    else:
        new = nn.Parameter(offset.to(weight.dtype), requires_grad=weight.requires_grad)
        journal.put(pair.layer._parameters, "bias", new)
    identity = nn.Identity().train(norm.training)
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is norm:
                journal.put(parent._modules, key, identity)


BatchNorm = Literal["fold", "keep"]
