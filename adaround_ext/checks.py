"""Checks of arguments, with errors that name the argument, the rule and what came."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from adaround_ext.ops.library import check_device

Check = Callable[[str, Any], None]  # of an argument's name and value, for tables of rules

_LEAST_LIKENESS = 0.6  # of a name that is suggested; as difflib itself has it


def refuse_unknown(kind: type[Any], values: Mapping[str, Any]) -> None:
    """ValueError for a key that is no field of the dataclass ``kind``."""
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        names = ", ".join(nearest_first(unknown[0], known))
        raise ValueError(f"{kind.__name__} has no {unknown[0]!r}; it has {names}")


def fail(name: str, rule: str, got: object) -> None:
    raise ValueError(f"{name} must be {rule}, got {got!r}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        fail(name, "True or False", value)


def check_int(name: str, value: object, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least or (most is not None and value > most):
        fail(name, f"at least {least}" if most is None else f"from {least} to {most}", value)


def check_number(
    name: str, value: object, least: float, most: float = float("inf"), exclusive: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    finite = value == value and abs(value) != float("inf")
    if not finite or not least <= value <= most or (exclusive and value == least):
        bound = f"above {least}" if exclusive else f"at least {least}"
        fail(name, bound if most == float("inf") else f"from {least} to {most}", value)


def choice(*choices: str) -> Check:
    def check(name: str, value: Any) -> None:
        if value not in choices:
            fail(name, f"one of {', '.join(choices)}", value)

    return check


def integer(least: int, most: int | None = None) -> Check:
    return lambda name, value: check_int(name, value, least, most)


def number(least: float, most: float = float("inf"), exclusive: bool = False) -> Check:
    return lambda name, value: check_number(name, value, least, most, exclusive)


def or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def check_module(model: object) -> None:
    """TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")


def refuse_inference(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """ValueError for a model's named tensor that only inference mode can write to or trace."""
    for name, tensor in tensors:
        if tensor.is_inference():
            raise ValueError(f"model must not be made in inference_mode, as {name} was")


def check_devices(model: nn.Module, device: torch.device | None = None) -> None:
    """ValueError for a parameter's device, or that to work on, for which there are no kernels."""
    if device is not None:
        check_device("device", device)
    for name, parameter in model.named_parameters():
        check_device(name, parameter.device)


def device_here(device: torch.device | str) -> torch.device:
    """``device`` as torch knows it, ValueError where there is none that holds data."""
    try:
        indexed = torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device must be one of this machine, got {device!r}: {error}") from error
    if indexed.type == "meta":
        raise ValueError(f"device must hold data, got {device!r}")
    return indexed


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def nearest_first(name: str, names: Iterable[str]) -> list[str]:
    """All names, those that are spelt most like ``name`` first."""
    return sorted(set(names), key=lambda other: (-_alike(name, other), other))


def suggestion(name: str, names: Iterable[str]) -> str:
    """ "did you mean ...?" with the name that is spelt most like it; "" where none is."""
    first = nearest_first(name, names)[:1]
    return (
        f"did you mean {first[0]}?" if first and _alike(name, first[0]) >= _LEAST_LIKENESS else ""
    )


def _alike(name: str, other: str) -> float:
    return SequenceMatcher(None, name.lower(), other.lower()).ratio()


def describe(batch: Any) -> str:
    """What a batch holds, in one line."""
    if isinstance(batch, Mapping):
        values = [f"{key} ({describe_value(value)})" for key, value in batch.items()]
        return f"a mapping with {', '.join(values) or 'nothing in it'}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {', '.join(map(describe_value, batch)) or 'nothing'}"
    return describe_value(batch)


def describe_value(value: Any) -> str:
    """A value in a few words: the dtype and shape of a tensor."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return type(value).__name__


def check(argument: str, value: object, device: torch.device, name: str) -> Tensor:
    """The tensor without its graph; see ``layers.inputs.batches`` for what is refused."""
    tensor = check_kind(argument, value, device)
    # One cheap pass: a sum is finite unless a value is not, or it overflows: then none is counted.
    if not bool(has_finite_sum(tensor)):
        bad = tensor.numel() - int(torch.isfinite(tensor).sum())
        if bad:
            raise infinite(argument, name, f"{bad} NaN or infinite values")
    return tensor


def check_kind(argument: str, value: object, device: torch.device) -> Tensor:
    """:func:`check` without a look at the values."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{argument} must hold tensors, got {type(value).__name__}")
    if not value.is_floating_point():
        raise TypeError(f"{argument} must be floating point, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{argument} must be strided tensors, got {value.layout}")
    if value.device != device:
        raise ValueError(f"{argument} must be on the layer's device {device}, got {value.device}")
    return value.detach()


def has_finite_sum(value: Tensor) -> Tensor:
    """On the value's device; of float32, which holds what numbers of 16 bits add up to."""
    return torch.isfinite(value.sum(dtype=torch.promote_types(value.dtype, torch.float32)))


def infinite(argument: str, name: str, values: str) -> ValueError:
    return ValueError(f"{argument} of {name} must be finite, got {values}")
