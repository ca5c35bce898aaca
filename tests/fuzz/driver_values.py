"""Settings and calibration data of every kind, by names that JSON can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from adaround_ext import ActivationConfig, AdaRoundConfig


class Planted(Exception):
    """What a model, a loader or a callable of the caller raises: it must arrive as it is."""


NAN, INF = float("nan"), float("inf")
# What is wrong, or at least odd, for almost every setting.
ODD: list[Any] = [None, -1, 0, 1, 2.5, "text", True, [], NAN, INF, 2**63, "tensor:good"]
SETTINGS: dict[str, list[Any]] = {
    "preset": ["fast", "balanced", "best"],
    "bits": [2, 3, 4, 8],
    "symmetric": [False],
    "narrow_range": [True],
    "granularity": ["per_tensor", "per_channel", "per_group"],
    "group_size": [1, 2, 3],
    "scale": ["mse", "min_max", "tensor:good", "tensor:vector", "tensor:huge"],
    "scale_candidates": [2, 5],
    "scale_dtype": ["torch.float16", "torch.bfloat16"],
    "bias": ["keep", "create"],
    "objective": ["sampled", "gram"],
    "activation": ["relu", "relu6", "gelu", "silu", "call:tanh", "call:writes", "call:nan"],
    "positions": [1, 3, 10**9],
    "damping": [0.0, 0.01, 0.3, 1e30, 1e-30],
    "starts": [["nearest"], ["gptq", "adaround"], ["adaround"]],
    "refine": [False],
    "search_steps": [0, 30],
    "rounds": [0, 1, 2],
    "steps": [0, 1, 4],
    "batch_size": [1, 3, 100],
    "learning_rate": [1e-3, 1.0, 1e30, 1e-45],
    "reg_weight": [0.0, 1.0, 1e30, 1e-45],
    "beta": [[20.0, 2.0], [2.0, 20.0], [1.0, 1.0], [1e30, 2.0]],
    "warmup": [0.0, 0.2, 1.0],
    "scale_free": [False],
    "products": ["float32", "bfloat16"],
    "seed": [7, 2**63 - 1],
    "progress": [True],
    "config": ["config:good", None],
}
MODEL_SETTINGS: dict[str, list[Any]] = {
    "mode": ["parallel"],
    "overrides": [{"*": {"bits": 3}}, {"<first>": "skip"}, {"<last>": {"bits": 8}}],
    "filter_fn": ["filter:all", "filter:text"],
    "forward_fn": ["forward:plain", "forward:twice"],
    "blocks": [[], ["*"], ["0"]],
    "batch_norm": ["keep"],
    "equalize": [True],
    "activations": ["activations:min_max", "activations:mse", "activations:2"],
    "activation_aware": [True],
    "padding_mask": [None, "x", "mask:text"],
    "device": ["cpu"],
    "memory_budget": [0, 1000, 2**70],
    "device_budget": [None, 0, 2**70],
    "cache_dtype": ["torch.bfloat16", "torch.float16"],
}
BAD_SETTINGS: dict[str, list[Any]] = {
    "preset": ["slow"],
    "bits": [1, 9],
    "granularity": ["per_row"],
    "group_size": [4, 10**9],
    "scale": ["tensor:nan", "tensor:tiny", "tensor:negative", "tensor:integers", "tensor:empty",
              "tensor:meta"],
    "scale_dtype": ["torch.float64"],
    "objective": ["mse"],
    "activation": ["tanh", "call:raises", "call:reshapes", "call:none"],
    "starts": [["nearest", "nearest"], ["best"]],
    "search_steps": [2**23 + 1],
    "beta": [[0.5, 2.0], [20.0]],
    "warmup": [2.0],
    "unknown": [1],
    "config": ["config:dict"],
}  # fmt: skip
BAD_MODEL_SETTINGS: dict[str, list[Any]] = {
    "mode": ["both"],
    "overrides": [{"0": "drop"}, {"nowhere": "skip"}, {"*": {"bits": 1}}, {"*": {"bit": 4}},
                  {"*": "skip"}, ["0"]],
    "filter_fn": ["filter:none", "filter:raises"],
    "forward_fn": ["forward:raises", "forward:nothing"],
    "blocks": [["nowhere"], [None]],
    "batch_norm": ["drop"],
    "padding_mask": ["mask:raises"],
    "cache_dtype": ["torch.int8"],
    "device": ["meta", "cuda:99", "nowhere"],
    "cache_dir": ["/nowhere/at/all"],
    "checkpoint_dir": ["/proc/nowhere"],
}  # fmt: skip
KINDS = ["tensor", "list", "generator", "loader", "tuple", "twice", "expanded", "strided"]
BAD_KINDS = ["none", "number", "text", "dict", "numbers", "empty-list", "empty", "integers",
             "bools", "complex", "meta", "sparse", "numpy", "other-features", "scalar", "raises",
             "nested", "double", "half", "object", "mixed-shapes", "no-rows", "gets-grad",
             ]  # fmt: skip
VALUES = ["normal", "zeros", "constant", "denormal", "small", "large", "extreme", "outlier"]
BAD_VALUES = ["nan", "inf", "-inf", "one-nan"]


def decode(value: Any, rows: int) -> Any:
    """What a setting's name stands for. rows: of the layer, for scales that fit."""
    if not isinstance(value, str) or (":" not in value and not value.startswith("torch.")):
        return value
    if value.startswith("torch."):
        return getattr(torch, value[6:])
    kind, _, what = value.partition(":")
    if kind == "tensor":
        return _SCALES[what](rows)
    if value in CALLABLES:
        return CALLABLES[value]
    if kind == "config":
        return {"bits": 4} if what == "dict" else AdaRoundConfig(preset="fast", steps=2)
    if kind == "activations":
        return ActivationConfig(bits=2) if what == "2" else ActivationConfig(ranges=what)  # type: ignore[arg-type]
    return value


_SCALES: dict[str, Callable[[int], Tensor]] = {
    "good": lambda rows: torch.full((rows, 1), 0.1),
    "vector": lambda rows: torch.full((rows,), 0.1),
    "nan": lambda rows: torch.full((rows, 1), NAN),
    "tiny": lambda rows: torch.full((rows, 1), 1e-42),
    "huge": lambda rows: torch.full((rows, 1), 3e38),
    "negative": lambda rows: torch.full((rows, 1), -0.1),
    "integers": lambda rows: torch.ones(rows, 1, dtype=torch.int64),
    "empty": lambda rows: torch.empty(0),
    "meta": lambda rows: torch.empty(rows, 1, device="meta"),
}


def _raises(*args: Any, **kwargs: Any) -> Any:
    raise Planted("as the caller planned it")


def _writes(y: Tensor) -> Tensor:
    return y.relu_()


CALLABLES: dict[str, Callable[..., Any]] = {
    "call:tanh": torch.tanh,
    "call:raises": _raises,
    "call:nan": lambda y: y * NAN,
    "call:reshapes": lambda y: y.flatten()[:1],
    "call:writes": _writes,
    "call:none": lambda y: None,
    "filter:all": lambda module, name: True,
    "filter:none": lambda module, name: False,
    "filter:raises": _raises,
    "filter:text": lambda module, name: "yes",
    "forward:plain": lambda model, batch: model(batch),
    "forward:raises": _raises,
    "forward:nothing": lambda model, batch: None,
    "forward:twice": lambda model, batch: model(model.eval() and batch) is model(batch),
    "mask:raises": _raises,
    "mask:text": lambda batch: "text",
}


def values(x: Tensor, kind: str) -> Tensor:
    """A batch of normal numbers, made into others."""
    if not x.is_floating_point():
        return x
    most = torch.finfo(x.dtype).max
    fills = {"zeros": 0.0, "constant": 2.0, "nan": NAN, "inf": INF, "-inf": -INF}
    factors = {"denormal": 1e-42, "small": 1e-20, "large": 1e15, "extreme": most / 8}
    if kind in fills:
        return torch.full_like(x, fills[kind])
    if kind in factors:
        return x.clamp(-4, 4) * factors[kind]
    if kind in ("outlier", "one-nan") and x.numel():
        x = x.clone()
        x.view(-1)[0] = 1e6 if kind == "outlier" and most > 1e6 else NAN if "nan" in kind else most
    return x


def data(x: Tensor, kind: str) -> Any:
    """Batches, as a caller may hand them in, of one good batch."""
    odd: dict[str, Callable[[], Any]] = {
        "tensor": lambda: x,
        "list": lambda: [x, x + 1 if x.is_floating_point() else x],
        "generator": lambda: _generator(x, None),
        "raises": lambda: _generator(x, 1),
        "loader": lambda: _loader(x),
        "tuple": lambda: (x, x),
        "twice": lambda: [x, x],
        "expanded": lambda: [x[:1].expand(x.shape)],
        "strided": lambda: [x.mT.contiguous().mT if x.dim() > 1 else x],
        "none": lambda: None,
        "number": lambda: 3,
        "text": lambda: "text",
        "dict": lambda: {"x": x},
        "numbers": lambda: [1.0, 2.0],
        "empty-list": lambda: [],
        "empty": lambda: x[:0],
        "no-rows": lambda: [x, x[:0]],
        "integers": lambda: x.long(),
        "bools": lambda: [x > 0],
        "complex": lambda: [x.to(torch.complex64)],
        "meta": lambda: [x.to("meta")],
        "sparse": lambda: [x.to_sparse()],
        "numpy": lambda: [np.asarray(x.tolist())],
        "other-features": lambda: [torch.cat([x, x], 1)] if x.dim() > 1 else [x],
        "scalar": lambda: x.flatten()[0] if x.numel() else x.new_zeros(()),
        "nested": lambda: [[[x]]],
        "double": lambda: [x.double()],
        "half": lambda: [x.half()],
        "object": object,
        "mixed-shapes": lambda: [x, x[:1], x.unsqueeze(0)],
        "gets-grad": lambda: [x.detach().requires_grad_(x.is_floating_point())],
    }
    return odd[kind]()


def _loader(x: Tensor) -> DataLoader[Any]:
    """With a generator of its own: a loader without one draws from torch's."""
    return DataLoader(TensorDataset(x), batch_size=4, generator=torch.Generator())


def _generator(x: Tensor, fails_at: int | None) -> Iterator[Tensor]:
    for index in range(3):
        if index == fails_at:
            raise Planted("disk on fire")
        yield x
