"""torchao programs: a model with torchao tensors, written and loaded by torch.export."""

from __future__ import annotations

from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaround_ext.export.torch_export import NAMES_HINT, automatic_shapes, ordered, signature_of
from adaround_ext.tracing.arguments import arguments


def save_program(model: nn.Module, batch: Any, path: Path) -> None:
    """Writes a model by torch.export, and runs what was written.

    Args:
        model: A copy, which nothing else uses any more.
        batch: An example of what it takes.
        path: The file to write.

    Raises:
        TypeError: The batch does not fit the model.
        ValueError: The program cannot be loaded or run again.
    """
    args, kwargs = ordered(model, *arguments(model, batch, "args"))
    shapes = automatic_shapes(model, args, kwargs)
    original = model.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    # torch.export does not let sizes change of what goes into ``**kwargs``.
    forward.__dict__["__signature__"] = signature_of(model, kwargs)
    model.__dict__["forward"] = forward
    with torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
        torch.export.save(program, path)
        try:  # some names get lost on the way
            load_program(path)(*args, **kwargs)
        except Exception as error:
            got = f"{type(error).__name__}: {error}"
            rule = "model must be one that torch.export can load and run again"
            hint = NAMES_HINT if isinstance(error, (SyntaxError, AttributeError)) else ""
            raise ValueError(f"{rule}, got {got}{hint}") from error


def load_program(path: Path) -> nn.Module:
    """The program in a file that :func:`save_program` wrote, on the CPU."""
    with torch.device("cpu"):  # torch.export.load puts some tensors on the caller's default device
        loaded: nn.Module = torch.export.load(path).module()
    return loaded
