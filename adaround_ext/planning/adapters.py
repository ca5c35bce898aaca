"""Adapters of low rank (LoRA), by what the libraries that make them call their layers."""

from __future__ import annotations

from collections.abc import Iterable

from adaround_ext.checks import some

_PREFIX = (
    "lora_"  # lora_A and lora_B of peft, lora_a and lora_b of torchtune, lora_up and lora_down
)


def adapter_note(names: Iterable[str]) -> str | None:
    """What a report says of layers with these names that are to be quantized; None without any."""
    found = [name for name in names if any(p.lower().startswith(_PREFIX) for p in name.split("."))]
    if not found:
        return None
    return (
        f"{len(found)} layers of LoRA adapters are quantized as all others ({some(found)}): "
        f'overrides={{"*{_PREFIX}*": "skip"}} leaves them alone, or merge them first'
    )
