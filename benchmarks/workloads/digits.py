"""scikit-learn's handwritten digits, and two small networks with BatchNorm trained on them here."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TRAINING_IMAGES = 1300  # of 1797; the other 497 are for tests
Kind = Literal["residual", "separable"]
_BATCH, _EPOCHS = 64, {"residual": 10, "separable": 25}


class Digits(NamedTuple):
    """Images [n, 1, 8, 8] in 0..1 with their labels [n]."""

    training_images: Tensor
    training_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def shuffled(seed: int = 0) -> tuple[Tensor, Tensor]:
    """All images, float32 [1797, 1, 8, 8] in 0..1, and labels [1797], in an order drawn by seed.

    ImportError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        needs = "the digits need the package scikit-learn"
        raise ImportError(f'{needs}: pip install "adaround_ext[demo]"') from error
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = torch.from_numpy(digits.images).float().unsqueeze(1)[order] / 16
    return images, torch.from_numpy(digits.target).long()[order]


def load(seed: int = 0) -> Digits:
    """1300 images for training and 497 for tests, as ``seed`` splits them."""
    images, labels = shuffled(seed)
    training, test = slice(TRAINING_IMAGES), slice(TRAINING_IMAGES, None)
    return Digits(images[training], labels[training], images[test], labels[test])


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity, or a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)) + self.downsample(x))
        return y


class ResidualNet(nn.Module):
    """Images [n, 1, 8, 8] to logits [n, 10] by three residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.relu = nn.ReLU()
        self.blocks = nn.Sequential(BasicBlock(32, 32), BasicBlock(32, 64, 2), BasicBlock(64, 64))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


class SeparableBlock(nn.Sequential):
    """A depthwise 3x3 and a pointwise convolution, each with BatchNorm and ReLU6."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU6()
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU6()


class SeparableNet(nn.Module):
    """Images [n, 1, 8, 8] to logits [n, 10] by four depthwise-separable blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.relu = nn.ReLU6()
        self.blocks = nn.Sequential(
            SeparableBlock(32, 64),
            SeparableBlock(64, 64),
            SeparableBlock(64, 128, 2),
            SeparableBlock(128, 128),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.bn(self.conv(x))))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


def trained(kind: Kind, seed: int = 0, epochs: int | None = None) -> nn.Module:
    """A network trained on the training images of ``load()``, in eval mode.

    ``seed`` draws its weights and the order and shifts of the images, never the split. The same
    seed and number of threads give the same network. ValueError for another kind.
    """
    if kind not in ("residual", "separable"):
        raise ValueError(f"kind must be 'residual' or 'separable', got {kind!r}")
    data = load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = ResidualNet() if kind == "residual" else SeparableNet()
    train(
        model,
        data.training_images,
        data.training_labels,
        epochs=_EPOCHS[kind] if epochs is None else epochs,
        seed=seed,
        shift=1,
    )
    return model.eval()


def train(
    model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, seed: int = 0, shift: int = 0
) -> list[float]:
    """Trains with Adam and a cosine schedule; returns each epoch's mean loss.

    Each image is moved by up to ``shift`` pixels both ways, newly drawn in each epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(model.parameters(), 2e-3)
    steps = len(images) // _BATCH
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, epochs * steps)
    losses = []
    model.train()
    for _ in range(epochs):
        total = torch.zeros((), device=images.device)
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for chosen in order[: steps * _BATCH].split(_BATCH):
            x = images[chosen]
            if shift:
                x = _shifted(x, shift, generator)
            adam.zero_grad()
            loss = F.cross_entropy(model(x), labels[chosen])
            loss.backward()
            adam.step()
            decay.step()
            total += loss.detach()
        losses.append(float(total) / steps)
    return losses


def _shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Each of [n, 1, h, w] moved by up to ``most`` pixels both ways, zeros where it was."""
    count, _, height, width = images.shape
    start = torch.randint(2 * most + 1, (2, count, 1), generator=generator).to(images.device)
    rows = start[0] + torch.arange(height, device=images.device)
    columns = start[1] + torch.arange(width, device=images.device)
    which = torch.arange(count, device=images.device)[:, None, None]
    padded = F.pad(images, (most,) * 4)
    return padded[which, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images that the model, in the mode it is in, gives their own label."""
    return float((model(images).argmax(1) == labels).double().mean())
