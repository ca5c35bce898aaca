"""Weights as torchao tensors, for those who go on with torch.compile, torch.export or transformers.

Each quantized weight becomes a ``torchao.quantization.IntxUnpackedToInt8Tensor``: scale (qdata -
zero_point) with qdata and zero_point int8, in blocks of the weight's shape that share a scale.
Codes 0..2^b-1 and their zero points are stored less 2^(b-1). Source: torchao,
quantization/quantize_/workflows/intx.
"""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from adaround_ext.export.hugging_face import (
    check_alike,
    load_alike,
    no_progress_bars,
    skeleton,
)
from adaround_ext.export.manifest import new_export, read_manifest
from adaround_ext.export.quantized_layers import LEAVE_OUT, QuantizedLayer, quantized_layers, refuse
from adaround_ext.export.runner import Runner, module_runner, output_tensors
from adaround_ext.export.torch_export import NAMES_HINT, automatic_shapes, ordered, signature_of
from adaround_ext.tracing.arguments import arguments

if TYPE_CHECKING:
    from torchao.quantization import IntxUnpackedToInt8Tensor  # type: ignore[import-untyped]

KIND = "torchao"
WEIGHTS, PROGRAM = "weights.pt", "model.pt2"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Others = Literal["refuse", "float"]


def to_torchao(model: nn.Module, *, others: Others = "refuse") -> nn.Module:
    """A copy of a quantized model whose weights are torchao tensors; outputs are the same bits.

    Layers that share a weight share the tensor. Activation quantizers run on in the copy. others:
    what torchao has no operators or blocks for (Conv1d, Conv3d, transposed convolutions, float64,
    groups that are no block of a kernel) raises ValueError, or stays as simulated "float".

    Raises ImportError without torchao; TypeError and ValueError as
    :func:`adaround_ext.export.quantized_layers.quantized_layers`, and ValueError for another
    ``others``.
    """
    if others not in ("refuse", "float"):
        raise ValueError(f"others must be 'refuse' or 'float', got {others!r}")
    _import()
    return _converted(model, _held(quantized_layers(model), others))


def export_torchao(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    args: Any = None,
    others: Others = "refuse",
) -> None:
    """Writes a new directory with the weights of :func:`to_torchao`, and a program where ``args``.

    A PreTrainedModel of transformers that holds just what its class builds becomes config.json and
    model.safetensors (pytorch_model.bin by transformers 4), for ``from_pretrained``; it is loaded
    and compared bit by bit before the directory gets its name. Any other, and one with tensors in a
    dtype that transformers would not load them in, model becomes weights.pt, a state dict for
    ``load_state_dict(torch.load(path, weights_only=True), assign=True)`` of a model of the same
    structure. Loading needs ``import torchao`` first.

    args: a batch as the model takes it (a tensor, a tuple, or a mapping of keyword arguments), for
    model.pt2 by torch.export, in eval mode. Its batch size, and the length of token ids, may be
    others later where the model itself allows that and the batch has at least two of them.
    others: as in :func:`to_torchao`. Raises what that raises, what torch.export raises, and
    ValueError for a directory that is not new.
    """
    if others not in ("refuse", "float"):
        raise ValueError(f"others must be 'refuse' or 'float', got {others!r}")
    _import()
    layers = quantized_layers(model)
    held = _held(layers, others)
    converted = _converted(model, held).eval()
    with new_export(folder, KIND) as (part, details):
        pretrained = (
            bool(held) and _is_as_built(model) and _save_pretrained(converted, held, part, model)
        )
        if not pretrained:
            try:
                torch.save(converted.state_dict(), part / WEIGHTS)
            except RuntimeError as error:  # so torch says that it cannot write
                raise OSError(str(error)) from error
        if args is not None:
            _save_program(converted, args, part / PROGRAM)
        details.update(
            pretrained=pretrained,
            program=args is not None,
            layers={
                layer.name: {
                    "bits": layer.bits,
                    "granularity": layer.granularity,
                    "symmetric": layer.symmetric,
                    "torchao": layer in held,
                }
                for layer in layers
            },
        )


def runners(folder: Path, model: nn.Module) -> list[Runner]:
    """The weights in a model of the class, by transformers or load_state_dict, and the program."""
    details = read_manifest(folder, KIND).details
    _import()
    if details["pretrained"]:
        found = [module_runner("transformers", load_alike(folder, type(model)))]
    else:
        loaded = copy.deepcopy(model)
        state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
        loaded.load_state_dict(state, assign=True)
        found = [module_runner("load_state_dict", loaded)]
    if details["program"]:
        found.append(_program_runner(folder / PROGRAM))
    return found


def _import() -> None:
    try:
        import torchao.quantization  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        needs = "exporting to torchao needs the package torchao"
        raise ImportError(f'{needs}: pip install "adaround_ext[torchao]"') from error


def _held(layers: Sequence[QuantizedLayer], others: Others) -> list[QuantizedLayer]:
    """Those that become torchao tensors."""
    if others == "refuse":
        refuse('torchao, but for others="float",', layers, _obstacle)
    return [layer for layer in layers if _obstacle(layer) is None]


def _obstacle(layer: QuantizedLayer) -> str | None:
    if not isinstance(layer.module, (nn.Linear, nn.Conv2d)):
        kind = type(layer.module).__name__
        return f"its tensors work in Linear and Conv2d, got {kind}{LEAVE_OUT}"
    if layer.matrix.weight.dtype not in _DTYPES:
        got = f"got {layer.matrix.weight.dtype}; convert the model before it is quantized"
        return f"its tensors are float32, float16 or bfloat16, {got}"
    if _block_size(layer) is None:
        shape = list(layer.matrix.weight.shape)
        return f"groups must be blocks of the weight {shape}, got {layer.group_size} columns"
    return None


def _block_size(layer: QuantizedLayer) -> tuple[int, ...] | None:
    """The block of the weight's dimensions that shares a scale; None where that is no block."""
    rows, groups = layer.weight.scale.shape
    sizes = layer.matrix.weight.shape[1:]
    block: list[int] = []
    left = layer.cols // groups
    for size in reversed(sizes):
        if left % size == 0:
            block, left = [size, *block], left // size
        elif size % left == 0:
            block, left = [left, *block], 1
        else:
            return None
    return (layer.rows if rows == 1 else 1, *block)


def _tensor(layer: QuantizedLayer) -> IntxUnpackedToInt8Tensor:
    from torchao.quantization import IntxUnpackedToInt8Tensor

    block_size = _block_size(layer)
    assert block_size is not None
    weight, quantized = layer.matrix.weight, layer.weight
    blocks = [size // block for size, block in zip(weight.shape, block_size, strict=True)]
    shift = 0 if layer.symmetric else 1 << (layer.bits - 1)
    codes = (quantized.codes.short() - shift).to(torch.int8)
    tensor = IntxUnpackedToInt8Tensor(
        qdata=codes.reshape(weight.shape),
        scale=quantized.scale.reshape(blocks).clone(),
        zero_point=(quantized.zero_point - shift).to(torch.int8).reshape(blocks),
        target_dtype=getattr(torch, f"int{layer.bits}"),
        block_size=block_size,
        dtype=weight.dtype,
        activation_quantization=None,
    )
    if not torch.equal(tensor.dequantize(), weight):
        raise ValueError(f"torchao must give the weight of {layer.name} back, got another")
    return tensor


def _converted(model: nn.Module, layers: Sequence[QuantizedLayer]) -> nn.Module:
    """A deep copy in which tensors are put in place of weights, which are never copied."""
    memo: dict[int, Any] = {}
    for layer in layers:
        tensor = nn.Parameter(_tensor(layer), requires_grad=False)
        memo[id(layer.module.get_parameter("weight"))] = tensor
        for name in layer.names:
            codes = model.get_submodule(name).quantized_weight
            memo[id(codes)] = codes
    converted = copy.deepcopy(model, memo)
    for name in (name for layer in layers for name in layer.names):
        converted.get_submodule(name).__dict__.pop("quantized_weight", None)
    return converted


def _save_program(model: nn.Module, batch: Any, path: Path) -> None:
    """The model is a copy, which nothing else uses any more."""
    args, kwargs = ordered(model, *arguments(model, batch, "args"))
    shapes = automatic_shapes(model, args, kwargs)
    own = model.forward

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    # torch.export does not let sizes change of what goes into ``**kwargs``.
    forward.__dict__["__signature__"] = signature_of(model, kwargs)
    model.__dict__["forward"] = forward
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
        torch.export.save(program, path)
        try:  # some names get lost on the way
            _program(path)(*args, **kwargs)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            rule = "model must be one that torch.export can load and run again"
            hint = NAMES_HINT if isinstance(error, (SyntaxError, AttributeError)) else ""
            raise ValueError(f"{rule}, got {got}{hint}") from error


def _program(path: Path) -> nn.Module:
    with torch.device("cpu"):  # torch.export.load puts some tensors on the caller's default device
        loaded: nn.Module = torch.export.load(path).module()
    return loaded


def _program_runner(path: Path) -> Runner:
    program = _program(path)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            return output_tensors(program(*args, **kwargs))

    return Runner("torch.export", True, "", run)


def _is_as_built(model: nn.Module) -> bool:
    """Whether transformers builds such a model, with the same state, from its configuration.

    It does not where biases are new, batch norms folded or activation quantizers attached.
    """
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return False
    if not isinstance(model, PreTrainedModel):
        return False
    try:
        check_alike(model, skeleton(model))
    except ValueError:
        return False
    return True


def _save_pretrained(
    converted: Any, layers: Sequence[QuantizedLayer], folder: Path, model: nn.Module
) -> bool:
    """As transformers saves a model that it has quantized by torchao itself.

    Without files, and False, where it would load tensors in other dtypes than the model's.
    """
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    configs = {layer.name: _config(layer) for layer in layers}
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    first, *others = configs.values()
    config = TorchAoConfig(
        first if all(other == first for other in others) else FqnToConfig(configs),
        modules_to_not_convert=[name for name in linears if name not in configs] or None,
    )
    converted.config.quantization_config = config
    converted.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    settings: dict[str, Any] = {}
    if "safe_serialization" in inspect.signature(converted.hf_quantizer.is_serializable).parameters:
        # transformers 4 writes these tensors as a state dict of torch alone, and asks for what its
        # own loading has set.
        settings["safe_serialization"] = False
        converted.hf_quantizer.offload = False
    with no_progress_bars():
        converted.save_pretrained(folder, **settings)
    del converted.hf_quantizer, converted.config.quantization_config
    state = load_alike(folder, type(model)).state_dict()
    for key, tensor in model.state_dict().items():
        back = state[key].dequantize() if hasattr(state[key], "qdata") else state[key]
        if back.dtype != tensor.dtype:
            for path in folder.iterdir():
                path.unlink()
            return False
        if not torch.equal(back, tensor.cpu()):
            raise ValueError(f"model must be the same after loading again, got another {key}")
    return True


def _config(layer: QuantizedLayer) -> Any:
    """How torchao calls a layer's settings; for the reader, as loading takes the tensors' own."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup

    grouped = layer.granularity == "per_group"
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{layer.bits}"),
        granularity=PerGroup(layer.group_size) if grouped else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if layer.symmetric else MappingType.ASYMMETRIC,
    )
