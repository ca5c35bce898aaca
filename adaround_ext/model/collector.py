"""Collector: what the layers of a unit need of their inputs, on the way to a problem."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from adaround_ext.checks import check, check_kind, has_finite_sum, infinite
from adaround_ext.distributed import ALONE, Ranks
from adaround_ext.linalg.precision import full_precision
from adaround_ext.model.sample_store import GrowingTensor
from adaround_ext.model.units import Unit
from adaround_ext.replay.calibration import unpadded
from adaround_ext.rounding.gram_problem import gram_problems
from adaround_ext.rounding.problem import Problem
from adaround_ext.rounding.sampled_problem import sampled_problems
from adaround_ext.statistics.moments import GramStatistics
from adaround_ext.statistics.pairing import paired_rows


class Collector:
    """What one unit needs of the data: moments, or for the sampled objective all of it."""

    def __init__(self, unit: Unit, folder: str | None, ranks: Ranks = ALONE) -> None:
        """folder: where the sampled objective's inputs go, None for memory. ranks: those that
        collect the rest of the same data."""
        self.unit = unit
        self._ranks = ranks
        self.seconds = 0.0
        self.rows = 0  # of all calls, without padding
        self.unpaired = 0  # of them those whose targets are the layer's outputs on them
        self._sequences = 0
        # Whether a GPU's tensors are: it would have to be waited for with every batch.
        self._finite: list[tuple[str, str, Tensor]] = []
        self._statistics: GramStatistics | None = None
        self._inputs = GrowingTensor(folder)
        self._targets = [GrowingTensor(folder) for _ in unit.targets]

    def add(
        self,
        batch: int,
        inputs: list[Tensor],
        targets: list[list[Tensor]] | None,
        mask: Tensor | None,
        segment: int,
    ) -> None:
        """Tensors of one batch, one a call.

        targets: of each layer its outputs, or where unit.watches_inputs the one list of inputs
        that give them; None where there is one stream. mask: of ``inputs`` as the unit's first
        target has it. segment: of the data, as :class:`GramStatistics` has it.
        """
        started = time.perf_counter()
        with full_precision(self.unit.layers[0].weight.device):
            self._add(batch, inputs, targets, mask, segment)
        self.seconds += time.perf_counter() - started

    def _add(
        self,
        batch: int,
        inputs: list[Tensor],
        targets: list[list[Tensor]] | None,
        mask: Tensor | None,
        segment: int,
    ) -> None:
        first = self.unit.layers[0]
        if not isinstance(first.layer, nn.Linear):
            mask = None  # of tokens, which only a linear layer has
        for call, given in enumerate(inputs):
            y = None if targets is None else self._of_call(targets, call, given)
            self._sequences += len(given) if given.dim() > 1 else 1
            x = first.samples(self._checked("inputs", unpadded(given, mask), batch))
            outputs = None if y is None else self._targets_of(x, y, mask, batch)
            self.rows += len(x)
            if targets is not None and outputs is None:
                self.unpaired += len(x)
            if len(x) == 0:
                continue
            if self.unit.sampled:
                self._store(x, outputs)
                continue
            self._moments().add(x, outputs, segment)

    def _of_call(
        self, targets: list[list[Tensor]], call: int, inputs: Tensor
    ) -> list[Tensor] | None:
        """The targets of a call with these inputs; None where shapes depend on the data."""
        values = [of_layer[call] for of_layer in targets if call < len(of_layer)]
        if len(values) < len(targets) or not all(self._fits(inputs, y) for y in values):
            return None
        return values

    def _targets_of(
        self, x: Tensor, values: list[Tensor], mask: Tensor | None, batch: int
    ) -> tuple[Tensor, ...] | None:
        """What the statistics take as targets for samples x; None for the layers' own outputs."""
        layers = self.unit.layers
        if not self.unit.watches_inputs:
            return tuple(
                layer.output_samples(self._checked("outputs", unpadded(y, mask), batch))
                for layer, y in zip(layers, values, strict=True)
            )
        y = self._checked("full-precision inputs", unpadded(values[0], mask), batch)
        y = layers[0].samples(y)
        if self.unit.rows_chosen and self.unit.sampled:
            return None  # a minibatch has no say in what GramProblem decides
        if self.unit.rows_chosen:
            paired = paired_rows(x, y)
            missing = len(x) - int(paired.sum())
            if missing == len(x):
                return None
            self.unpaired += missing
            y = torch.where(paired.view(-1, *[1] * (y.dim() - 1)), y, x)
        if self.unit.from_inputs:
            return (y,)
        return tuple(layer.forward(y.float(), layer.weight, layer.bias) for layer in layers)

    def _moments(self) -> GramStatistics:
        if self._statistics is None:  # not before: the layer may have been elsewhere
            config = self.unit.targets[0].config
            self._statistics = GramStatistics(
                self.unit.layers, config.positions, config.seed, self._ranks, self.unit.from_inputs
            )
        return self._statistics

    def _fits(self, x: Tensor, y: Tensor) -> bool:
        """Whether an output [..., features] or [samples, channels, *size] fits an input."""
        layer = self.unit.layers[0]
        if self.unit.watches_inputs:
            return x.shape == y.shape
        if isinstance(layer.layer, nn.Linear):
            return x.shape[:-1] == y.shape[:-1]
        if x.dim() < layer.weight.dim():  # no dimension of samples
            return x.dim() == y.dim()
        return x.shape[:1] == y.shape[:1]

    def _checked(self, kind: str, value: Tensor, batch: int) -> Tensor:
        name = f"{self.unit.names} in calibration batch {batch}"
        device = self.unit.layers[0].weight.device
        if device.type != "cuda":
            return check(kind, value, device, name)
        tensor = check_kind(kind, value, device)
        self._finite.append((kind, name, has_finite_sum(tensor)))
        return tensor

    def _refuse_infinite(self) -> None:
        checks, self._finite = self._finite, []
        flags = torch.stack([flag for *_, flag in checks]).tolist() if checks else []
        for (kind, name, _), finite in zip(checks, flags, strict=True):
            if not finite:
                raise infinite(kind, name, "NaN or infinite values")

    def _store(self, x: Tensor, outputs: tuple[Tensor, ...] | None) -> None:
        """All of it, for the sampled objective."""
        self._inputs.append(x)
        for index, (layer, store) in enumerate(zip(self.unit.layers, self._targets, strict=True)):
            if outputs is None:
                store.append(layer.forward(x.float(), layer.weight, layer.bias))
            else:
                store.append(outputs[index])

    def finish(self) -> bool:
        """Joins what all ranks have collected, once; False where no row came to any of them."""
        started = time.perf_counter()
        with self._ranks.together("statistics"):
            self._refuse_infinite()
        ranks = self._ranks
        counts = ranks.gather((self._sequences, self.rows, self.unpaired), "statistics")
        columns = zip(*counts, strict=True)
        self._sequences, self.rows, self.unpaired = (sum(column) for column in columns)
        if self.rows == 0:
            return False
        if not self.unit.sampled:
            with full_precision(self.unit.layers[0].weight.device):
                self._moments().finish()
        elif ranks.size > 1:
            self._inputs = self._inputs.joined(ranks)
            self._targets = [store.joined(ranks) for store in self._targets]
        self.seconds += time.perf_counter() - started
        return True

    def problems(self) -> Iterator[tuple[list[int], Iterator[Problem]]]:
        """Indices of targets with the same settings, and their problems, after finish()."""
        seconds = self.seconds
        rows = torch.arange(sum(layer.rows for layer in self.unit.layers), device="cpu")
        split = rows.split([layer.rows for layer in self.unit.layers])
        for indices in self.unit.same_settings():
            targets = [self.unit.targets[i] for i in indices]
            layers, config = [t.matrix for t in targets], targets[0].config
            reason = targets[0].reason
            if self._statistics is None:
                outputs = tuple(self._targets[i].tensor() for i in indices)
                yield indices, sampled_problems(
                    layers, self._inputs.tensor(), outputs, self._sequences, config, reason,
                    seconds,
                )  # fmt: skip
            else:
                moments = self._statistics.rows(torch.cat([split[i] for i in indices]))
                chosen = self.unit.rows_chosen and self._statistics.has_targets
                yield indices, gram_problems(layers, moments, config, reason, seconds, chosen)
            seconds = 0.0
