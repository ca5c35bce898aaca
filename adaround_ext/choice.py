"""Which objective a layer gets."""

from __future__ import annotations

from math import prod

from torch import Tensor

from adaround_ext.config import AdaRoundConfig
from adaround_ext.data import Data
from adaround_ext.layers import MatrixLayer
from adaround_ext.presets import settings

# A sampled run that does as much arithmetic as a Gram run ends with a higher error (its gradients
# are noisy and there is no refinement), so Gram may cost this many times more: docs/tuning.md.
_GRAM_MAY_COST = 10.0
_ALWAYS_FINE = 1e12  # flop: seconds on two cores, so the more exact form is taken anyway


def choose_objective(
    config: AdaRoundConfig, layers: list[MatrixLayer], inputs: Data
) -> tuple[str, str]:
    """("gram" or "sampled", the reason).

    With an activation function only sampling is exact. Without one the Gram form is, and is taken
    unless it costs more than 10 times the arithmetic of sampling, and more than 1e12 flop: building
    it takes 2 N d^2 and a step 2 d^2 rows, a sampled step 4 B d rows, for N positions in all, B a
    minibatch's, d columns.
    """
    if config.objective != "auto":
        return config.objective, "as set"
    if config.activation is not None:
        return "sampled", "the activation function is part of the loss"
    if not isinstance(inputs, Tensor):
        return "gram", "no activation function, data streamed"
    if config.bias == "create":
        return "gram", "no activation function, and only this objective makes a bias"
    layer = layers[0]
    x = layer.samples(inputs)
    if len(x) == 0:
        return "gram", "no activation function"
    per_sample = prod(layer.output_size(x))
    if x.dim() == 2 and inputs.dim() > 2:
        per_sample = len(x) // len(inputs)  # tokens of a sequence
        x = x[: len(inputs)]
    rows = sum(item.rows for item in layers)
    gram = (
        2.0 * len(x) * per_sample * layer.cols**2 * layer.groups
        + settings(config, "gram", layer.cols).steps * 2.0 * layer.cols**2 * rows
    )
    batch = config.batch_size * per_sample
    sampled = settings(config, "sampled", layer.cols).steps * 4.0 * batch * layer.cols * rows
    text = f"Gram form {gram:.2g} flop, sampled {sampled:.2g}"
    dear = gram > _ALWAYS_FINE and gram > _GRAM_MAY_COST * sampled
    if dear and sampled > 0:  # without steps only refinement can gain
        return "sampled", f"no activation function, but {text}"
    return "gram", f"no activation function; {text}"
