"""Layers and models, good and odd, each with a batch that it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.fuzz.driver_values import Planted
from tests.support import models

Made = tuple[Any, Tensor]


def _linear(rows: int, cols: int, batch: int = 20, **options: Any) -> Made:
    return nn.Linear(cols, rows, **options), torch.randn(batch, cols)


def _with_weight(value: float) -> Made:
    layer, x = _linear(4, 6)
    with torch.no_grad():
        layer.weight[1, 2] = value
    return layer, x


LAYERS: dict[str, Callable[[], Made]] = {
    "linear": lambda: _linear(4, 6),
    "one-weight": lambda: _linear(1, 1),
    "odd": lambda: _linear(5, 33, bias=False),
    "wide": lambda: _linear(3, 65, 3),
    "sequences": lambda: (nn.Linear(6, 4), torch.randn(3, 5, 6)),
    "conv": lambda: (nn.Conv2d(2, 4, 3), torch.randn(3, 2, 5, 5)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 2, groups=2, padding=1), torch.randn(3, 4, 5)),
    "circular": lambda: (
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
        torch.randn(3, 2, 5, 5),
    ),
    "depthwise": lambda: (nn.Conv2d(3, 3, 2, groups=3, bias=False), torch.randn(2, 3, 4, 4)),
    "transposed": lambda: (nn.ConvTranspose1d(4, 6, 3, stride=2), torch.randn(3, 4, 5)),
    "two": lambda: ([nn.Linear(6, 4), nn.Linear(6, 3, bias=False)], torch.randn(20, 6)),
    "iterator": lambda: ([nn.Linear(6, 4), nn.Linear(6, 2)], torch.randn(20, 6)),
    "twice": lambda: ([nn.Linear(6, 4)] * 2, torch.randn(20, 6)),
    "zero-weight": lambda: (_zeros(nn.Linear(6, 4)), torch.randn(20, 6)),
    "trained": lambda: (nn.Linear(6, 4).train(), torch.randn(20, 6)),
}
BAD_LAYERS: dict[str, Callable[[], Made]] = {
    "unlike": lambda: ([nn.Linear(6, 4), nn.Linear(6, 4).double()], torch.randn(20, 6)),
    "mixed": lambda: ([nn.Linear(6, 4), nn.Conv2d(2, 4, 3)], torch.randn(20, 6)),
    "no-layers": lambda: ([], torch.randn(20, 6)),
    "relu": lambda: (nn.ReLU(), torch.randn(20, 6)),
    "none": lambda: (None, torch.randn(20, 6)),
    "text": lambda: ("layer", torch.randn(20, 6)),
    "tensor": lambda: (torch.randn(4, 6), torch.randn(20, 6)),
    "class": lambda: (nn.Linear, torch.randn(20, 6)),
    "lazy": lambda: (nn.LazyLinear(4), torch.randn(20, 6)),
    "normed": lambda: (parametrizations.weight_norm(nn.Linear(6, 4)), torch.randn(20, 6)),
    "nan-weight": lambda: _with_weight(float("nan")),
    "huge-weight": lambda: _with_weight(3e38),
    "denormal-weight": lambda: _with_weight(1e-42),
    "no-columns": lambda: (nn.Linear(0, 4), torch.randn(20, 0)),
    "no-rows": lambda: (nn.Linear(6, 0), torch.randn(20, 6)),
    "meta": lambda: (nn.Linear(6, 4, device="meta"), torch.randn(20, 6)),
    "float8": lambda: (nn.Linear(6, 4).to(torch.float8_e4m3fn), torch.randn(20, 6)),
    "complex": lambda: (nn.Linear(6, 4).to(torch.complex64), torch.randn(20, 6)),
    "replaced": lambda: (_replaced(torch.randn(5, 7)), torch.randn(20, 6)),
    "vector-weight": lambda: (_replaced(torch.randn(24)), torch.randn(20, 6)),
}


def _zeros(layer: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        layer.weight.zero_()
    return layer


def _replaced(weight: Tensor) -> nn.Linear:
    """A layer whose weight no longer is what its sizes say."""
    layer = nn.Linear(6, 4)
    layer.weight = nn.Parameter(weight)
    return layer


class Faulty(nn.Module):
    """Raises in its ``fails_at``-th run, between its layers."""

    def __init__(self, fails_at: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)
        self.fails_at, self.runs = fails_at, 0

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        self.runs += 1
        if self.runs >= self.fails_at:
            raise Planted("in the middle of a run")
        return self.second(y.relu())


class NanInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).log())


class Branches(nn.Module):
    """What runs depends on the data; one layer never does."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.never = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if bool(x.sum() < 0):
            return self.left(x)
        return self.right(x)


def _hooked(hook: Callable[..., Any]) -> Made:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    model[0].register_forward_hook(hook)
    return model, torch.randn(20, 6)


def _raising(*args: Any) -> Any:
    raise Planted("in a hook")


def _shared() -> Made:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(6, 4)), torch.randn(20, 6)


def _half_meta() -> Made:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4, device="meta"))
    return model, torch.randn(20, 6)


MODELS: dict[str, Callable[[], Made]] = {
    "mlp": lambda: (nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(20, 6)),
    "one-layer": lambda: (nn.Linear(6, 4), torch.randn(20, 6)),
    "norms": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                      nn.Linear(36, 3)),
        torch.randn(6, 2, 5, 5),
    ),
    "dropout": lambda: (
        nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.BatchNorm1d(8), nn.Linear(8, 4)),
        torch.randn(20, 6),
    ),
    "residual": lambda: (models.ResidualNet(), torch.randn(4, 3, 6, 6)),
    "transformer": lambda: (models.Transformer(), models.tokens(4, 5)),
    "reused": lambda: (models.Reused(), torch.randn(20, 8)),
    "shared": _shared,
    "experts": lambda: (models.Experts(), torch.randn(20, 8)),
    "side-door": lambda: (models.SideDoor(), torch.randn(20, 8)),
    "branches": lambda: (Branches(), torch.randn(20, 6)),
    "hooked": lambda: _hooked(lambda module, args, y: 2 * y),
    "lstm": lambda: (nn.Sequential(nn.Linear(6, 4), nn.LSTM(4, 3)), torch.randn(20, 6)),
}  # fmt: skip
BAD_MODELS: dict[str, Callable[[], Made]] = {
    "none": lambda: (None, torch.randn(20, 6)),
    "function": lambda: (torch.relu, torch.randn(20, 6)),
    "no-layers": lambda: (nn.Sequential(nn.ReLU()), torch.randn(20, 6)),
    "empty": lambda: (nn.Sequential(), torch.randn(20, 6)),
    "no-forward": lambda: (nn.ModuleList([nn.Linear(6, 4)]), torch.randn(20, 6)),
    "meta": lambda: (nn.Sequential(nn.Linear(6, 4, device="meta")), torch.randn(20, 6)),
    "half-meta": _half_meta,
    "lazy": lambda: (nn.Sequential(nn.LazyLinear(4)), torch.randn(20, 6)),
    "fails-at-once": lambda: (Faulty(1), torch.randn(20, 6)),
    "fails-later": lambda: (Faulty(3), torch.randn(20, 6)),
    "fails-late": lambda: (Faulty(7), torch.randn(20, 6)),
    "nan-inside": lambda: (NanInside(), torch.randn(20, 6)),
    "raising-hook": lambda: _hooked(_raising),
    "hook-of-text": lambda: _hooked(lambda module, args, y: "text"),
    "nan-weight": lambda: (nn.Sequential(_with_weight(float("nan"))[0]), torch.randn(20, 6)),
    "replaced": lambda: (nn.Sequential(_replaced(torch.randn(5, 6))), torch.randn(20, 6)),
    "normed": lambda: (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 2)),
        torch.randn(20, 6),
    ),
    "complex": lambda: (nn.Sequential(nn.Linear(6, 4)).to(torch.complex64), torch.randn(20, 6)),
    "mixed-dtypes": lambda: (
        nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2).double()),
        torch.randn(20, 6),
    ),
}
