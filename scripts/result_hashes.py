"""Result hashes: do codes, scales and biases stay what they were, bit for bit?

    python -m scripts.result_hashes --write FILE     records them
    python -m scripts.result_hashes --compare FILE   runs again and names what differs

Ten small runs of optimize_layer and quantize_, each with one thread and with two. Where
EMULATION_ORDER is set (tests/emulation), the CUDA kernels, run on the processor, do the work: they
round at other places and have hashes of their own; it takes four minutes. What lies between layers
is torch's work, and depends on its threads where they are convolutions: hashes are compared on one
machine with one torch, before and after a change of the code that shall change no result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, LayerResult, optimize_layer, quantize_
from tests.emulation import EMULATED
from tests.emulation.library import load
from tests.support.models import ResidualNet, Transformer, UNet, tokens

Parts = Iterable[tuple[str, Tensor | None]]


def _digest(parts: Parts) -> str:
    digest = hashlib.sha256()
    for name, tensor in parts:
        digest.update(f"{name} {None if tensor is None else (tensor.dtype, tensor.shape)}".encode())
        if tensor is not None:
            flat = tensor.detach().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def _of_result(result: LayerResult) -> Parts:
    return [(name, getattr(result, name)) for name in ("codes", "scale", "zero_point", "bias")]


def _of_model(model: nn.Module) -> Parts:
    """Weights on their grids, with all biases, and the scales beside them."""
    yield from sorted(model.state_dict().items())
    for name, module in sorted(model.named_modules()):
        weight = getattr(module, "quantized_weight", None)
        if weight is not None:
            yield f"{name} codes", weight.codes
            yield f"{name} scale", weight.scale


def _layer(layer: nn.Module, *shape: int, **settings: Any) -> str:
    return _digest(_of_result(optimize_layer(layer, torch.randn(shape), **settings)))


def _model(model: nn.Module, batches: Iterable[Any], **settings: Any) -> str:
    quantize_(model, batches, progress=False, **settings)
    return _digest(_of_model(model))


def _images(count: int = 4) -> list[Tensor]:
    return [torch.randn(4, 3, 8, 8) for _ in range(count)]


def _texts() -> list[Mapping[str, Tensor]]:
    lengths = torch.arange(12)
    masks = [(lengths < torch.randint(6, 13, (4, 1))).long() for _ in range(4)]
    return [{"ids": tokens(4, 12), "attention_mask": mask} for mask in masks]


def _normed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 5),
    )  # fmt: skip


CASES: dict[str, Callable[[], str]] = {
    "linear, gram, balanced": lambda: _layer(nn.Linear(48, 24), 256, 48),
    "linear, sampled, relu": lambda: _layer(
        nn.Linear(32, 16), 96, 32, objective="sampled", activation="relu", steps=150
    ),
    "linear, groups of 16, 3 bits, asymmetric, best": lambda: _layer(
        nn.Linear(64, 16, bias=False), 300, 64, bits=3, group_size=16, symmetric=False,
        preset="best",
    ),
    "linear, per tensor, float16, adaround from nearest": lambda: _layer(
        nn.Linear(40, 40), 200, 40, granularity="per_tensor", scale_dtype=torch.float16,
        starts=("nearest", "adaround"), steps=200, bias="create",
    ),
    "grouped convolution, 4 bits": lambda: _layer(
        nn.Conv2d(8, 12, 3, groups=2, padding=1), 12, 8, 9, 9, positions=20
    ),
    "transposed convolution, grouped, sampled": lambda: _layer(
        nn.ConvTranspose1d(6, 8, 4, stride=2, groups=2), 40, 6, 10,
        objective="sampled", steps=120, scale="mse",
    ),
    "residual network, sequential": lambda: _model(ResidualNet(), _images(), bits=3),
    "transformer, parallel, masks": lambda: _model(
        Transformer(), _texts(), mode="parallel", preset="fast", bits=2
    ),
    "batch norms, equalized, activations": lambda: _model(
        _normed(), _images(), equalize=True, activations=ActivationConfig(),
        activation_aware=True, steps=100, granularity="per_tensor",
    ),
    "UNet, sequential, groups, overrides": lambda: _model(
        UNet(), _images(), preset="fast", group_size=3,
        overrides={"<last>": {"bits": 8, "group_size": 6}, "middle": "skip"},
    ),
}  # fmt: skip


def hashes() -> dict[str, str]:
    results = {}
    for threads in (1,) if EMULATED else (1, 2):
        torch.set_num_threads(threads)
        for name, case in CASES.items():
            torch.manual_seed(0)
            results[f"{name}; {threads} threads"] = case()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FILE")
    action.add_argument("--compare", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if EMULATED:
        load()
    results = hashes()
    if arguments.write:
        arguments.write.write_text(json.dumps(results, indent=1) + "\n")
        return 0
    before = json.loads(arguments.compare.read_text())
    wrong = [name for name in {**before, **results} if before.get(name) != results.get(name)]
    print("\n".join(f"differs: {name}" for name in wrong) or f"{len(results)} runs, all equal")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
