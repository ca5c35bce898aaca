"""From what was collected of the data to the problems that are solved."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from adaround_ext.config import AdaRoundConfig
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.linalg.products import annealing_dtype
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.rounding.problem import Problem
from adaround_ext.rounding.sampled_objective import SampledObjective
from adaround_ext.statistics.moments import GramStatistics

# Of a linear layer's inputs, a sample of a minibatch: as many whatever the inputs' shape, since the
# tokens of a sequence are drawn apart from each other anyway.
_TOKENS = 32
# Damping of the Gram matrix against overfitting: docs/tuning.md.
_DAMPING, _MOST_DAMPING = 5.0, 0.3


def gram_problems(
    layers: list[MatrixLayer],
    statistics: GramStatistics,
    config: AdaRoundConfig,
    reason: str,
    seconds: float,
    rows_chosen: bool = False,
) -> Iterator[Problem]:
    """A problem for all layers together, since rows are independent and the statistics are shared.

    Layers whose bias takes up the mean error have another objective than those whose does not, and
    with groups each layer is its own: their rows would have to be interleaved group by group.
    ``statistics`` are of exactly these layers; ``seconds`` is what they took.
    """
    started = time.perf_counter()
    damping = config.damping
    if damping is None:
        damping = min(_MOST_DAMPING, _DAMPING / max(statistics.count, 1) ** 0.5)
    rows, notes = list(_row_indices(layers)), statistics.notes()
    for part in _parts(layers, config):
        weight = torch.cat([layers[i].weight_matrix().float() for i in part])
        own = statistics.rows(torch.cat([rows[i] for i in part]))
        objective = GramObjective(
            weight,
            own,
            centred=_centred(layers[part[0]], config),
            damping=damping,
            normalize=config.scale_free,
            dtype=annealing_dtype(config.products, weight.device),
        )
        seconds += time.perf_counter() - started
        stacked = [layers[i] for i in part]
        yield Problem(
            stacked, [layer.rows for layer in stacked], weight, _biases(stacked), objective, "gram",
            reason, statistics.count, seconds, notes, rows_chosen,
        )  # fmt: skip
        started, seconds = time.perf_counter(), 0.0


def sampled_problems(
    layers: list[MatrixLayer],
    inputs: Tensor,
    targets: tuple[Tensor, ...] | None,
    samples: int,
    config: AdaRoundConfig,
    reason: str,
    seconds: float,
) -> Iterator[Problem]:
    """A problem a layer, on the same inputs, which stay in memory.

    ``samples``: how many the caller gave, sequences or images.
    """
    started = time.perf_counter()
    linear = isinstance(layers[0].layer, nn.Linear)
    batch = config.batch_size * (min(_TOKENS, len(inputs)) if linear else 1)
    for index, layer in enumerate(layers):
        weight = layer.weight_matrix().float()
        if targets is None:
            wanted = layer.forward(inputs, layer.weight, layer.bias)
        else:
            wanted = targets[index]
        objective = SampledObjective(
            layer, weight, inputs, wanted, _activation(config), batch, config.scale_free,
            config.seed,
        )  # fmt: skip
        seconds += time.perf_counter() - started
        yield Problem(
            [layer], [layer.rows], weight, _biases([layer]), objective, "sampled", reason, samples,
            seconds, _bias_notes(layer, config),
        )  # fmt: skip
        started, seconds = time.perf_counter(), 0.0


def _biases(layers: list[MatrixLayer]) -> Tensor:
    """float64 [rows] of all layers, 0 where there is none."""
    found = []
    for layer in layers:
        nothing = layer.weight.new_zeros(layer.rows, dtype=torch.float64)
        found.append(nothing if layer.bias is None else layer.bias.double())
    return torch.cat(found)


def _activation(config: AdaRoundConfig) -> Callable[[Tensor], Tensor] | None:
    """The activation function; TypeError where a callable is not elementwise."""
    function = config.activation_function
    if function is None:
        return None

    def checked(y: Tensor) -> Tensor:
        result = function(y)
        if not isinstance(result, Tensor) or result.shape != y.shape:
            got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            rule = f"activation must return a tensor of the shape it gets, {list(y.shape)}"
            raise TypeError(f"{rule}, got {got}")
        return result

    return checked


def _centred(layer: MatrixLayer, config: AdaRoundConfig) -> bool:
    """Whether the layer will have a bias that may change."""
    return config.bias == "create" or (config.bias == "refit" and layer.bias is not None)


def _bias_notes(layer: MatrixLayer, config: AdaRoundConfig) -> tuple[str, ...]:
    """Of the sampled objective."""
    stays = layer.bias is not None and config.bias == "refit"
    return ("the bias stays as it is: only the Gram form refits it",) if stays else ()


def _parts(layers: list[MatrixLayer], config: AdaRoundConfig) -> list[list[int]]:
    """Indices of the layers that are one problem."""
    if layers[0].groups > 1:
        return [[i] for i in range(len(layers))]
    parts: dict[bool, list[int]] = {}
    for i, layer in enumerate(layers):
        parts.setdefault(_centred(layer, config), []).append(i)
    return list(parts.values())


def _row_indices(layers: list[MatrixLayer]) -> Iterator[Tensor]:
    """The indices of each layer's rows among all."""
    begin = 0
    for layer in layers:
        yield torch.arange(begin, begin + layer.rows, device=layer.weight.device)
        begin += layer.rows
