"""Every public call on something small, for tests of what calls leave behind."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaround_ext import (
    ActivationConfig,
    LayerResult,
    export_model,
    load_quantized,
    optimize_layer,
    pack_,
    quantize_,
    save_quantized,
    sensitivity,
    verify,
)
from adaround_ext.cli.main import main
from tests.support.export_models import quantized

FEW: dict[str, Any] = {"steps": 20, "search_steps": 20, "scale_candidates": 2, "bits": 3}
FAST: dict[str, Any] = {"preset": "fast", "bits": 3, "progress": False}


@dataclass(frozen=True)
class Call:
    """model: what it is given, or None. written: whether it is there to write to the model. run:
    the call, which returns all that it computes."""

    model: nn.Module | None
    written: bool
    run: Callable[[], object]


def net() -> nn.Sequential:
    """Layers of several kinds; with a bias to learn, and gradients and hooks that are kept."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(24, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )
    with torch.no_grad():
        for tensor in (model[1].weight, model[1].running_var):
            tensor.uniform_(0.5, 2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.25)
    model[5].weight.requires_grad_(False)
    model[3].eval()
    model[2].register_forward_hook(_look)
    model[6].register_forward_pre_hook(_look)
    return model


def _look(module: nn.Module, args: object, output: object = None) -> None:
    """A hook of the caller."""


def images(count: int = 2) -> list[Tensor]:
    """Batches for :func:`net`."""
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(8, 2, 4, 4, generator=generator) for _ in range(count)]


def rows(count: int = 2, cols: int = 12) -> list[Tensor]:
    """Batches for a Linear."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(20, cols, generator=generator) for _ in range(count)]


def _layer(make: Callable[[], Any], inputs: Any, targets: Any = None, **settings: Any) -> Call:
    torch.manual_seed(8)
    layer = make()
    held = nn.ModuleList(layer if isinstance(layer, list) else [layer])
    return Call(held, False, lambda: optimize_layer(layer, inputs, targets, **FEW, **settings))


def _targets() -> list[Tensor]:
    return [torch.ones(20, 5) * x[:, :5] for x in rows()]


def linear() -> nn.Module:
    return nn.Linear(12, 5)


LAYERS: dict[str, Callable[[Path], Call]] = {
    "gram": lambda _: _layer(linear, rows()),
    "gram with targets": lambda _: _layer(linear, rows(), _targets(), bias="refit"),
    "fast": lambda _: _layer(linear, rows()[0], preset="fast"),
    "groups": lambda _: _layer(
        linear, rows(), granularity="per_group", group_size=4, symmetric=False, bias="create"
    ),
    "sampled": lambda _: _layer(linear, rows(), activation="relu", objective="sampled"),
    "bfloat16 products": lambda _: _layer(linear, rows(), products="bfloat16"),
    "several": lambda _: _layer(lambda: [linear(), linear()], rows()),
    "convolution": lambda _: _layer(lambda: nn.Conv2d(2, 4, 3, groups=2), images()),
    "half": lambda _: _layer(lambda: linear().half(), [x.half() for x in rows()]),
}


def _result(path: Path, run: Callable[[LayerResult, Path, nn.Module], object]) -> Call:
    torch.manual_seed(8)
    layer = linear()
    result = optimize_layer(layer, rows(), **FEW)
    path.mkdir(parents=True, exist_ok=True)
    result.save(path / "layer")
    return Call(layer, True, lambda: run(result, path, layer))


def _whole(call: Callable[[nn.Module, Any], object], written: bool = True) -> Call:
    model, data = net(), images()
    return Call(model, written, lambda: (call(model, data), model))


def _quantize(**settings: Any) -> Callable[[Path], Call]:
    return lambda _: _whole(lambda model, data: quantize_(model, data, **FAST, **settings))


def _kept(**settings: Any) -> Callable[[Path], Call]:
    def call(path: Path) -> Call:
        place = {"checkpoint_dir": str(path / "checkpoint"), "cache_dir": str(path)}
        path.mkdir(parents=True, exist_ok=True)
        return _quantize(**place, **settings)(path)

    return call


MODELS: dict[str, Callable[[Path], Call]] = {
    "sequential": _quantize(),
    "parallel": _quantize(mode="parallel", memory_budget=0),
    "everything": _quantize(activations=ActivationConfig(), equalize=True, batch_norm="fold"),
    "kept": _kept(batch_norm="keep", memory_budget=0),
    "activation aware": _quantize(activation_aware=True, steps=10, batch_size=4),
    "sensitivity": lambda _: _whole(
        lambda model, data: sensitivity(model, data, (2, 4), progress=False).network, False
    ),
}


def example(**settings: Any) -> tuple[nn.Module, Tensor]:
    """A quantized model that every format but that of Hugging Face models can hold, and inputs."""
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    settings = {"scale_dtype": torch.float16, "granularity": "per_group", "group_size": 32,
                "batch_norm": "keep", "bits": 4} | settings  # fmt: skip
    return quantized(model, torch.randn(16, 32), **settings).train(), torch.randn(4, 32)


def _export(kind: str) -> Callable[[Path], Call]:
    def call(path: Path) -> Call:
        model, x = example()

        def run() -> list[Tensor]:
            export_model(model, path / kind, kind, batch=x)
            files = sorted((path / kind).iterdir())
            return [torch.tensor([*file.read_bytes()], device="cpu") for file in files]

        return Call(model, False, run)

    return call


def _on_saved(written: bool, run: Callable[[nn.Module, Path, Tensor], object]) -> Any:
    def call(path: Path) -> Call:
        model, x = example()
        save_quantized(model, path / "saved")
        return Call(model, written, lambda: (run(model, path / "saved", x), model))

    return call


def _packed(path: Path) -> Call:
    model, x = example()
    pack_(model)
    return Call(model, False, lambda: model(x))


# Those that are quick, and those that trace models or load large packages.
EXPORTS: dict[str, Callable[[Path], Call]] = {
    "save": _export("safetensors"),
    "load": _on_saved(True, lambda model, folder, _: load_quantized(folder, model)),
    "load packed": _on_saved(
        True, lambda model, folder, x: load_quantized(folder, model, packed=True)(x)
    ),
    "pack": _on_saved(True, lambda model, _, x: (pack_(model), model(x))),
    "packed model": _packed,
    "verify": _on_saved(False, lambda model, folder, x: verify(model, folder, [x]).to_dict()),
    "gguf": _export("gguf"),
    "result": lambda path: _result(
        path,
        lambda result, path, layer: (
            result.save(path / "again"),
            LayerResult.load(path / "layer"),
            result.apply_(layer),
            layer,
        ),
    ),
}
SLOW_EXPORTS: dict[str, Callable[[Path], Call]] = {
    kind: _export(kind) for kind in ("onnx", "aimet", "torchao")
}


def command(*argv: object) -> tuple[int, str]:
    """Runs the command line here: its exit status, and all that it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
    return status, out.getvalue()


def computed(result: object) -> list[Tensor]:
    """All tensors and numbers of what a call returned, in order: models, results, reports."""
    found: list[Tensor] = []
    for leaf in pytree.tree_leaves(result):
        if isinstance(leaf, nn.Module):
            state = copy.copy(leaf.state_dict())
            found += [state[name] for name in sorted(state)]
            for module in leaf.modules():
                if hasattr(module, "quantized_weight"):
                    found.append(module.quantized_weight.codes)
        elif isinstance(leaf, LayerResult):
            found += [t for t in (leaf.codes, leaf.scale, leaf.zero_point, leaf.weight_q)]
            found += [] if leaf.bias is None else [leaf.bias]
            found.append(torch.tensor(list(leaf.report.losses.values()), dtype=torch.float64))
        elif isinstance(leaf, Tensor):
            found.append(leaf)
        elif isinstance(leaf, float):
            found.append(torch.tensor(leaf, dtype=torch.float64))
    return [t.detach().clone() for t in found]
