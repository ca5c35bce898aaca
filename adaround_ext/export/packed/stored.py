"""Stored models: what our own format says of a model, compared with a model at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext.activations.quantizer import ActivationQuantizer
from adaround_ext.layers.matrix import MatrixLayer, matrix_layer
from adaround_ext.tensors import add_tensor

KIND = "safetensors"
FILE = "adaround.safetensors"
QUANTIZER = ("scale", "zero_point", "qmin", "qmax")  # of an activation quantizer, in one tensor


@dataclass(frozen=True)
class StoredLayer:
    """A quantized layer.

    Attributes:
        names: Of all modules with this weight.
        kind: The class of the layer.
        shape: Of the weight, as the layer has it.
        dtype: Of the weight.
        bits: Of a code.
        symmetric: Whether codes are signed and zero points 0.
        granularity: What a scale belongs to.
        scales: The shape of the scales.
        scale_dtype: That they are stored in.
        biases: Names of the modules whose bias is stored.
    """

    names: tuple[str, ...]
    kind: str
    shape: tuple[int, ...]
    dtype: str
    bits: int
    symmetric: bool
    granularity: str
    scales: tuple[int, ...]
    scale_dtype: str
    biases: tuple[str, ...]


@dataclass(frozen=True)
class StoredSite:
    """A hook of an activation quantizer, as :class:`adaround_ext.activations.placement.Site`."""

    module: str
    kind: str
    tensors: tuple[int, ...]


@dataclass(frozen=True)
class StoredQuantizer:
    """An activation quantizer: its settings, and where it is called."""

    config: dict[str, Any]
    sites: tuple[StoredSite, ...]


@dataclass(frozen=True)
class StoredModel:
    """A quantized model.

    Attributes:
        model: Its class.
        complete: Whether all other parameters and buffers are stored too.
        fingerprint: Of what is not stored.
        identities: Modules that are nn.Identity, as batch norms that were folded.
        shared: Names of parameters and buffers that are one tensor.
        quantizers: Of activations, by name.
        layers: By name.
        versions: Of what wrote it.
        described: What is not stored, piece by piece, to name what differs; empty in exports of
            older versions.
    """

    model: str
    complete: bool
    fingerprint: str
    identities: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...]
    quantizers: dict[str, StoredQuantizer]
    layers: dict[str, StoredLayer]
    versions: dict[str, str]
    described: dict[str, str]

    def check_layers(self, model: nn.Module) -> dict[str, MatrixLayer]:
        """The model's layers, by the names stored; ValueError where one does not fit."""
        modules = dict(model.named_modules(remove_duplicate=False))
        matrices: dict[str, MatrixLayer] = {}
        for name, layer in self.layers.items():
            for each in layer.names:
                if each not in modules:
                    raise ValueError(f"model must have the layer {each!r}, got none")
                try:
                    matrix = matrix_layer(modules[each])
                except TypeError as error:
                    raise ValueError(f"model must have a layer {each!r}: {error}") from error
                came = (type(modules[each]).__name__, tuple(matrix.weight.shape))
                if came != (layer.kind, layer.shape) or str(matrix.weight.dtype) != layer.dtype:
                    rule = f"{layer.kind} of shape {list(layer.shape)} in {layer.dtype}"
                    got = f"{came[0]} of shape {list(came[1])} in {matrix.weight.dtype}"
                    raise ValueError(f"model must have at {each!r} a {rule}, got a {got}")
                if matrix.bias is not None and each not in layer.biases:
                    raise ValueError(f"model must have no bias at {each!r}, as when it was saved")
                matrices.setdefault(name, matrix)
            if name not in layer.names:
                raise ValueError(f"model must have the layer {name!r}, got {list(layer.names)}")
        if self.shared != (shared := self.shared_by(model)):
            differs = set(self.shared) ^ set(shared)
            names = ", ".join(sorted(differs)[0]) if differs else "others"
            raise ValueError(f"model must share the same parameters as when saved, got {names}")
        return matrices

    @cached_property
    def _changed(self) -> frozenset[str]:
        return frozenset(name for layer in self.layers.values() for name in layer.names)

    def is_changed(self, key: str) -> bool:
        """Whether a parameter or buffer belongs to what quantization changed."""
        module, _, name = key.rpartition(".")
        if module in self._changed and name in ("weight", "bias"):
            return True
        return module in self.identities or module in self.quantizers

    def others(self, model: nn.Module) -> dict[str, Tensor]:
        """The state of a model that quantization did not change; what has several names once."""
        seen: set[int] = set()
        others = {}
        for key, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"model must have tensors alone as its state, got {key}")
            if not self.is_changed(key) and id(tensor) not in seen:
                seen.add(id(tensor))
                others[key] = tensor.detach()
        return others

    def shared_by(self, model: nn.Module) -> tuple[tuple[str, ...], ...]:
        """The names of each parameter or buffer that has several; not of what may be replaced."""
        names: dict[int, list[str]] = {}
        for name, tensor in _named_tensors(model):
            if name.rpartition(".")[0] not in (*self.identities, *self.quantizers):
                names.setdefault(id(tensor), []).append(name)
        return tuple(sorted(tuple(group) for group in names.values() if len(group) > 1))

    def fingerprint_of(self, model: nn.Module) -> str:
        """Of the modules' classes, and of all parameters and buffers that are not stored."""
        stored = set(model.state_dict(keep_vars=True)) if self.complete else set()
        digest = hashlib.blake2b(digest_size=16)
        for name, module in model.named_modules(remove_duplicate=False):
            if name not in self.identities and not isinstance(module, ActivationQuantizer):
                digest.update(f"{name}: {type(module).__qualname__};".encode())
        for key, tensor in _named_tensors(model):
            if key not in stored and not self.is_changed(key):
                digest.update(f"{key}=".encode())
                add_tensor(digest, tensor)
        return digest.hexdigest()

    def description_of(self, model: nn.Module) -> dict[str, str]:
        """What the fingerprint is of: a class by each module's name, and what tells tensors apart.

        Those by their names, with dtype, shape and a hash.
        """
        stored = set(model.state_dict(keep_vars=True)) if self.complete else set()
        description = {
            f"module {name}": type(module).__qualname__
            for name, module in model.named_modules(remove_duplicate=False)
            if name not in self.identities and not isinstance(module, ActivationQuantizer)
        }
        for key, tensor in _named_tensors(model):
            if key not in stored and not self.is_changed(key):
                digest = hashlib.blake2b(digest_size=8)
                add_tensor(digest, tensor)
                kind = f"{tensor.dtype} of shape {list(tensor.shape)}"
                description[key] = f"{kind} with the hash {digest.hexdigest()}"
        return description

    def check_rest(self, model: nn.Module) -> None:
        """ValueError naming what is not stored and differs from what it was when it was saved."""
        if self.fingerprint == self.fingerprint_of(model):
            return
        rest = "structure and constants" if self.complete else "structure and other parameters"
        rule = f"model must have the {rest} of the {self.model} saved"
        now = self.description_of(model)
        differ = [k for k in (*self.described, *now) if self.described.get(k) != now.get(k)]
        if not self.described or not differ:
            raise ValueError(f"{rule}, got others")
        key, more = differ[0], len(set(differ)) - 1
        was, came = (each.get(key, "none") for each in (self.described, now))
        others = f"; {more} more differ" if more else ""
        raise ValueError(f"{rule}: {key} must be {was}, got {came}{others}")


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers under all of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def check_switch(name: str, value: object) -> None:
    """TypeError for an argument that is neither True nor False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def narrowest(scale: Tensor) -> Tensor:
    """float32 scales in the shortest dtype that has them exactly."""
    for dtype in (torch.bfloat16, torch.float16):
        short = scale.to(dtype)
        if torch.equal(short.float(), scale):
            return short
    return scale
