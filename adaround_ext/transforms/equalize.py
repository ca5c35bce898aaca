"""Cross-layer equalization: channels between two layers get ranges that suit both of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.tracing.trace import Trace
from adaround_ext.transforms.verified import (
    Changed,
    Journal,
    TracedLayers,
    channel_dim,
    make_verified,
)

# f(s x) = s f(x) for s > 0, entry by entry
_HOMOGENEOUS = {
    f"aten.{name}"
    for name in ("relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "_prelu_kernel")
}
# Of a channel, either way: ranges that are 16 million times apart are as good as dead.
_MAX_SCALE = 2.0**12


class Equalized(Changed):
    """What was equalized, by names in the model: (layer, next layer), and why others were not."""


@dataclass(frozen=True, eq=False)
class _Pair:
    first: nn.Module
    second: nn.Module


def equalize_(
    model: nn.Module,
    trace: Trace,
    run: Callable[[], object],
    *,
    iterations: int = 20,
    tolerance: float = 1e-3,
) -> Equalized:
    """Divides a layer's output channels by s and multiplies the next layer's input channels by it.

    ``s_i = sqrt(r1_i r2_i) / r2_i`` with r1_i and r2_i the largest magnitudes of weights in output
    channel i of the first layer and input channel i of the second, which makes both ranges
    ``sqrt(r1_i r2_i)``. Chains of layers are gone over until no s differs from 1 by more than
    ``tolerance``, at most ``iterations`` times. A channel without weights keeps s = 1, and s stays
    within 2^-12 and 2^12. With 16-bit weights it is a power of two, which loses no bits.

    Two layers form a pair where the second takes the first one's output, possibly through ReLU,
    LeakyReLU or PReLU, both run once, and nothing else reads what is between. The outputs are
    checked as by :func:`adaround_ext.transforms.batch_norm.fold_batch_norm_`.

    Nagel et al., "Data-Free Quantization through Weight Equalization and Bias Correction", ICCV
    2019, equations (9) to (11).

    Args:
        model: Changed in place.
        trace: Of the model as it is now, in :func:`adaround_ext.tracing.evaluation.evaluation`.
        run: Calls the model on the batch that was traced, in the same way, and returns its output.
        iterations: Most times that chains of layers are gone over, at least 1.
        tolerance: Of s around 1, not negative.

    Returns:
        What was equalized, a reason for each other layer that ran, and the way back.

    Raises:
        ValueError: iterations is below 1, or tolerance negative.
    """
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    traced = TracedLayers(model, trace)
    pairs, skipped = list[_Pair](), dict[str, str]()
    for layer in traced:
        pair = _find(traced, layer)
        if isinstance(pair, _Pair):
            pairs.append(pair)
        else:
            skipped[traced.names[layer]] = pair

    def scale(journal: Journal, some: Sequence[_Pair]) -> None:
        _scale(journal, traced, some, _factors(traced, some, iterations, tolerance))

    journal, accepted, reasons = make_verified(model, run, pairs, scale)
    skipped |= {traced.names[pair.first]: reason for pair, reason in reasons.items()}
    names = tuple((traced.names[pair.first], traced.names[pair.second]) for pair in accepted)
    return Equalized(names, skipped, journal)


def _find(traced: TracedLayers, layer: nn.Module) -> _Pair | str:
    """The pair of this layer and the one after it, or why there is none."""
    calls = traced.trace.calls_of(layer)
    if len(calls) != 1 or len(calls[0].outputs) != 1:
        return f"it runs {len(calls)} times" if len(calls) > 1 else "it returns several tensors"
    value, time = calls[0].outputs[0], calls[0].end
    while True:
        if value in traced.trace.outputs:
            return "the model returns its output"
        readers = traced.readers(value, time)
        call = traced.read_by.get(value)
        if call is not None and readers and all(call.spans(op.time) for op in readers):
            break
        if len(readers) != 1:
            return f"its output is read {len(readers)} times"
        reader = readers[0]
        if reader.name.rpartition(".")[0] not in _HOMOGENEOUS or reader.inputs[0] != value:
            return f"its output goes to {reader.name}, which scales are not carried through"
        value, time = reader.outputs[0], reader.time
    following = call.module
    if len(traced.trace.calls_of(following)) != 1:
        return f"{traced.names[following]}, which reads its output, runs several times"
    if channel_dim(layer, value) != channel_dim(following, value):
        return f"{traced.names[following]} has its channels in another dimension"
    reason = traced.obstacle(layer) or traced.obstacle(following)
    return reason or _Pair(layer, following)


def _blocks(layer: MatrixLayer) -> Tensor:
    """The weight in float64 as [groups, outputs / groups, inputs / groups, kernel volume]."""
    volume = layer.weight[0, 0].numel()
    matrix = layer.weight_matrix().double()
    return matrix.view(layer.groups, layer.rows // layer.groups, layer.cols // volume, volume)


def _by_output(s: Tensor, blocks: Tensor) -> Tensor:
    return s.to(blocks.device).view(*blocks.shape[:2], 1, 1)


def _by_input(s: Tensor, blocks: Tensor) -> Tensor:
    return s.to(blocks.device).view(blocks.shape[0], 1, blocks.shape[2], 1)


def _factors(
    traced: TracedLayers, pairs: Sequence[_Pair], iterations: int, tolerance: float
) -> list[Tensor]:
    """s of each pair, float64 [channels]."""
    layers = dict.fromkeys(layer for pair in pairs for layer in (pair.first, pair.second))
    weights = {layer: _blocks(traced[layer]) for layer in layers}
    factors = [weights[pair.first].new_ones(traced[pair.first].rows) for pair in pairs]
    for _ in range(iterations):
        change = 0.0
        for index, pair in enumerate(pairs):
            first, second, before = weights[pair.first], weights[pair.second], factors[index]
            range1 = first.abs().amax((2, 3)).flatten()
            range2 = second.abs().amax((1, 3)).flatten().to(range1.device)
            ratio = range1 / range2
            ratio = torch.where((ratio > 0) & ratio.isfinite(), ratio, 1.0)
            factors[index] = (before * ratio.sqrt()).clamp(1 / _MAX_SCALE, _MAX_SCALE)
            step = factors[index] / before
            first /= _by_output(step, first)
            second *= _by_input(step, second)
            change = max(change, float((step - 1).abs().max()))
        if change <= tolerance:
            break
    for index, pair in enumerate(pairs):
        sizes = [traced[layer].weight.element_size() for layer in (pair.first, pair.second)]
        if min(sizes) < 4:
            factors[index] = factors[index].log2().round().exp2()
    return factors


def _scale(
    journal: Journal, traced: TracedLayers, pairs: Sequence[_Pair], factors: Sequence[Tensor]
) -> None:
    """Each weight is written once, from its original."""
    weights: dict[nn.Module, Tensor] = {}
    for pair, s in zip(pairs, factors, strict=True):
        for layer in (pair.first, pair.second):
            if layer not in weights:
                weights[layer] = _blocks(traced[layer])
        weights[pair.first] /= _by_output(s, weights[pair.first])
        weights[pair.second] *= _by_input(s, weights[pair.second])
        bias = pair.first._parameters["bias"]
        if bias is not None:
            journal.write_(bias, bias.detach().double() / s.to(bias.device))
    for layer, blocks in weights.items():
        view = traced[layer]
        journal.write_(
            layer.get_parameter("weight"),
            view.weight_from_matrix(blocks.reshape(view.rows, view.cols)),
        )
