"""Adapters of low rank (LoRA), known by what the libraries that make them call their layers."""

from __future__ import annotations

from collections.abc import Iterable

from adaround_ext.checks import some

# lora_A and lora_B of peft, lora_a and lora_b of torchtune, lora_up and lora_down.
_PREFIX = "lora_"


def adapter_note(names: Iterable[str]) -> str | None:
    """What a report says of layers with these names that are to be quantized; None without any."""
    adapters = [name for name in names if _is_adapter(name)]
    if not adapters:
        return None
    return (
        f"{len(adapters)} layers of LoRA adapters are quantized as all others ({some(adapters)}): "
        f'overrides={{"*{_PREFIX}*": "skip"}} leaves them alone, or merge them first'
    )


def _is_adapter(name: str) -> bool:
    return any(level.lower().startswith(_PREFIX) for level in name.split("."))
