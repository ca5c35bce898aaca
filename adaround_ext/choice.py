"""Which objective a layer gets, and the settings that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from adaround_ext.config import AdaRoundConfig
from adaround_ext.data import Data
from adaround_ext.layers import MatrixLayer

# A sampled run that does as much arithmetic as a Gram run ends with a higher error (its gradients
# are noisy and there is no refinement), so Gram may cost this many times more: docs/tuning.md.
_GRAM_MAY_COST = 10.0
_ALWAYS_FINE = 1e12  # flop: seconds on two cores, so the more exact form is taken anyway


@dataclass(frozen=True)
class Settings:
    """What the objective's own defaults fill in: docs/tuning.md has the measurements."""

    steps: int
    learning_rate: float
    reg_weight: float


_DEFAULTS = {
    ("gram", True): Settings(500, 5e-2, 1.0),
    ("gram", False): Settings(500, 5e-2, 0.01),
    ("sampled", True): Settings(2000, 1e-2, 1.0),
    ("sampled", False): Settings(10_000, 1e-3, 0.01),
}


def settings(config: AdaRoundConfig, objective: str) -> Settings:
    """``config``'s values where given, else the objective's defaults."""
    default = _DEFAULTS[objective, config.scale_free]
    return Settings(
        default.steps if config.steps is None else config.steps,
        default.learning_rate if config.learning_rate is None else config.learning_rate,
        default.reg_weight if config.reg_weight is None else config.reg_weight,
    )


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
        + settings(config, "gram").steps * 2.0 * layer.cols**2 * rows
    )
    batch = config.batch_size * per_sample
    sampled = settings(config, "sampled").steps * 4.0 * batch * layer.cols * rows
    text = f"Gram form {gram:.2g} flop, sampled {sampled:.2g}"
    dear = gram > _ALWAYS_FINE and gram > _GRAM_MAY_COST * sampled
    if dear and sampled > 0:  # without steps only refinement can gain
        return "sampled", f"no activation function, but {text}"
    return "gram", f"no activation function; {text}"
