"""ONNX runners: exported files in ONNX Runtime and OpenVINO, on the CPU."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaround_ext.export.manifest import path_of, read_manifest
from adaround_ext.export.runner import FLIPS, Runner
from adaround_ext.export.torch_export import bind, plain_leaves
from adaround_ext.files import check_keys

if TYPE_CHECKING:
    import numpy as np
    import onnxruntime  # type: ignore[import-untyped]

KIND = "onnx"
FILE = "model.onnx"
_KEYS = {"target", "opset", "inputs", "constants", "outputs"}
_KEYS |= {"layers", "activations", "half", "openvino"}
_LEVEL = "session.qdq_matmulnbits_accuracy_level"

Feeds = dict[str, "np.ndarray[Any, Any]"]
Load = Callable[[], Callable[[Feeds], list[Any]]]

_HALF = "the model is float16, which runtimes sum in float32 and round elsewhere than PyTorch"
_INTEGERS = "layers with quantized activations are fused to integer operators, which round anew"
_ORT_INTEGERS = f"{_INTEGERS}; session.disable_quant_qdq=1 leaves them as they are"
_ORT_LEVEL = f"MatMulNBits quantizes activations to int8; {_LEVEL}=0 restores equality"
_OV_SETTINGS = (
    "linear layers quantize activations to int8, and floats are bfloat16 or float16 where the CPU "
    "has them; DYNAMIC_QUANTIZATION_GROUP_SIZE=0 and INFERENCE_PRECISION_HINT=f32 restore equality"
)


def runners(folder: Path, model: nn.Module) -> list[Runner]:
    """The file in each runtime that is installed, at settings that are exact and as it comes.

    OpenVINO takes part for files of target "openvino", and for others that it computes right.
    Raises ImportError where neither onnxruntime nor openvino is installed, FileNotFoundError and
    ValueError for a folder that is no whole export.
    """
    details = read_manifest(folder, KIND).details
    check_keys(details, _KEYS, "details")
    path = folder / FILE
    quantized = bool(details["activations"])
    half = _HALF if details["half"] else ""
    ways: list[tuple[str, str, Load]] = []
    if importlib.util.find_spec("onnxruntime") is not None:
        plain, exact, default = (
            cache(partial(_onnxruntime, path, *settings))
            for settings in (("0", False), ("0", True), (None, True))
        )
        integers = _ORT_INTEGERS if quantized else ""
        ways += [
            ("onnxruntime, optimisations off", FLIPS if quantized else "", plain),
            ("onnxruntime, accuracy level 0", integers, exact),
            ("onnxruntime, default", integers or _ORT_LEVEL, default),
        ]
    if importlib.util.find_spec("openvino") is not None:
        exact, default = (cache(partial(_openvino, path, exact)) for exact in (True, False))
        integers = _INTEGERS if quantized else ""
        if _openvino_takes(details, exact):
            ways += [
                ("openvino, float32", integers, exact),
                ("openvino, default", integers or _OV_SETTINGS, default),
            ]
    if not ways:
        needs = "running ONNX files needs the package onnxruntime or openvino"
        raise ImportError(f'{needs}: pip install "adaround_ext[export]"')
    return [
        Runner(name, not (note or half), note or half, _run(model, details, load))
        for name, note, load in ways
    ]


def _openvino_takes(details: Mapping[str, Any], load: Load) -> bool:
    if details["target"] == "openvino":
        return True
    if not details["openvino"]:
        return False
    try:
        load()
    except RuntimeError:  # an operator that it has not
        return False
    return True


def _run(
    model: nn.Module, details: Mapping[str, Any], load: Load
) -> Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]]:
    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        outputs = load()(_feeds(model, details, args, kwargs))
        return [torch.from_numpy(output) for output in outputs]

    return run


def _feeds(
    model: nn.Module, details: Mapping[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Feeds:
    """The model's arguments by the names of the file's inputs."""
    leaves = bind(model, args, kwargs)
    names: dict[str, str] = details["inputs"]
    given = {name for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
    if given != set(names):
        rule = f"the exported model takes the tensors {', '.join(names)}"
        raise ValueError(f"{rule}, got {', '.join(sorted(given))}")
    constants = plain_leaves(leaves)
    if constants != details["constants"]:
        rule = f"the exported model was called with {details['constants']} beside tensors"
        raise ValueError(f"{rule}, got {constants}")
    return {names[name]: leaves[name].detach().cpu().numpy() for name in names}


def _onnxruntime(path: Path, level: str | None, optimized: bool) -> Callable[[Feeds], list[Any]]:
    session = cpu_session(path, level, optimized)
    return lambda feeds: list(session.run(None, feeds))


def cpu_session(
    path: Path, level: str | None = None, optimized: bool = True, written: Path | None = None
) -> onnxruntime.InferenceSession:
    """An ONNX file in ONNX Runtime, on as many threads as torch has.

    level: of accuracy, or the runtime's own. written: where the optimised graph goes.
    """
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    )
    if level is not None:
        options.add_session_config_entry(_LEVEL, level)
    if written is not None:
        options.optimized_model_filepath = str(written)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", f"{written.name}.data"
        )
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def matmul_nbits(folder: str | os.PathLike[str]) -> dict[str, int]:
    """How many products with 4-bit weights an export has, and how many of them are MatMulNBits.

    {"products": in the file, "matmul_nbits": in the graph that ONNX Runtime makes of it}. Raises
    FileNotFoundError and ValueError for a folder that is no whole export.
    """
    import onnx

    folder = path_of(folder)
    read_manifest(folder, KIND)
    with tempfile.TemporaryDirectory() as place:
        written = Path(place) / FILE
        cpu_session(folder / FILE, written=written)
        fused = onnx.load(written, load_external_data=False).graph
        count = sum(
            node.op_type == "MatMulNBits"
            and any(a.name == "bits" and a.i == 4 for a in node.attribute)
            for node in fused.node
        )
    graph = onnx.load(folder / FILE, load_external_data=False).graph
    narrow = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    codes = {tensor.name for tensor in graph.initializer if tensor.data_type in narrow}
    weights = {n.output[0] for n in graph.node if n.input[:1] and n.input[0] in codes}
    products = sum(n.op_type == "MatMul" and n.input[1] in weights for n in graph.node)
    return {"products": products, "matmul_nbits": count}


def _openvino(path: Path, exact: bool) -> Callable[[Feeds], list[Any]]:
    import openvino  # type: ignore[import-untyped]

    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if exact:
        settings |= {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(feeds: Feeds) -> list[Any]:
        # A tensor may have several names.
        names = [name for value in compiled.inputs for name in value.get_names() & set(feeds)]
        outputs = compiled({name: feeds[name] for name in names})
        return [outputs[output].copy() for output in compiled.outputs]

    return run
