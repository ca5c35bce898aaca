"""A network trained on handwritten digits, to 3 bits in one call: python -m examples.one_model."""

import torch
from sklearn.datasets import load_digits
from torch import nn

from adaround_ext import quantize_


def main() -> None:
    torch.manual_seed(0)
    pixels, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = pixels.float().view(-1, 1, 8, 8) / 16
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):  # on 1,300 images; the other 497 are for the test
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[:1300]), labels[:1300]).backward()
        optimizer.step()
    model.eval()

    def accuracy() -> float:
        return 100 * float((model(images[1300:]).argmax(1) == labels[1300:]).float().mean())

    before = accuracy()
    print(quantize_(model, images[:1300].split(100), bits=3, progress=False))
    print(f"test accuracy: {before:.1f} % in float32, {accuracy():.1f} % at 3 bits")


if __name__ == "__main__":
    main()
