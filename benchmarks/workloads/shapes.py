"""Sizes for the ops, and layers with their data for whole runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext import AdaRoundConfig, LayerResult
from adaround_ext.grid import QuantGrid, make_grid
from benchmarks.workloads import minilm

# [rows, cols]: one that fits in a cache and two that do not.
CPU_SHAPES = [(1536, 384), (4096, 1024), (2048, 8192)]
CUDA_SHAPES = [(256 << shift, 4096) for shift in (0, 4, 8)]  # 2^20, 2^24 and 2^28 weights

# The most that the held-out error may be of rounding to nearest's.
_MINILM = {"query": 0.42, "attn.output": 0.38, "intermediate": 0.36, "output": 0.17}
_CALIBRATION_IMAGES, _HELD_OUT_IMAGES, _SIZE = 128, 32, 56
_REAL = "MiniLM-L6 encoder block 3 (trained), English text, 320 sequences of 32 tokens"
_SYNTHETIC = (
    "synthetic: random layer (He et al.); smooth random images through a random 7x7 convolution "
    f"and ReLU, {_CALIBRATION_IMAGES} of {_SIZE}x{_SIZE}"
)


@dataclass(frozen=True)
class Workload:
    """A layer, what it receives, and the promises about it."""

    name: str
    layer: nn.Linear | nn.Conv2d
    inputs: Tensor  # calibration
    held_out: Tensor
    data: str
    most_of_nearest: float | None = None
    least_speedup: float | None = None
    most_of_reference: float | None = None

    @property
    def is_conv(self) -> bool:
        return isinstance(self.layer, nn.Conv2d)

    @property
    def channel_dim(self) -> int:
        return 1 if self.is_conv else -1

    @property
    def matrix(self) -> Tensor:
        """The weight as [rows, cols]."""
        return self.layer.weight.detach().flatten(1)

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The layer without its bias, with the weights [rows, cols]."""
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, matrix)
        weight = matrix.view_as(layer.weight)
        padding = tuple(int(p) for p in layer.padding)
        return F.conv2d(x, weight, None, layer.stride, padding, layer.dilation, layer.groups)

    def grid(self, bits: int = 4) -> QuantGrid:
        """The grid of least squared weight error, on which the reference works."""
        return make_grid(self.matrix.float(), AdaRoundConfig(bits=bits, scale="mse"))

    def result_error(self, result: LayerResult) -> float:
        """:meth:`relative_error` of a result on the held-out data, its new bias included."""
        change = None if result.bias is None else result.bias - self.layer.bias
        return self.relative_error(result.weight_q.flatten(1), self.held_out, change)

    @torch.no_grad()
    def relative_error(
        self, matrix_q: Tensor, inputs: Tensor, bias_change: Tensor | None = None
    ) -> float:
        """||(W_q - W) X + d||^2 / ||W X||^2 for a change d of the bias, summed in float64."""
        error = power = 0.0
        for x in torch.split(inputs, 32):
            missed = self.forward(x, matrix_q - self.matrix)
            if bias_change is not None:
                shape = [-1] + [1] * (missed.dim() - 2) if self.is_conv else [-1]
                missed = missed + bias_change.view(shape)
            error += _power(missed)
            power += _power(self.forward(x, self.matrix))
        return error / power


def _power(values: Tensor) -> float:
    return float(values.square().sum(dtype=torch.float64))


CONVOLUTIONS = ("resnet18.layer1", "mobilenet.depthwise", "resnet18.downsample")
DECODER = "decoder.q_proj"  # for a GPU, and only where it is named
NAMES = (*_MINILM, *CONVOLUTIONS, DECODER)


def layer_workloads(names: tuple[str, ...], device: torch.device) -> Iterator[Workload]:
    """Those of NAMES, all but DECODER where ``names`` is empty; ImportError without MiniLM."""
    chosen = names or (*_MINILM, *CONVOLUTIONS)
    if any(name in _MINILM for name in chosen):
        yield from _transformer([name for name in _MINILM if name in chosen], device)
    for name in CONVOLUTIONS:
        if name in chosen:
            yield _convolution(name, device)
    if DECODER in chosen:
        yield _decoder(device)


def _transformer(names: list[str], device: torch.device) -> Iterator[Workload]:
    model, tokenizer = minilm.load_encoder()
    layers = minilm.block_layers(model)
    calibration = minilm.layer_inputs(model, minilm.text_batches(tokenizer, "calibration"))
    held_out = minilm.layer_inputs(model, minilm.text_batches(tokenizer, "held_out"))
    for name in names:
        x, y = calibration[name].to(device), held_out[name].to(device)
        yield Workload(name, layers[name].to(device), x, y, _REAL, _MINILM[name])


def _convolution(name: str, device: torch.device) -> Workload:
    torch.manual_seed(0)
    speedup = None
    if name == "resnet18.layer1":
        layer = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        speedup = 500.0 if device.type == "cpu" else None
    elif name == "mobilenet.depthwise":
        layer = nn.Conv2d(96, 96, 3, padding=1, groups=96, bias=False)
    else:
        layer = nn.Conv2d(64, 128, 1, stride=2, bias=False)
    nn.init.kaiming_normal_(layer.weight)
    images = _activations(layer.in_channels, _CALIBRATION_IMAGES + _HELD_OUT_IMAGES).to(device)
    x, y = torch.split(images, [_CALIBRATION_IMAGES, _HELD_OUT_IMAGES])
    return Workload(name, layer.to(device), x, y, _SYNTHETIC, least_speedup=speedup)


def _decoder(device: torch.device) -> Workload:
    """A layer of 4096x4096, and inputs of which few directions carry the most."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    size, sequences, tokens = 4096, (512, 128), 32
    layer = nn.Linear(size, size, bias=False, device=device)
    with torch.no_grad():
        layer.weight.copy_(normal(size, size) * size**-0.5)
    spread = torch.arange(1, size + 1, device=device) ** -0.5
    mixing = spread[:, None] * normal(size, size) * size**-0.5 + 0.02 * torch.eye(
        size, device=device
    )
    inputs = [normal(count, tokens, size) @ mixing for count in sequences]
    data = (
        f"synthetic: Gaussian, the k-th direction with a variance of about 1 / k; {sequences[0]} "
        f"sequences of {tokens} tokens"
    )
    return Workload(DECODER, layer, *inputs, data, least_speedup=50.0, most_of_reference=1.0)


@torch.no_grad()
def _activations(channels: int, images: int) -> Tensor:
    """[images, channels, 56, 56], correlated over space and channels, not negative."""
    filters = nn.Conv2d(3, channels, 7, stride=2, padding=3)
    nn.init.kaiming_normal_(filters.weight)
    batches = []
    for count in [32] * (images // 32):
        scene = 0.1 * torch.randn(count, 3, 2 * _SIZE, 2 * _SIZE)
        for coarse in (4, 8, 16, 32):  # each octave weaker than the one before, as in photographs
            noise = torch.randn(count, 3, coarse, coarse) * 4 / coarse
            scene += F.interpolate(noise, scene.shape[2:], mode="bilinear")
        batches.append(filters(scene).relu())
    return torch.cat(batches)
