"""Mapped weights: models larger than memory, whose weights stay in files.

The system brings in the pages that are touched and may drop them again at any time. So a walk
through a model block by block needs memory for the block at hand only.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from adaround_ext.checks import check_module, some
from adaround_ext.files import path_from


def map_weights_(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Gives the tensors that a model has on the meta device their values in safetensors files.

    The files are mapped: they must not change as long as the model lives; writing to a parameter
    leaves them.

    Args:
        model: made without data, its parameters on the meta device; what it has elsewhere stays.
        folder: with the files, as ``model-00001-of-00003.safetensors``; their tensors have the
            names of the model's. A parameter that several modules share needs one of its names.

    Returns:
        The names that were given values.

    Raises:
        ValueError: before anything is changed, for names that are not in the files and for another
            shape or dtype.
        FileNotFoundError: without files.
    """
    check_module(model)
    paths = sorted(path_from(folder).glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"folder must hold safetensors files, got none in {folder}")
    stored = _stored(paths)
    values: list[tuple[Tensor, list[str]]] = []
    missing = []
    for names, tensor in _meta_tensors(model):
        name = next((name for name in names if name in stored), None)
        if name is None:
            missing.append(names[0])
            continue
        value = stored[name]
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise ValueError(
                f"{name} must have shape {list(tensor.shape)} and {tensor.dtype} as in the model, "
                f"got {list(value.shape)} and {value.dtype} in {folder}"
            )
        values.append((value, names))
    if missing:
        raise ValueError(
            f"all tensors on the meta device must be in {folder}, got none for {some(missing)}: "
            "computed buffers need another device (accelerate.init_empty_weights leaves them there)"
        )
    for value, names in values:
        _put(model, names, value)
    return sorted(name for _, names in values for name in names)


def _stored(paths: list[Path]) -> dict[str, Tensor]:
    """All tensors of the files, by name, mapped."""
    stored: dict[str, Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"folder must hold safetensors files, got {path}: {error}") from error
        twice = sorted(stored.keys() & tensors.keys())
        if twice:
            raise ValueError(f"folder must hold every name once, got {some(twice)} twice")
        stored |= tensors
    return stored


def _meta_tensors(model: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Parameters and buffers on the meta device, each with all its names."""
    by_id: dict[int, tuple[list[str], Tensor]] = {}
    parameters = model.named_parameters(remove_duplicate=False)
    for name, tensor in (*parameters, *model.named_buffers(remove_duplicate=False)):
        if tensor.is_meta:
            by_id.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(by_id.values())


def _put(model: nn.Module, names: list[str], value: Tensor) -> None:
    """One tensor under all of its names."""
    replacement: Tensor | None = None
    for name in names:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        before = getattr(module, attribute)
        if replacement is None:
            is_parameter = isinstance(before, nn.Parameter)
            replacement = nn.Parameter(value, before.requires_grad) if is_parameter else value
        setattr(module, attribute, replacement)


class Offload:
    """Keeps tensors in mapped files in a folder.

    The files have no name there once they are mapped: their space is free again when the last
    tensor is gone.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = path_from(folder)
        if not self._folder.is_dir():
            raise ValueError(f"offload_dir must be an existing folder, got {folder}")

    def keep(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, from a file."""
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix="adaround_ext_") as file:
            plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
            safetensors.torch.save_file(plain, file.name)
            with safe_open(file.name, framework="pt") as mapped:
                return {name: mapped.get_tensor(name) for name in plain}
