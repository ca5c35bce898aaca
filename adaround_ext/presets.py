"""Presets: starts, steps and candidates where a setting is None; the objective where "auto"."""

from __future__ import annotations

from dataclasses import dataclass

from adaround_ext.config import AdaRoundConfig, Start


@dataclass(frozen=True)
class Settings:
    """Every setting that depends on preset and objective; 0 where it is not used."""

    starts: tuple[Start, ...]
    scale_candidates: int
    search_steps: int
    rounds: int
    steps: int
    learning_rate: float
    reg_weight: float
    diagnostics: bool  # report the simple rules and every start, at a product each


@dataclass(frozen=True)
class _Preset:
    starts: tuple[Start, ...]
    scale_candidates: int
    search_steps: int
    rounds: int
    gram_steps: int
    sampled_steps: int
    diagnostics: bool = True


_PRESETS = {
    "fast": _Preset(("gptq",), 2, 0, 0, 200, 500, diagnostics=False),
    "balanced": _Preset(("gptq", "adaround"), 7, 2000, 1, 300, 2000),
    "best": _Preset(("gptq", "adaround"), 15, 10_000, 3, 1000, 2000),
}
# (learning rate, reg_weight) by objective and scale_free.
_LOSS = {
    ("gram", True): (5e-2, 1.0),
    ("gram", False): (5e-2, 0.01),
    ("sampled", True): (1e-2, 1.0),
    ("sampled", False): (1e-3, 0.01),
}
# From so many columns on a search has all its steps; short rows are at their best much earlier.
_SEARCH_COLS = 128
_PAPER_STEPS = 10_000  # the paper's loss with the paper's learning rate needs its steps too


def settings(config: AdaRoundConfig, objective: str, cols: int) -> Settings:
    """``config``'s values where given, else those of its preset, of the objective and ``cols``."""
    preset = _PRESETS[config.preset]
    learning_rate, reg_weight = _LOSS[objective, config.scale_free]
    learning_rate = learning_rate if config.learning_rate is None else config.learning_rate
    reg_weight = reg_weight if config.reg_weight is None else config.reg_weight
    if objective == "sampled":
        steps = preset.sampled_steps if config.scale_free else _PAPER_STEPS
        steps = _given(config.steps, steps)
        only: tuple[Start, ...] = ("adaround",)
        return Settings(only, 0, 0, 0, steps, learning_rate, reg_weight, preset.diagnostics)
    starts = preset.starts if config.starts is None else config.starts
    searches, refines = config.searches_scales, config.refine
    search_steps = -(-preset.search_steps * min(cols, _SEARCH_COLS) // _SEARCH_COLS)
    return Settings(
        starts,
        _given(config.scale_candidates, preset.scale_candidates) if searches else 0,
        _given(config.search_steps, search_steps) if refines else 0,
        _given(config.rounds, preset.rounds) if searches else 0,
        _given(config.steps, preset.gram_steps) if "adaround" in starts else 0,
        learning_rate,
        reg_weight,
        preset.diagnostics,
    )


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


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
