"""The experiments by name, in the order in which docs/method.md has them."""

from __future__ import annotations

from benchmarks.paper import (
    bias,
    data,
    grids,
    objectives,
    parts,
    reconstruction,
    relaxations,
    schemes,
    taylor,
    texts,
)
from benchmarks.paper.experiment import Experiment

_ALL = (
    schemes.EXPERIMENT,
    taylor.EXPERIMENT,
    objectives.EXPERIMENT,
    relaxations.EXPERIMENT,
    reconstruction.EXPERIMENT,
    grids.EXPERIMENT,
    bias.EXPERIMENT,
    data.EXPERIMENT,
    texts.EXPERIMENT,
    parts.EXPERIMENT,
)
EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}
