"""compressed-tensors export: Hugging Face directories that transformers and vLLM load as they are.

Format: compressed-tensors, "pack-quantized", of weights alone. For each quantized Linear:
``weight_packed`` int32 [rows, ceil(cols bits / 32)], the numbers code - qmin of a row one after the
other, least significant bits first; ``weight_scale`` [rows, n_groups] in the model's dtype;
``weight_shape`` int64 [2]; ``weight_zero_point`` int32 [ceil(rows bits / 32), n_groups], packed
like the codes but down the columns, unless symmetric. Source: compressed_tensors,
compressors/pack_quantized.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext.export.hugging_face import (
    check_alike,
    load_alike,
    no_progress_bars,
    skeleton,
)
from adaround_ext.export.manifest import new_export, read_manifest
from adaround_ext.export.quantized_layers import (
    LEAVE_OUT,
    QuantizedLayer,
    quantized_layers,
    refuse,
    refuse_quantizers,
)
from adaround_ext.export.runner import Runner, module_runner
from adaround_ext.ops import pack_bits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KIND = "compressed-tensors"
_FORMAT = "pack-quantized"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def export_compressed_tensors(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Writes a new directory that ``from_pretrained`` of the model's class loads as it is.

    Decompressed weights are those of ``model`` bit by bit: the directory is loaded and compared
    before it gets its name, which takes the memory of a second model. Other tensors stay as they
    are. Layers that share all settings are targeted as "Linear", with ``ignore`` for what is not
    quantized, and are decompressed while transformers loads them (``"dequantize": true`` in
    config.json). Mixed settings name every layer, so their directory is for the class it was
    written from, and decompressed at the first call: ``dequantize=True`` makes transformers take
    one setting for all layers. Scales per tensor are repeated for each row, as vLLM takes none. By
    the source of its CompressedTensorsWNA16, vLLM takes 2 to 8 bits symmetric, 4 and 8 asymmetric
    (older releases: 4 and 8 bits).

    Args:
        model: A PreTrainedModel that :func:`adaround_ext.quantize_` has quantized. It is not
            changed.
        folder: The directory to write, new or empty.
        tokenizer: Saved beside the model.
        max_shard_size: Of a file, as ``save_pretrained`` takes it.

    Raises:
        ImportError: transformers or compressed-tensors is missing.
        TypeError: ``model`` is no PreTrainedModel.
        ValueError: The model is not quantized, or changed since; it holds other tensors than its
            class builds (biases by bias="create", folded batch norms) or quantized activations; for
            quantized layers other than Linear, shared weights, dtypes other than float32, float16
            and bfloat16, scales that the model's dtype cannot hold, and asymmetric layers among
            mixed settings; where transformers cannot load the class with packed weights, as with
            fused experts; and for a directory that is not new.
    """
    _import()
    layers = _checked_layers(model)
    built = skeleton(model)
    check_alike(model, built)
    built.config.quantization_config = _quantization_config(built, layers)
    with new_export(folder, KIND) as (directory, details), no_progress_bars():
        built.save_pretrained(
            directory, state_dict=_state_dict(model, layers), max_shard_size=max_shard_size
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        _check_loaded(load_alike(directory, type(model)), model, layers)
        details.update(_details(layers))


def runners(folder: Path, model: nn.Module) -> list[Runner]:
    """transformers, decompressing as config.json says, and the other way where there is one."""
    details = read_manifest(folder, KIND).details
    _import()
    ways = [module_runner("transformers", load_alike(folder, type(model)))]
    if details["settings"] == 1 and details["symmetric"]:
        from transformers import CompressedTensorsConfig

        config = CompressedTensorsConfig(dequantize=False)
        # Some classes, as T5's, cannot be built with packed weights in transformers.
        with suppress(ValueError):
            late = load_alike(folder, type(model), quantization_config=config)
            ways.append(module_runner("transformers, dequantize=False", late))
    return ways


def _import() -> None:
    try:
        import compressed_tensors  # type: ignore[import-untyped] # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        needs = "exporting to compressed-tensors needs the packages transformers and"
        hint = 'pip install "adaround_ext[compressed-tensors]"'
        raise ImportError(f"{needs} compressed-tensors: {hint}") from error


def _checked_layers(model: nn.Module) -> list[QuantizedLayer]:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        came = type(model).__name__
        raise TypeError(f"model must be a PreTrainedModel of transformers, got {came}")
    layers = quantized_layers(model)
    refuse_quantizers(f"{_FORMAT} weights", model)
    refuse(f"compressed-tensors, {_FORMAT},", layers, lambda layer: obstacle(layer, model.dtype))
    if len(_groups(layers)) > 1 and not all(layer.symmetric for layer in layers):
        names = [layer.name for layer in layers if not layer.symmetric]
        rule = "layers must all be symmetric, or share bits, granularity and group size"
        raise ValueError(f"{rule}, got other settings beside asymmetric {', '.join(names[:5])}")
    return layers


def obstacle(layer: QuantizedLayer, dtype: torch.dtype) -> str | None:
    """Why a model of this dtype cannot have a layer packed, None where it can."""
    weight_dtype = layer.matrix.weight.dtype
    if not isinstance(layer.module, nn.Linear):
        return f"it must be a Linear, got {type(layer.module).__name__}{LEAVE_OUT}"
    if len(layer.names) > 1:
        shared = ", ".join(layer.names)
        return f"packed weights cannot be shared, got that of {shared}{LEAVE_OUT}"
    if weight_dtype not in _DTYPES or weight_dtype != dtype:
        rule = "its dtype must be that of the model and float32, float16 or bfloat16"
        got = f"got {weight_dtype} in a model of {dtype}"
        return f"{rule}, {got}; convert the model before it is quantized"
    if not torch.equal(layer.weight.scale.to(dtype).float(), layer.weight.scale):
        return (
            f"its scales must be exact in {dtype}, the loader's: quantize with scale_dtype={dtype}"
        )
    return None


def _state_dict(model: nn.Module, layers: Sequence[QuantizedLayer]) -> dict[str, Tensor]:
    """The model's state with packed weights; tied tensors stay tied, the writer knows which."""
    state = dict(model.state_dict())
    for layer in layers:
        del state[f"{layer.name}.weight"]
        state |= {f"{layer.name}.{key}": tensor for key, tensor in _compressed(layer).items()}
    return state


def _compressed(layer: QuantizedLayer) -> dict[str, Tensor]:
    """The tensors that take the place of a weight."""
    qmin, _ = layer.range
    tensors = {
        "weight_packed": _words(layer.weight.codes, layer.bits, qmin),
        "weight_scale": layer.scale.to(layer.matrix.weight.dtype).contiguous(),
        "weight_shape": torch.tensor([layer.rows, layer.cols], device="cpu"),
    }
    if not layer.symmetric:  # theirs are codes and zero points less 2^(b-1); the same words
        zero_point = layer.zero_point.to(torch.uint8).t()
        tensors["weight_zero_point"] = _words(zero_point, layer.bits, 0).t().contiguous()
    return tensors


def _words(codes: Tensor, bits: int, qmin: int) -> Tensor:
    """int32 [rows, ceil(cols bits / 32)]: code - qmin, a stream of bits in little-endian words."""
    packed = pack_bits(codes, bits, qmin).cpu()
    return F.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)


def _quantization_config(
    model: PreTrainedModel, layers: Sequence[QuantizedLayer]
) -> dict[str, Any]:
    """What config.json says under this name."""
    from compressed_tensors.quantization import QuantizationConfig  # type: ignore[import-untyped]

    modules = model.named_modules()
    linears = [name for name, module in modules if isinstance(module, nn.Linear)]
    quantized = {layer.name for layer in layers}
    groups = _groups(layers)
    config = QuantizationConfig(
        config_groups={
            f"group_{index}": {
                "targets": ["Linear"] if len(groups) == 1 else names,
                "weights": {
                    "num_bits": bits,
                    "type": "int",
                    "symmetric": symmetric,
                    "strategy": "channel" if group_size is None else "group",
                    "group_size": group_size,
                    "dynamic": False,
                },
                "format": _FORMAT,
            }
            for index, ((bits, symmetric, group_size), names) in enumerate(groups.items())
        },
        format=_FORMAT,
        quantization_status="compressed",
        ignore=[name for name in linears if name not in quantized],
    )
    # Decompressing late, transformers expects zero points that are not packed, and fails; early, it
    # takes the first group for all layers.
    early = {"dequantize": True} if len(groups) == 1 else {}
    return {**config.model_dump(mode="json"), **early}


def _groups(layers: Sequence[QuantizedLayer]) -> dict[tuple[int, bool, int | None], list[str]]:
    """(bits, symmetric, group size or None) to the names of the layers that have them."""
    groups: dict[tuple[int, bool, int | None], list[str]] = defaultdict(list)
    for layer in layers:
        group_size = layer.group_size if layer.granularity == "per_group" else None
        groups[layer.bits, layer.symmetric, group_size].append(layer.name)
    return dict(groups)


def _check_loaded(loaded: nn.Module, model: nn.Module, layers: Sequence[QuantizedLayer]) -> None:
    """ValueError unless the loaded model, decompressed, has the very bits of the model."""
    from compressed_tensors.compressors import decompress_module  # type: ignore[import-untyped]

    for layer in layers:
        module = loaded.get_submodule(layer.name)
        decompress_module(module, leave_decompressed=False)
    state = loaded.state_dict()
    for key, tensor in model.state_dict().items():
        back = state.get(key)
        rule = "model must be the same after loading again"
        if back is not None and back.dtype != tensor.dtype:
            got = f"{key} in {back.dtype} instead of {tensor.dtype}"
            raise ValueError(f"{rule}, got {got}; convert the model before it is quantized")
        if back is None or not torch.equal(back, tensor.cpu()):
            raise ValueError(f"{rule}, got another {key}")


def _details(layers: Sequence[QuantizedLayer]) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "settings": len(_groups(layers)),
        "symmetric": all(layer.symmetric for layer in layers),
        "layers": {layer.name: layer.grid | {"group_size": layer.group_size} for layer in layers},
    }
