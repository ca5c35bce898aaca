"""torchao export, for those who go on with torch.compile, torch.export or transformers.

tensors.py says what becomes of a weight, program.py and pretrained.py write the files.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from adaround_ext.checks import fail
from adaround_ext.export.manifest import new_export
from adaround_ext.export.quantized_layers import QuantizedLayer, quantized_layers, refuse
from adaround_ext.export.torchao.pretrained import is_as_built, save_pretrained
from adaround_ext.export.torchao.program import save_program
from adaround_ext.export.torchao.runner import KIND, PROGRAM, WEIGHTS
from adaround_ext.export.torchao.tensors import import_torchao, obstacle, torchao_tensor

Others = Literal["refuse", "float"]


def to_torchao(model: nn.Module, *, others: Others = "refuse") -> nn.Module:
    """A copy of a quantized model whose weights are torchao tensors; outputs are the same bits.

    Each weight becomes a ``torchao.quantization.IntxUnpackedToInt8Tensor``: scale (qdata -
    zero_point) with qdata and zero_point int8, in blocks of the weight's shape that share a scale.
    Layers that share a weight share the tensor. Activation quantizers run on in the copy.

    Args:
        model: A model that :func:`adaround_ext.quantize_` has quantized. It is not changed.
        others: What becomes of layers that torchao has no operators or blocks for (Conv1d, Conv3d,
            transposed convolutions, float64, groups that are no block of a kernel): "refuse" raises
            ValueError, with "float" they stay as they are simulated.

    Returns:
        The copy.

    Raises:
        ImportError: torchao is missing.
        TypeError: ``model`` is no module.
        ValueError: The model is not quantized, or changed since; for another ``others``, and as
            that says.
    """
    _check_others(others)
    import_torchao()
    return _converted(model, _held(quantized_layers(model), others))


def export_torchao(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    args: Any = None,
    others: Others = "refuse",
) -> None:
    """Writes a new directory with torchao tensors for weights, and a program where ``args``.

    A PreTrainedModel of transformers that holds just what its class builds becomes config.json and
    model.safetensors (pytorch_model.bin by transformers 4), for ``from_pretrained``; it is loaded
    and compared bit by bit before the directory gets its name. Any other, and one with tensors in a
    dtype that transformers would not load them in, model becomes weights.pt, a state dict for
    ``load_state_dict(torch.load(path, weights_only=True), assign=True)`` of a model of the same
    structure. Loading needs ``import torchao`` first.

    Args:
        model: A model that :func:`adaround_ext.quantize_` has quantized. It is not changed.
        folder: The directory to write, new or empty.
        args: A batch as the model takes it (a tensor, a tuple, or a mapping of keyword arguments),
            for model.pt2 by torch.export, in eval mode. Its batch size, and the length of token
            ids, may be others later where the model itself allows that and the batch has at least
            two of them.
        others: As in :func:`adaround_ext.export.torchao.to_torchao`.

    Raises:
        ImportError: torchao is missing.
        TypeError: ``model`` is no module, or ``args`` do not fit it.
        ValueError: As in :func:`adaround_ext.export.torchao.to_torchao`; for a directory that is
            not new; and where the program cannot be loaded and run again. torch.export raises
            errors of its own.
    """
    _check_others(others)
    import_torchao()
    layers = quantized_layers(model)
    held = _held(layers, others)
    converted = _converted(model, held).eval()
    with new_export(folder, KIND) as (directory, details):
        pretrained = (
            bool(held) and is_as_built(model) and save_pretrained(converted, held, directory, model)
        )
        if not pretrained:
            try:
                torch.save(converted.state_dict(), directory / WEIGHTS)
            except RuntimeError as error:  # so torch says that it cannot write
                raise OSError(str(error)) from error
        if args is not None:
            save_program(converted, args, directory / PROGRAM)
        details.update(
            pretrained=pretrained,
            program=args is not None,
            layers={layer.name: layer.grid | {"torchao": layer in held} for layer in layers},
        )


def _check_others(others: object) -> None:
    if others not in ("refuse", "float"):
        fail("others", "'refuse' or 'float'", others)


def _held(layers: Sequence[QuantizedLayer], others: Others) -> list[QuantizedLayer]:
    """Those that become torchao tensors."""
    if others == "refuse":
        refuse('torchao, but for others="float",', layers, obstacle)
    return [layer for layer in layers if obstacle(layer) is None]


def _converted(model: nn.Module, layers: Sequence[QuantizedLayer]) -> nn.Module:
    """A deep copy in which tensors are put in place of weights, which are never copied."""
    memo: dict[int, Any] = {}
    for layer in layers:
        tensor = nn.Parameter(torchao_tensor(layer), requires_grad=False)
        memo[id(layer.module.get_parameter("weight"))] = tensor
        for name in layer.names:
            codes = model.get_submodule(name).quantized_weight
            memo[id(codes)] = codes
    converted = copy.deepcopy(model, memo)
    for name in (name for layer in layers for name in layer.names):
        converted.get_submodule(name).__dict__.pop("quantized_weight", None)
    return converted
