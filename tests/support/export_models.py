"""Small quantized models for the tests of exports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext import quantize_


def quantized(model: nn.Module, x: Tensor, **settings: Any) -> nn.Module:
    """The model in eval mode, quantized on ``x`` with the fast preset."""
    settings = {"preset": "fast", "progress": False} | settings
    quantize_(model.eval(), [x], **settings)
    return model


def convolutional() -> tuple[nn.Module, Tensor]:
    """A network with batch norms, depthwise, dilated and transposed convolutions, and inputs."""
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 2, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 6, 3, dilation=2, padding="same", padding_mode="reflect"),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 5),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model, torch.randn(16, 4, 8, 8)


class Tied(nn.Module):
    """Two Linears with one weight, one without a bias, an embedding, a buffer and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.last = nn.Linear(16, 7, bias=False)
        self.register_buffer("shift", torch.randn(16))
        self.register_buffer("factor", torch.rand(()) + 0.5, persistent=False)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        x = self.embedding(ids) + self.shift
        x = torch.tanh(self.second(torch.relu(self.first(x)))) * self.factor
        return {"logits": self.last(x), "hidden": x}


def tied() -> tuple[nn.Module, Tensor]:
    """A :class:`Tied` and token ids."""
    torch.manual_seed(3)
    return Tied(), torch.randint(11, (8, 12))
