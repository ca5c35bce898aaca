"""Small models that choose rows, and what a layer of theirs costs on the inputs it gets."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES, ROWS = 16, 64


class Chooses(nn.Module):
    """Three layers; between the first and the second ``choose`` gives the rows."""

    def __init__(self, choose: Callable[[Chooses, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.c = nn.Linear(FEATURES, 4)
        self.choose = choose
        self.generator = torch.Generator().manual_seed(1)
        self.numpy_generator = np.random.default_rng(1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.choose(self, torch.relu(self.a(x)))
        return self.c(torch.relu(self.b(x)))


def _shuffled(rows: int) -> list[int]:
    order = list(range(rows))
    random.shuffle(order)
    return order


# Rows by the data: other tokens in two streams.
BY_DATA: dict[str, Callable[[Chooses, Tensor], Tensor]] = {
    "argsort": lambda model, x: x[x[:, 0].argsort()],
    "argsort in Python": lambda model, x: x[x[:, 0].argsort().tolist()],
    "argsort in NumPy": lambda model, x: x[np.argsort(x[:, 0].numpy())],
    "sort": lambda model, x: x.sort(0).values,
    "topk": lambda model, x: x[x.sum(1).topk(len(x) // 2).indices],
    "gather": lambda model, x: x.gather(0, x[:, :1].argsort(0).expand(-1, FEATURES)),
    "index_select": lambda model, x: x.index_select(0, x[:, 0].argsort()),
    "items": lambda model, x: torch.stack(
        [x[i] for i in sorted(range(len(x)), key=lambda i: float(x[i, 0]))]
    ),
    "embedding": lambda model, x: F.embedding(x[:, :8].argmax(1), model.a.weight),
    "multinomial": lambda model, x: x[torch.multinomial(x.sum(1).softmax(0), len(x))],
}
# The same rows in both streams.
BY_THE_MODEL: dict[str, Callable[[Chooses, Tensor], Tensor]] = {
    "as they are": lambda model, x: x,
    "reversed": lambda model, x: x.flip(0),
    "torch's permutation": lambda model, x: x[torch.randperm(len(x))],
    "NumPy's permutation": lambda model, x: x[np.random.permutation(len(x))],
    "Python's permutation": lambda model, x: x[_shuffled(len(x))],
    "NumPy's noise": lambda model, x: x + 0.3 * torch.from_numpy(np.random.randn(*x.shape)).float(),
    "torch's noise": lambda model, x: x + 0.3 * torch.randn_like(x),
}
# Others in every run, whatever is seeded.
BY_ITSELF: dict[str, Callable[[Chooses, Tensor], Tensor]] = {
    "noise": lambda model, x: x + 0.3 * torch.randn(x.shape, generator=model.generator),
    "NumPy's noise": lambda model, x: (
        x + 0.3 * torch.from_numpy(model.numpy_generator.standard_normal(x.shape)).float()
    ),
    "a permutation": lambda model, x: x[torch.randperm(len(x), generator=model.generator)],
    "NumPy's permutation": lambda model, x: x[model.numpy_generator.permutation(len(x))],
}


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(FEATURES, 24), nn.Linear(FEATURES, 24)
        self.down = nn.Linear(24, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Experts(nn.Module):
    """A mixture as transformers had them: a loop over experts, each with the rows routed to it."""

    def __init__(self, count: int = 4, top: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(FEATURES, count)
        self.experts = nn.ModuleList(Expert() for _ in range(count))
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(self.top, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            if len(rows):
                out.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return x + out


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(FEATURES), nn.Linear(FEATURES, FEATURES), Experts())
            for _ in range(2)
        )
        self.head = nn.Linear(FEATURES, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def nearest(weight: Tensor, bits: int) -> Tensor:
    """Rounded on a symmetric grid up to each row's largest magnitude."""
    limit = 2 ** (bits - 1)
    scale = weight.abs().amax(1, keepdim=True) / (limit - 1)
    return (weight / scale).round().clamp(-limit, limit - 1) * scale


@torch.no_grad()
def against_nearest(
    model: nn.Module, full: nn.Module, names: Iterable[str], bits: int, run: Callable[[], object]
) -> dict[str, float]:
    """By layer, its error on the inputs that it gets in ``run``, over that of nearest rounding."""
    given: dict[str, list[Tensor]] = {name: [] for name in names}
    layers, before = dict(model.named_modules()), dict(full.named_modules())

    def see(name: str) -> Callable[..., None]:
        return lambda module, args: given[name].append(args[0].flatten(0, -2))

    hooks = [layers[name].register_forward_pre_hook(see(name)) for name in given]
    run()
    for hook in hooks:
        hook.remove()
    found = {}
    for name, inputs in given.items():
        x, layer = torch.cat(inputs), before[name]
        error = (layers[name](x) - layer(x)).square().sum()
        rounded = x @ (nearest(layer.weight, bits) - layer.weight).t()
        found[name] = float(error / rounded.square().sum())
    return found
