"""Small networks whose activations are quantized, and what is checked about each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from adaround_ext.activations.placement import Placement, place
from adaround_ext.activations.quantizer import ActivationQuantizer
from adaround_ext.activations.residuals import Flow, version
from adaround_ext.tracing.evaluation import evaluation
from adaround_ext.tracing.trace import trace


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


def placement_of(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> Placement:
    with evaluation(model):
        run = trace(model, lambda: model(*args, **kwargs))
    return place(model, run, layers_of(model))


def check_reads(model: nn.Module, *args: Tensor, missing: int = 0, **kwargs: Tensor) -> None:
    """Every layer reads what a quantizer gave, and so does every sum of its shortcut."""
    with evaluation(model):
        run = trace(model, lambda: model(*args, **kwargs))
    given = {
        version(value)
        for module in model.modules()
        if isinstance(module, ActivationQuantizer)
        for call in run.calls_of(module)
        for value in call.outputs
    }
    calls = [call for layer in layers_of(model) for call in run.calls_of(layer)]
    assert calls
    for call in calls:
        inside = [op for op in run.operators if call.spans(op.time)]
        assert any(version(value) in given for op in inside for value in op.inputs)
    flow = Flow(run, calls)
    shortcuts = [flow.shortcut(operator) for operator in run.operators]
    found = [version(value) in given for value in shortcuts if value is not None]
    assert found.count(False) == missing


class BasicBlock(nn.Module):
    """As in ResNet; ``first``: the shortcut is computed before the convolutions."""

    def __init__(self, cin: int, cout: int, first: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(cout)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(cout)
        self.downsample = None
        if cin != cout:
            self.downsample = nn.Sequential(nn.Conv2d(cin, cout, 1), nn.BatchNorm2d(cout))
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        if self.first and self.downsample is not None:
            identity = self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if not self.first and self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.layer1 = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 12, first))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer1(self.stem(x)).mean((2, 3)))


class Attention(nn.Module):
    """Softmax attention with one head, so that scores and mask have one shape."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.q(hidden), self.k(hidden), self.v(hidden)
        # Rotary: a sum of two values of one shape that is no residual.
        q = q * 0.8 + q.flip(-1) * 0.6
        scores = q @ k.mT / 4 + mask
        return self.o(scores.softmax(-1) @ v)


class PreNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        x = x + self.attention(mask=mask, hidden=self.norm1(x))
        y = self.up(self.norm2(x))
        y = 0.5 * y * (1 + torch.tanh(0.8 * (y + 0.045 * y**3)))
        return x + self.down(y)


class PostNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = Attention(dim)
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:
        x = self.norm1(self.attention(x, mask) + x)
        return self.norm2(self.down(self.up(x).relu()) + x)


class Transformer(nn.Module):
    """Embeddings of tokens and positions, whose sum is no residual addition, and two blocks."""

    def __init__(self, block: Callable[[int], nn.Module], dim: int = 16) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, dim)
        self.positions = nn.Parameter(torch.randn(1, 7, dim))
        self.blocks = nn.ModuleList(block(dim) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions
        mask = torch.where(ids[:, None, :] == 0, torch.finfo(x.dtype).min, 0.0).expand(-1, 7, -1)
        for block in self.blocks:
            x = block(x, mask=mask)
        return x


class Separable(nn.Module):
    """An inverted residual with a depthwise convolution and ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(6, 12, 1),
            nn.ReLU6(),
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
            nn.ReLU6(),
            nn.Conv2d(12, 6, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Residual(nn.Sequential):
    """A container whose own forward adds its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Children(nn.Module):
    """Runs whatever children it has."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for child in self.children():
            y = child(y).relu()
        return x + y


class Reused(nn.Module):
    """One layer and one block several times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.block = Residual(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(3 * self.layer(x).relu()).tanh()
        return self.block(self.block(x))


class Mixed(nn.Module):
    """A layer that runs inside of a block and outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.block = Residual(nn.Linear(6, 6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.block[0](self.block(self.first(x).tanh()))
