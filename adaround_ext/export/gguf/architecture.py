"""Architectures: names that gguf has for the tensors of known models, and llama.cpp's settings.

Names are gguf-py's own. Settings, and the order of the rows of q and k, are those of llama.cpp's
converter (conversion/llama.py, qwen.py and bert.py there), without a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaround_ext.export.hugging_face import skeleton

if TYPE_CHECKING:
    from gguf import GGUFWriter


@dataclass(frozen=True)
class Architecture:
    """An architecture that llama.cpp runs, with a model's tensors.

    Attributes:
        name: llama.cpp's.
        names: Of tensors, by their keys in the model's state dict.
        heads: For keys whose rows change their order, their number of attention heads.
        config: The model's configuration.
    """

    name: str
    names: dict[str, str]
    heads: dict[str, int]
    config: Any

    def write_settings(self, writer: GGUFWriter) -> None:
        """Everything but tensors, for token ids as input: there is no tokenizer."""
        config = self.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_vocab_size(config.vocab_size)
        writer.add_tokenizer_model("none")
        _KNOWN[type(config).__name__].settings(writer, config)


@dataclass(frozen=True)
class _Known:
    """How a class of transformers becomes an architecture.

    Attributes:
        name: llama.cpp's.
        kind: The class of the model.
        obstacle: Whether the configuration asks for what llama.cpp does not do.
        settings: Writes those settings that only this architecture has.
        permuted: Whether rows of q and k change their order.
    """

    name: str
    kind: str
    obstacle: Callable[[Any], bool]
    settings: Callable[[GGUFWriter, Any], None]
    permuted: bool = False


def architecture(model: nn.Module) -> Architecture | None:
    """That of a model of transformers, or None where it, or one of its tensors, is not known."""
    import gguf

    config: Any = getattr(model, "config", None)
    known = _KNOWN.get(type(config).__name__)
    if known is None or type(model).__name__ != known.kind or known.obstacle(config):
        return None
    keys = list(model.state_dict())
    if not set(keys) <= set(skeleton(model).state_dict()):  # type: ignore[arg-type]
        return None
    (kind,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == known.name)
    name_map = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    named = ((key, name_map.get_name(key, (".weight", ".bias"))) for key in keys)
    names = {key: name for key, name in named if name is not None}
    if len(names) < len(keys):
        return None
    heads = _heads(keys, config) if known.permuted else {}
    return Architecture(known.name, names, heads, config)


def row_order(rows: int, heads: int) -> Tensor:
    """Which row comes where: the two halves of each head interleaved, for llama.cpp's rotation."""
    return (
        torch.arange(rows, device="cpu")
        .view(heads, 2, rows // heads // 2)
        .transpose(1, 2)
        .reshape(-1)
    )


def _heads(keys: Iterable[str], config: Any) -> dict[str, int]:
    heads = {}
    for key in keys:
        if ".q_proj." in key:
            heads[key] = config.num_attention_heads
        elif ".k_proj." in key:
            heads[key] = config.num_key_value_heads
    return heads


def _decoder_obstacle(config: Any) -> bool:
    # Optional biases would be lost in transformers, which does not look for them in GGUF files.
    options = ("use_sliding_window", "attention_bias", "mlp_bias")
    rope = _rope(config)["rope_type"]
    unusual = any(getattr(config, option, False) for option in options)
    return config.hidden_act != "silu" or rope != "default" or unusual


def _decoder_settings(writer: GGUFWriter, config: Any) -> None:
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)


def _rope(config: Any) -> dict[str, Any]:
    """rope_type and rope_theta, which transformers 4 has in two places."""
    if hasattr(config, "rope_parameters"):
        return dict(config.rope_parameters)
    scaling = {"rope_type": "default", **(config.rope_scaling or {})}
    return scaling | {"rope_theta": config.rope_theta}


def _encoder_obstacle(config: Any) -> bool:
    position = getattr(config, "position_embedding_type", "absolute")
    return config.hidden_act != "gelu" or position != "absolute" or config.is_decoder


def _encoder_settings(writer: GGUFWriter, config: Any) -> None:
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_token_type_count(config.type_vocab_size)


_KNOWN = {
    "LlamaConfig": _Known(
        "llama", "LlamaForCausalLM", _decoder_obstacle, _decoder_settings, permuted=True
    ),
    "Qwen2Config": _Known("qwen2", "Qwen2ForCausalLM", _decoder_obstacle, _decoder_settings),
    "BertConfig": _Known("bert", "BertModel", _encoder_obstacle, _encoder_settings),
}
