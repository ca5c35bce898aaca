"""Trials of an export before there is anything to export.

Whether transformers loads the packed form of a model's class, on one with few layers; whether a
model can be traced for ONNX.
"""

from __future__ import annotations

import copy
import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaround_ext.export.compressed_tensors import export_compressed_tensors
from adaround_ext.export.hugging_face import load_alike
from adaround_ext.export.onnx.program import traced
from adaround_ext.export.torch_export import distinct, ordered
from adaround_ext.planning.plan import Target
from adaround_ext.result import QuantizedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "num_decoder_layers", "encoder_layers",
           "decoder_layers")  # fmt: skip
_WORDS = 256
_SILENT = 50  # logging.CRITICAL


def check_loads(model: PreTrainedModel, targets: Sequence[Target]) -> None:
    """ValueError where packed weights of these layers could be written but not loaded.

    Of a model of the class with one layer of each kind, and few words, zeros are exported; that
    says nothing where such a model cannot be built, or not loaded without packed weights either.
    """
    with torch.random.fork_rng([]), _quiet(), tempfile.TemporaryDirectory() as folder:
        try:
            small, plain = _shallow(model), _shallow(model)
        except Exception:  # a class whose configuration has other rules
            return
        quantized = [target for target in targets if _zeros(small, target)]
        if not quantized:
            return
        try:
            export_compressed_tensors(small, Path(folder, "packed"))
        except ValueError as error:
            try:
                plain.save_pretrained(Path(folder, "plain"))
                load_alike(Path(folder, "plain"), type(model))
            except ValueError:
                return
            raise ValueError(str(error)) from None


def check_traces(model: nn.Module, run: Callable[[], object]) -> None:
    """ValueError where torch.onnx.export cannot trace ``model`` with what ``run`` gives it."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    if not calls:  # it is run in another way
        return
    with redirect_stderr(io.StringIO()):
        positional, named = distinct(ordered(model, *calls[0]))
        traced(model, (), (), positional, named, None)


def _shallow(model: PreTrainedModel) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    for each in [config, *(getattr(config, name) for name in getattr(config, "sub_configs", ()))]:
        _shrink(each)
    small: PreTrainedModel = type(model)(config)
    small.to(dtype=model.dtype)  # type: ignore[arg-type, call-arg]
    return small


def _shrink(config: Any) -> None:
    for name in _DEPTHS:
        depth = getattr(config, name, None)
        if isinstance(depth, int) and depth > 1:
            for key, value in list(vars(config).items()):  # what kind each layer is
                if isinstance(value, list) and len(value) == depth:
                    setattr(config, key, value[:1])
            setattr(config, name, 1)
    words = getattr(config, "vocab_size", None)
    if isinstance(words, int) and words > _WORDS:
        config.vocab_size = _WORDS
        padding = getattr(config, "pad_token_id", None)
        config.pad_token_id = min(padding, _WORDS - 1) if isinstance(padding, int) else padding


def _zeros(small: nn.Module, target: Target) -> bool:
    """Quantizes the layer of that name, to zeros; whether there is one."""
    layer = dict(small.named_modules()).get(target.name)
    config, cols = target.config, target.matrix.cols
    if not isinstance(layer, nn.Linear) or layer.in_features != cols:
        return False
    rows = layer.out_features
    shape = (rows, 1 if config.group_size is None else cols // config.group_size)
    kind = torch.int8 if config.symmetric else torch.uint8
    codes = torch.zeros(rows, cols, dtype=kind, device="cpu")
    scale = torch.ones(shape, dtype=torch.float32, device="cpu")
    zero_point = torch.zeros(shape, dtype=torch.int32, device="cpu")
    layer.weight.data.zero_()
    layer.quantized_weight = QuantizedWeight(codes, scale, zero_point, config.bits)  # type: ignore[assignment]
    return True


@contextmanager
def _quiet() -> Iterator[None]:
    """What libraries say of the trial is not the caller's concern."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(_SILENT)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
