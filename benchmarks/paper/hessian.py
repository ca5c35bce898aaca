"""The task loss in one layer's weights: its gradient and its Hessian, exactly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.paper.workload import Images, Layer


@dataclass(frozen=True)
class Expansion:
    """The loss about the layer's weights w: L(w + d) = L(w) + g d + d H d^T / 2 + ...

    gradient float64 [weights], hessian float64 [weights, weights], both of the mean cross-entropy,
    the weights row after row.
    """

    gradient: Tensor
    hessian: Tensor

    def quadratic(self, changes: Tensor) -> Tensor:
        """d H d^T / 2 of each change [n, weights], float64 [n]."""
        changes = changes.double()
        return (changes @ self.hessian * changes).sum(1) / 2

    def diagonal(self, changes: Tensor) -> Tensor:
        """The same without what two weights do together."""
        return changes.double().square() @ self.hessian.diagonal() / 2

    def within_rows(self, changes: Tensor, rows: int) -> Tensor:
        """The same with what two weights of one row, but not of two rows, do together."""
        parts = changes.double().view(len(changes), rows, -1)
        blocks = self.hessian.view(rows, parts.shape[2], rows, parts.shape[2])
        blocks = torch.stack([blocks[row, :, row] for row in range(rows)])
        return torch.einsum("nrc,rcd,nrd->n", parts, blocks, parts) / 2


def expansion(layer: Layer, data: Images) -> Expansion:
    """H = E[J^T (diag(p) - p p^T) J] and g = E[J^T (p - t)], J of the logits, t the labels.

    In the weights of one layer the logits are piecewise linear, with ReLU or ReLU6 after it as
    without, so that the Gauss-Newton matrix is the Hessian itself wherever there is one.
    """
    jacobian = _jacobian(layer, data.images)
    with torch.no_grad():
        p = layer.logits(layer.weight, data.images).double().softmax(1)
    gradient = torch.einsum("nk,nkw->w", p - F.one_hot(data.labels, p.shape[1]), jacobian)
    # diag(p) - p p^T = L L^T with L = diag(sqrt p) - p sqrt(p)^T.
    root = p.sqrt()
    factor = torch.diag_embed(root) - p[:, :, None] * root[:, None, :]
    rows = torch.einsum("nki,nkw->niw", factor, jacobian).flatten(0, 1)
    return Expansion(gradient / len(p), rows.T @ rows / len(p))


def _jacobian(layer: Layer, images: Tensor) -> Tensor:
    """d logits / d weights, float64 [images, classes, weights]: one backward pass a class."""
    (offset,), logits = _with_offset(layer, images)
    inputs = layer.matrix.samples(layer.inputs(images))
    patches = torch.cat([patch for patch, _ in layer.matrix.patches(inputs)], 2)
    if len(patches) != 1:
        raise ValueError(f"layer must have one group, got {len(patches)}")
    patches = patches.view(layer.matrix.cols, len(images), -1).double()
    columns = []
    for k in range(logits.shape[1]):
        (slope,) = torch.autograd.grad(logits[:, k].sum(), offset, retain_graph=True)
        slope = slope.flatten(2).double()
        columns.append(torch.einsum("nrp,cnp->nrc", slope, patches).flatten(1))
    return torch.stack(columns, 1)


def _with_offset(layer: Layer, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """What is added to the layer's outputs (zeros, to be differentiated in), and the logits."""
    offsets: list[Tensor] = []

    def add(module: object, inputs: object, output: Tensor) -> Tensor:
        offsets.append(torch.zeros_like(output, requires_grad=True))
        return output + offsets[-1]

    with layer.matrix.layer.register_forward_hook(add):
        logits = layer.model(images)
    return offsets, logits


def gram(layer: Layer, images: Tensor) -> Tensor:
    """E[x x^T] over images, summed over positions, float64 [cols, cols]: eq. (19), appendix B."""
    total = torch.zeros(layer.matrix.cols, layer.matrix.cols, dtype=torch.float64)
    for patches, _ in layer.matrix.patches(layer.matrix.samples(layer.inputs(images))):
        x = patches[0].double()
        total += x @ x.T
    return total / len(images)


def local(gram: Tensor, changes: Tensor) -> Tensor:
    """tr(D G D^T), the change of the layer's outputs, of each D, given as [n, weights]."""
    parts = changes.double().view(len(changes), -1, len(gram))
    return torch.einsum("nrc,cd,nrd->n", parts, gram, parts)
