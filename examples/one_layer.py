"""One layer to 4 bits in one call, in a second: python -m examples.one_layer."""

import torch

from adaround_ext import optimize_layer


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, 384)  # any trained Linear, Conv or ConvTranspose
    mixing = torch.randn(96, 96)  # inputs that vary together, as those of a network's layers do
    calibration, others = (torch.randn(count, 96) @ mixing for count in (2048, 512))

    result = optimize_layer(layer, calibration, bits=4)
    print(result.report)  # the error on the calibration data, beside that of rounding to nearest

    expected = layer(others)
    result.apply_(layer)  # weight and bias; until here the layer is untouched
    error = (layer(others) - expected).square().sum() / expected.square().sum()
    print(f"relative output error on other inputs: {error:.2e}")


if __name__ == "__main__":
    main()
