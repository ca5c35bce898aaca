"""Packed import: what our own format stores, put into a model after all of it was checked."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from adaround_ext.activations.hooks import attach, attached_sites, detach, quantizers
from adaround_ext.activations.placement import KINDS, Place, Site
from adaround_ext.activations.quantizer import ActivationConfig
from adaround_ext.checks import check_module, refuse_inference, some
from adaround_ext.export.manifest import path_of, read_manifest
from adaround_ext.export.packed.modules import pack_
from adaround_ext.export.packed.stored import (
    FILE,
    KIND,
    QUANTIZER,
    StoredLayer,
    StoredModel,
    check_switch,
)
from adaround_ext.files import read_value
from adaround_ext.grid import quant_range
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.ops import unpack_bits
from adaround_ext.result import QuantizedWeight, write_
from adaround_ext.transforms.verified import Journal

_SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@torch.inference_mode(False)  # what is made must be there for training and state dicts later
def load_quantized(
    folder: str | os.PathLike[str], model: nn.Module, *, packed: bool = False
) -> nn.Module:
    """Puts what :func:`adaround_ext.save_quantized` wrote into a model of the same class.

    The model then has the very bits that were saved, codes included: folded batch norms are
    replaced, new biases made, activation quantizers attached. Everything is checked before anything
    is changed.

    Args:
        folder: A directory that :func:`adaround_ext.save_quantized` wrote.
        model: A model of the class that was saved. It is changed.
        packed: Whether its quantized layers become :class:`adaround_ext.export.QuantLinear` and
            :class:`adaround_ext.export.QuantConv`, which hold packed codes.

    Returns:
        ``model`` itself.

    Raises:
        TypeError: ``model`` is no module, or ``packed`` no bool.
        FileNotFoundError: There is no such directory.
        ValueError: The directory is damaged, cut, foreign or of another model.
    """
    check_module(model)
    check_switch("packed", packed)
    manifest = read_manifest(folder, KIND)
    rule = f"{folder} must be a directory that save_quantized wrote"
    try:
        details = {"described": {}, **manifest.details}  # older versions did not write that
        stored: StoredModel = read_value(StoredModel, details, "details")
        with safe_open(path_of(folder) / FILE, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (ValueError, SafetensorError, OSError) as error:
        raise ValueError(f"{rule}: {error}") from error
    _restore_(stored, tensors, model, rule)
    if packed:
        pack_(model)
    return model


def _restore_(
    stored: StoredModel, tensors: Mapping[str, Tensor], model: nn.Module, rule: str
) -> None:
    """Gives ``model`` the stored weights, biases, quantizers and state.

    Raises ValueError, starting with ``rule`` where the files are at fault, before anything of the
    model is changed.
    """
    refuse_inference(model.named_parameters())
    matrices = stored.check_layers(model)
    _check_identities(stored, model)
    _check_tensors(stored, matrices, tensors, model, rule)
    places = _places(stored, tensors, model, rule)
    stored.check_rest(model)
    weights = {
        name: _weight(stored.layers[name], tensors, name, matrix, rule)
        for name, matrix in matrices.items()
    }
    journal = Journal()
    _put_identities(stored, model, journal)
    try:
        _attach(places, model, rule)
    except ValueError:
        journal.undo()
        raise
    _write(stored, tensors, model, matrices, weights)


def _check_identities(stored: StoredModel, model: nn.Module) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in stored.identities:
        module = modules.get(name)
        if type(module) is not nn.Identity and not isinstance(module, _BatchNorm):
            rule = f"model must have an nn.Identity or a batch norm at {name!r}"
            raise ValueError(f"{rule}, got {type(module).__name__}")


def _check_tensors(
    stored: StoredModel,
    matrices: Mapping[str, MatrixLayer],
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    rule: str,
) -> None:
    """That the file has all tensors and no other ones, of the right dtypes and shapes."""
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, matrix in matrices.items():
        expected |= _tensors_of(stored.layers[name], matrix, name, rule)
    for name in stored.quantizers:
        expected[f"quantizer/{name}"] = torch.float64, (len(QUANTIZER),)
    if stored.complete:
        for key, tensor in stored.others(model).items():
            expected[f"state/{key}"] = tensor.dtype, tuple(tensor.shape)
    got = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    for key in sorted(expected.keys() | got.keys()):
        if expected.get(key) != got.get(key):
            needed, came = (
                "absent" if each is None else f"{list(each[1])} in {each[0]}"
                for each in (expected.get(key), got.get(key))
            )
            raise ValueError(f"{rule} of this model: {key} must be {needed}, got {came}")


def _tensors_of(
    layer: StoredLayer, matrix: MatrixLayer, name: str, rule: str
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtypes and shapes of a layer's tensors."""
    known = 2 <= layer.bits <= 8 and layer.scale_dtype in _SCALE_DTYPES and len(layer.scales) == 2
    rows, groups = layer.scales if known else (0, 0)
    if rows not in (1, matrix.rows) or groups < 1 or matrix.cols % groups:
        raise ValueError(f"{rule}, got impossible settings of {name}")
    kinds: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        f"codes/{name}": (torch.uint8, (matrix.rows, -(-matrix.cols * layer.bits // 8))),
        f"scale/{name}": (_SCALE_DTYPES[layer.scale_dtype], (rows, groups)),
    }
    if not layer.symmetric:
        kinds[f"zero_point/{name}"] = torch.uint8, (rows, -(-groups * layer.bits // 8))
    for each in layer.biases:
        if each not in layer.names:
            raise ValueError(f"{rule}, got a bias of {each}")
        kinds[f"bias/{each}"] = matrix.weight.dtype, (matrix.rows,)
    return kinds


def _weight(
    layer: StoredLayer, tensors: Mapping[str, Tensor], name: str, matrix: MatrixLayer, rule: str
) -> QuantizedWeight:
    qmin, _ = quant_range(layer.bits, layer.symmetric)
    scale = tensors[f"scale/{name}"].float()
    bad = int((~((scale > 0) & scale.isfinite())).sum())
    if bad:
        raise ValueError(f"{rule}, got {bad} scales of {name} that are not positive and finite")
    zero_point = torch.zeros(scale.shape, dtype=torch.int32, device="cpu")
    if not layer.symmetric:
        packed = tensors[f"zero_point/{name}"]
        zero_point = unpack_bits(packed, layer.bits, scale.shape[1], qmin).int()
    codes = unpack_bits(tensors[f"codes/{name}"], layer.bits, matrix.cols, qmin)
    return QuantizedWeight(codes, scale, zero_point, layer.bits).to(matrix.weight.device)


def _places(
    stored: StoredModel, tensors: Mapping[str, Tensor], model: nn.Module, rule: str
) -> dict[str, tuple[Place, ActivationConfig]]:
    """Where activation quantizers go, by their names."""
    modules = dict(model.named_modules())
    places = {}
    for name, quantizer in stored.quantizers.items():
        try:
            config = ActivationConfig.from_dict(quantizer.config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{rule}: {name}: {error}") from error
        for site in quantizer.sites:
            known = site.module in modules and site.kind in KINDS and len(site.tensors) > 0
            if not known or min(site.tensors) < 0:
                raise ValueError(f"{rule} of this model, got the quantizer {name} at {site}")
        scale, zero_point, qmin, qmax = tensors[f"quantizer/{name}"].tolist()
        fits = (qmin, qmax) == quant_range(config.bits, config.symmetric) and quantizer.sites
        if not (fits and 0 < scale < float("inf") and qmin <= zero_point <= qmax):
            raise ValueError(f"{rule}, got an impossible range of {name}")
        sites = (Site(s.module, s.kind, s.tensors) for s in quantizer.sites)  # type: ignore[arg-type]
        places[name] = Place(tuple(sites), ()), config
    return places


def _attach(
    places: Mapping[str, tuple[Place, ActivationConfig]], model: nn.Module, rule: str
) -> None:
    sites = {name: place.sites for name, (place, _) in places.items()}
    attached = attached_sites(model)
    if attached:
        if attached != sites:
            rule = "model must have no activation quantizers, or those that were saved"
            others = [n for n in attached if attached[n] != sites.get(n)] or list(attached)
            raise ValueError(f"{rule}, got {some(others)}")
        return
    try:
        for place, config in places.values():
            attach([place], model, config)
        if attached_sites(model) != sites:
            raise ValueError(f"{rule} of this model, got other places of activation quantizers")
    except ValueError:
        detach(model)
        raise


def _put_identities(stored: StoredModel, model: nn.Module, journal: Journal) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in stored.identities:
        if type(modules[name]) is not nn.Identity:
            parent, _, child = name.rpartition(".")
            identity = nn.Identity().train(modules[name].training)
            journal.put(modules[parent]._modules, child, identity)  # type: ignore[arg-type]


@torch.no_grad()
def _write(
    stored: StoredModel,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    matrices: Mapping[str, MatrixLayer],
    weights: Mapping[str, QuantizedWeight],
) -> None:
    for name, matrix in matrices.items():
        layer = stored.layers[name]
        for each in layer.names:
            module = model.get_submodule(each)
            bias = tensors[f"bias/{each}"] if each in layer.biases else None
            write_(module, weights[name].dequantize(matrix), bias)
            module.quantized_weight = weights[name]  # type: ignore[assignment]
    for name, quantizer in quantizers(model).items():
        values = dict(zip(QUANTIZER, tensors[f"quantizer/{name}"], strict=True))
        quantizer.load_state_dict(values)
    for key, tensor in stored.others(model).items() if stored.complete else ():
        tensor.copy_(tensors[f"state/{key}"])
