"""Half precision: the error that arithmetic in 16 bits leaves open between two runs of one model.

Sums in another order, or weights that are not rounded before they are multiplied, move results by a
unit in the last place, and layers pass that on. How far is the model's matter: measured is how far
its own outputs are from those of a copy in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from math import isfinite, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaround_ext.export.runner import module_runner
from adaround_ext.tensors import tensors

DTYPES = (torch.float16, torch.bfloat16)
_FACTOR = 4  # two runs lie on either side of float32's, and a measure of few outputs is uncertain

Batch = tuple[tuple[Any, ...], dict[str, Any]]
Compare = Callable[[Sequence[list[Tensor]], Sequence[list[Tensor]]], float]


class HalfPrecision:
    """The 16-bit dtypes of a model, and the error that they allow between two runs of it.

    Args:
        model: The simulated model.
        batches: What it was run on, positional and keyword arguments.
        outputs: All tensors that it gave, by batch.
        compare: The relative error of outputs against others.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        outputs: Sequence[list[Tensor]],
        compare: Compare,
    ) -> None:
        self.model, self._batches, self._outputs = model, batches, outputs
        self._compare = compare
        dtypes = {t.dtype for t in (*model.parameters(), *tensors(list(outputs)))}
        self.dtypes = [dtype for dtype in DTYPES if dtype in dtypes]

    @property
    def names(self) -> str:
        """Of the 16-bit dtypes that the model has."""
        return " and ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)

    @cached_property
    def allowed(self) -> float:
        """The relative error that may be between runs of the model."""
        eps = max(torch.finfo(dtype).eps for dtype in self.dtypes)
        measured = self._distance_to_float32()
        if not isfinite(measured):  # as errors of layers that know nothing of each other add up
            layers = sum(bool(module._parameters) for module in self.model.modules())
            return eps * sqrt(max(1, layers))
        return max(eps, _FACTOR * measured)

    def _distance_to_float32(self) -> float:
        """Infinite where the model does not run in float32."""
        try:
            wide = copy.deepcopy(self.model)._apply(_widened)
            run = module_runner("float32", wide).run
            outputs = [run(*pytree.tree_map(_widened, batch)) for batch in self._batches]
            return self._compare(self._outputs, outputs)
        except Exception:  # it may say itself in which dtype it computes
            return float("inf")


def _widened(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in DTYPES else leaf


def changed(stored: Iterator[tuple[str, Tensor]], model: nn.Module) -> tuple[str, ...]:
    """The parameters of a model that are stored with other bits."""
    parameters: Mapping[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return tuple(key for key, t in stored if key in parameters and not _same(t, parameters[key]))


def _same(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach().cpu(), b.detach().cpu()
    return a.dtype == b.dtype and torch.equal(a, b)
