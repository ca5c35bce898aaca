"""Sampled problems: a layer that is solved on minibatches, with its activation function."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaround_ext.config import AdaRoundConfig
from adaround_ext.distributed import ALONE, Ranks
from adaround_ext.grid import QuantGrid, make_grid, nearest_codes
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.presets import Settings, settings
from adaround_ext.rounding.anneal import anneal
from adaround_ext.rounding.problem import Outcome, Problem, Stopwatch, weight_counts
from adaround_ext.rounding.sampled_objective import SampledObjective

# Of a linear layer's inputs, a sample of a minibatch: as many whatever the inputs' shape, since the
# tokens of a sequence are drawn apart from each other anyway.
_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class SampledProblem(Problem):
    """One layer under its sampled objective."""

    objective: SampledObjective
    kind = "sampled"

    def solve(self, config: AdaRoundConfig, ranks: Ranks = ALONE) -> Outcome:
        """Grid, annealing, and what is reported of each row."""
        assert ranks.size == 1, "rows of a sampled problem are not shared"
        chosen = settings(config, self.kind, self.weight.shape[1])
        watch = Stopwatch({"statistics": self.collecting_seconds}, self.weight.device)
        searches = config.searches_scales  # which only the Gram objective can
        grid_config = dataclasses.replace(config, scale="mse") if searches else config
        grid = make_grid(self.weight, grid_config)
        watch.lap("grid")
        outcome = self._anneal(grid, config, chosen, watch)
        if chosen.diagnostics:
            outcome.add_rules(self, grid, config.seed)
        watch.stop()
        return outcome

    def _anneal(
        self, grid: QuantGrid, config: AdaRoundConfig, chosen: Settings, watch: Stopwatch
    ) -> Outcome:
        """The paper's way: anneal, decide, and keep nearest in the rows where it is better."""
        weight = self.weight
        annealed = anneal(weight, grid, self.objective, chosen, config, self.name)
        nearest, hard = nearest_codes(weight, grid), annealed.codes
        losses = {
            "nearest": self.row_losses(nearest, grid),
            "soft": self.objective.row_losses(annealed.weight_q),
            "hard": self.row_losses(hard, grid),
        }
        losses["adaround"] = losses["hard"]
        losses["final"] = torch.minimum(losses["hard"], losses["nearest"])
        better = losses["hard"] < losses["nearest"]
        codes = torch.where(better[:, None], hard, nearest)
        watch.lap("annealing")
        return Outcome(
            codes=codes,
            grid=grid,
            bias=None,
            energies=self.objective.row_energies,
            losses=losses,
            counts=weight_counts(weight, codes, grid, annealed.undecided),
            row_flags={"fallback": losses["hard"] > losses["nearest"]},
            starts={"adaround": torch.ones_like(better)},
            seconds=watch.seconds,
        )


def sampled_problems(
    layers: list[MatrixLayer],
    inputs: Tensor,
    targets: tuple[Tensor, ...] | None,
    samples: int,
    config: AdaRoundConfig,
    reason: str,
    seconds: float,
) -> Iterator[SampledProblem]:
    """A problem a layer, on the same inputs, which stay in memory.

    ``samples``: how many the caller gave, sequences or images.
    """
    started = time.perf_counter()
    linear = isinstance(layers[0].layer, nn.Linear)
    batch = config.batch_size * (min(_TOKENS, len(inputs)) if linear else 1)
    for index, layer in enumerate(layers):
        if targets is None:
            outputs = layer.forward(inputs, layer.weight, layer.bias)
        else:
            outputs = targets[index]
        objective = SampledObjective(
            layer, layer.weight_matrix().float(), inputs, outputs, _activation(config), batch,
            config.scale_free, config.seed,
        )  # fmt: skip
        seconds += time.perf_counter() - started
        yield SampledProblem(
            layers=[layer],
            objective=objective,
            reason=reason,
            samples=samples,
            collecting_seconds=seconds,
            notes=_bias_notes(layer, config),
        )
        started, seconds = time.perf_counter(), 0.0


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


def _bias_notes(layer: MatrixLayer, config: AdaRoundConfig) -> tuple[str, ...]:
    stays = layer.bias is not None and config.bias == "refit"
    return ("the bias stays as it is: only the Gram form refits it",) if stays else ()
