"""Layers under test, what enters them, and the error that a rounding makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adaround_ext.layers.matrix import matrix_layer
from benchmarks.workloads import minilm

# Layers that share their inputs, by the one whose inputs are kept.
ENTRIES = {
    "query": ("query", "key", "value"),
    "attn.output": ("attn.output",),
    "intermediate": ("intermediate",),
    "output": ("output",),
}
BLOCKS = 6


@dataclass(frozen=True)
class Moments:
    """What a rounding's error depends on: E[x x^T] [groups, cols, cols], E[x] [groups, cols].

    x are a layer's inputs, or a convolution's patches; both are float64.
    """

    gram: Tensor
    mean: Tensor

    @staticmethod
    def of(layer: nn.Module, batches: Iterable[Tensor]) -> Moments:
        matrix = matrix_layer(layer)
        device = matrix.weight.device
        shape = (matrix.groups, matrix.cols, matrix.cols)
        gram = torch.zeros(shape, dtype=torch.float64, device=device)
        mean = torch.zeros(shape[:2], dtype=torch.float64, device=device)
        count = 0
        for batch in batches:
            for patches, _ in matrix.patches(matrix.samples(batch)):
                x = patches.double()
                gram.baddbmm_(x, x.mT)
                mean += x.sum(2)
                count += x.shape[2]
        return Moments(gram / count, mean / count)

    def row_errors(self, error: Tensor, bias_change: Tensor | None = None) -> Tensor:
        """E (e x + d)^2 = e G e^T + 2 d e mu + d^2 for every row e of ``error`` [rows, cols]."""
        parts = error.double().view(len(self.gram), -1, error.shape[1])
        squares = (torch.bmm(parts, self.gram) * parts).sum(2).flatten()
        if bias_change is None:
            return squares
        drift = torch.bmm(parts, self.mean.unsqueeze(2)).flatten()
        return squares + 2 * bias_change * drift + bias_change.square()


@dataclass(frozen=True)
class Subject:
    """A layer with its calibration inputs, and the moments of these and of held-out inputs."""

    family: str
    name: str
    layer: nn.Linear | nn.Conv2d
    inputs: Tensor
    calibration: Moments
    held_out: Moments

    @property
    def matrix(self) -> Tensor:
        """The weight as [rows, cols]."""
        return self.layer.weight.detach().flatten(1)

    def relative_errors(
        self, weight: Tensor, bias: Tensor | None, rows: slice = slice(None)
    ) -> tuple[float, float]:
        """(held-out, calibration) E||(W_q - W) x + d||^2 / E||W x||^2 over some rows.

        ``bias`` is the new one, or None where it is unchanged (d = 0).
        """
        error = weight.detach().flatten(1).double() - self.matrix.double()
        change = None
        if bias is not None:
            change = bias.detach().double()
            if self.layer.bias is not None:
                change = change - self.layer.bias.detach().double()
        errors = []
        for moments in (self.held_out, self.calibration):
            lost = moments.row_errors(error, change)[rows].sum()
            errors.append(float(lost / moments.row_errors(self.matrix)[rows].sum()))
        return errors[0], errors[1]


def check_moments(layer: nn.Module, inputs: Tensor, moments: Moments) -> None:
    """AssertionError unless the moments give the mean squared output error of some rounding."""
    matrix = matrix_layer(layer)
    generator = torch.Generator(inputs.device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)

    error, change = drawn(matrix.rows, matrix.cols), drawn(matrix.rows)
    x = matrix.samples(inputs).double()
    outputs = matrix.forward(x, matrix.weight_from_matrix(error), change)
    direct = outputs.square().sum() / (outputs.numel() // matrix.rows)
    by_moments = moments.row_errors(error, change).sum()
    if not abs(by_moments / direct - 1) < 1e-9:
        raise AssertionError(f"{layer}: moments give {by_moments}, the definition {direct}")


def transformer(
    model: nn.Module,
    calibration: Iterable[Mapping[str, Tensor]],
    held_out: Iterable[Mapping[str, Tensor]],
    blocks: tuple[int, ...],
) -> Iterator[Subject]:
    """The six Linear layers of each block with what enters them in the full-precision model.

    All blocks' inputs are kept in float32 and let go of block by block.
    """
    known, unknown = (_capture(model, batches, blocks) for batches in (calibration, held_out))
    for number, block in enumerate(blocks):
        layers = minilm.block_layers(model, block)
        for entry, names in ENTRIES.items():
            inputs, other = (
                torch.cat(captured.pop((block, entry))) for captured in (known, unknown)
            )
            moments = [Moments.of(layers[entry], x.split(32)) for x in (inputs, other)]
            if number == 0:
                check_moments(layers[entry], other, moments[1])
            for name in names:
                yield Subject("minilm", f"{block}.{name}", layers[name], inputs, *moments)


@torch.no_grad()
def _capture(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], blocks: tuple[int, ...]
) -> dict[tuple[int, str], list[Tensor]]:
    """What enters the blocks' layers in one pass, as float32 [sequences, tokens, features]."""
    device = next(model.parameters()).device
    captured: dict[tuple[int, str], list[Tensor]] = {}
    with ExitStack() as hooks:
        for block in blocks:
            layers = minilm.block_layers(model, block)
            for entry in ENTRIES:
                held = captured.setdefault((block, entry), [])

                def keep(_: nn.Module, args: tuple[Tensor, ...], held: list[Tensor] = held) -> None:
                    held.append(args[0].float())

                hooks.enter_context(layers[entry].register_forward_pre_hook(keep))
        for batch in batches:
            model(**{key: value.to(device) for key, value in batch.items()})
    return captured
