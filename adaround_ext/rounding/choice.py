"""Which objective a layer gets."""

from __future__ import annotations

from adaround_ext.config import AdaRoundConfig


def choose_objective(config: AdaRoundConfig) -> tuple[str, str]:
    """("gram" or "sampled", the reason).

    With an activation function only sampling is exact, without one the Gram form is. No price makes
    sampling the better choice then: its gradients are noisy, and there is no refinement, no search
    and no new bias (docs/tuning.md).
    """
    if config.objective != "auto":
        return config.objective, "as set"
    if config.activation is not None:
        return "sampled", "the activation function is part of the loss"
    return "gram", "no activation function, so the Gram form is exact"
