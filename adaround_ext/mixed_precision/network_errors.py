"""Network error: how far a model's outputs are off with one of its layers quantized."""

from __future__ import annotations

from itertools import zip_longest
from math import inf, isfinite

import torch
from torch import Tensor
from tqdm.auto import tqdm

from adaround_ext.mixed_precision.result import Errors
from adaround_ext.model.apply import with_weights
from adaround_ext.planning.plan import Target
from adaround_ext.replay.cache import ActivationCache
from adaround_ext.replay.calibration import Calibration
from adaround_ext.result import QuantizedWeight
from adaround_ext.tensors import tensors


def network_errors(
    data: Calibration,
    padding: list[str | None],
    targets: list[Target],
    widths: tuple[int, ...],
    solutions: ActivationCache,
    batches: int,
    seed: int,
    progress: bool,
) -> Errors:
    """||f(x; W_q) - f(x)||^2 / ||f(x)||^2 by layer and width, over the first ``batches``.

    padding: of each tensor that the model returns the name of its mask. solutions: codes, scales,
    zero points and biases by layer and width. Raises ValueError as ``sensitivity`` has it.
    """
    energy = 0.0
    missed: Errors = {target.name: dict.fromkeys(widths, 0.0) for target in targets}
    total = batches * len(targets) * len(widths)
    with tqdm(total=total, disable=not progress, desc="measuring", unit="run") as bar:
        for batch in range(batches):
            masks = [data.mask(batch, name) for name in padding]
            expected = _outputs(data, batch, masks, seed)
            energy += sum(_energy(y, torch.zeros_like(y)) for y in expected)
            for target in targets:
                for width in widths:
                    codes, scale, zero_point, bias = solutions.get((target.name, width))
                    quantized = QuantizedWeight(codes, scale, zero_point, width)
                    weight = quantized.dequantize(target.matrix)
                    with with_weights([(target, weight, bias)]):
                        outputs = _outputs(data, batch, masks, seed)
                    if [y.shape for y in outputs] != [y.shape for y in expected]:
                        raise ValueError(
                            "model must return tensors of the same shapes when it is quantized, "
                            f"got others with {target.name} at {width} bits: give a forward_fn "
                            "that returns what is to be compared"
                        )
                    pairs = zip(expected, outputs, strict=True)
                    missed[target.name][width] += sum(_energy(y, z) for y, z in pairs)
                    bar.update()
    if energy == 0:
        raise ValueError("model must return other outputs than zeros on calibration, got only them")
    return {
        name: {width: e / energy if isfinite(e) else inf for width, e in by_width.items()}
        for name, by_width in missed.items()
    }


def _outputs(data: Calibration, batch: int, masks: list[Tensor | None], seed: int) -> list[Tensor]:
    """The floating-point tensors that the model returns, without padding, at least float32."""
    returned = data.run(batch, seed + batch)  # the same draws in every run
    outputs = [t for t in tensors(returned) if t.is_floating_point()]
    if not outputs:
        rule = "model must return floating-point tensors, or forward_fn must"
        raise ValueError(f"{rule}, got {type(returned).__name__} without any")
    outputs = [
        t if mask is None or t.shape[:2] != mask.shape else t[mask.to(t.device)]
        for t, mask in zip_longest(outputs, masks[: len(outputs)])
    ]
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in outputs]


def _energy(expected: Tensor, outputs: Tensor) -> float:
    """||expected - outputs||^2, where expected is finite."""
    difference = torch.where(expected.isfinite(), expected - outputs, 0.0)
    return float(difference.square().sum(dtype=torch.float64))
