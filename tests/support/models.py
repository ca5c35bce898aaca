"""Small models of every kind that a walk through a model may meet, and the walk without tricks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext import AdaRoundConfig, optimize_layer
from adaround_ext.result import LayerResult


class Net(nn.Module):
    """Submodules by name, and what to do with them."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **children: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Residual(nn.Module):
    """A residual block whose activation works in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.down = nn.Conv2d(channels, channels, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu(self.conv1(x)))
        y += self.down(x)
        return self.relu(y)


class ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu_(self.stem(x))).mean((2, 3)))


class UNet(nn.Module):
    """Early outputs are needed late."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
            for c in (3, 6)
        )
        self.middle = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ModuleList(
            nn.Sequential(nn.Conv2d(12, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1))
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.avg_pool2d(x, 2)
        x = self.middle(x)
        for block, skip in zip(self.up, reversed(skips), strict=True):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skip], 1))
        return x


class Mixer(nn.Module):
    """A block of a small transformer that gets and gives more than one thing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        scores = self.query(x) @ self.key(x).mT / x.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, :], -1e4)
        y = self.output(scores.softmax(-1) @ self.value(x))
        return {"states": self.norm(x + y), "mask": mask, "count": x.shape[1]}


class Transformer(nn.Module):
    def __init__(self, repeats: int = 1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.layers = nn.ModuleList(Mixer(16) for _ in range(3))
        self.repeats = repeats
        self.head = nn.Linear(16, 20, bias=False)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.embedding(ids)
        mask = None if attention_mask is None else attention_mask != 0
        for _ in range(self.repeats):
            for layer in self.layers:
                x = layer(x, mask=mask)["states"]
        return self.head(x), x


class Reused(nn.Module):
    """One layer in two places, and two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.again = nn.Linear(8, 8)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.right.weight = self.left.weight
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(torch.tanh(self.first(x)))
        x = self.left(torch.tanh(self.again(torch.tanh(x))))
        return self.last(torch.tanh(self.right(torch.tanh(x))))


class Writing(nn.Module):
    """Blocks that add to their input in place, while the caller keeps it."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x.add_(self.b(torch.tanh(self.a(x))))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        kept = x.clone()
        states = kept
        for block in self.blocks:
            block(states)  # what it returns is not even used
        return self.head(kept)


class SideDoor(nn.Module):
    """Blocks that hand something on behind the caller's back."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
            y = self.a(x) + shared.get("keys", torch.zeros_like(x))
            shared["keys"] = torch.tanh(y)
            return x + self.b(shared["keys"])

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        for block in self.blocks:
            x = block(x, shared)
        return x


class Experts(nn.Module):
    """A router sends tokens to experts: how many depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3)
        )
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        chosen = self.router(x).argmax(-1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            mine = chosen == index
            if bool(mine.any()):
                y[mine] = expert(x[mine])
        return self.last(y)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 20, shape)


def plain_walk(
    model: nn.Module,
    batches: Sequence[Any],
    groups: Sequence[Sequence[str]],
    config: AdaRoundConfig,
    sequential: bool = True,
) -> dict[str, LayerResult]:
    """Each group of layers fitted by running whole models, with nothing recorded or replaced.

    groups: names of layers that share their inputs, in execution order; a layer or a group whose
    weight is used several times sees all uses. The model is not changed.
    """
    full = copy.deepcopy(model).eval()
    done = copy.deepcopy(model).eval()
    results: dict[str, LayerResult] = {}
    for number, group in enumerate(groups):
        source = done if sequential else full
        layers = [full.get_submodule(name) for name in group]
        inputs, outputs = _seen(source, full, batches, group)
        targets = list(zip(*outputs, strict=True)) if sequential and number else None
        found = optimize_layer(layers, inputs, targets, config)
        for name, result in zip(group, found, strict=True):
            results[name] = result
            result.apply_(done.get_submodule(name))
    return results


@torch.no_grad()
def _seen(
    source: nn.Module, full: nn.Module, batches: Sequence[Any], group: Sequence[str]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    inputs: list[Tensor] = []
    outputs: list[list[Tensor]] = [[] for _ in group]

    def keep_input(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.append(args[0].clone())

    for batch in batches:
        hooks = [source.get_submodule(group[0]).register_forward_pre_hook(keep_input)]
        run(source, copy.deepcopy(batch))
        hooks[0].remove()
        hooks = []
        for name, kept in zip(group, outputs, strict=True):
            layer = full.get_submodule(name)
            hooks.append(
                layer.register_forward_hook(lambda m, a, y, kept=kept: kept.append(y.clone()))
            )
        run(full, copy.deepcopy(batch))
        for hook in hooks:
            hook.remove()
    return inputs, outputs


def run(model: nn.Module, batch: Any) -> Any:
    """The model on a batch as quantize_ gives it to it."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
