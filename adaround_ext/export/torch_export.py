"""What all exports by ``torch.export`` share: signatures, shapes and names."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaround_ext.export.onnx.names import _leaves


def ordered(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``forward``, those by keyword in the order of its parameters.

    TypeError where they do not fit, or hold no tensor.
    """
    try:
        bound = bind(model, args, kwargs)
    except TypeError as error:
        raise TypeError(f"args must fit the model's forward: {error}") from error
    if not any(isinstance(leaf, Tensor) for leaf in bound.values()):
        raise TypeError(f"args must hold a tensor, got {list(bound)}")
    names = [name for name in signature_of(model, kwargs).parameters if name in kwargs]
    return tuple(args), {name: kwargs[name] for name in names}


def distinct(tree: Any) -> Any:
    """``tree`` with a copy of each tensor that is there a second time.

    Traced with one tensor for two arguments, a graph would ignore the second.
    """
    seen: set[int] = set()

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and id(leaf) in seen:
            return leaf.clone()
        seen.add(id(leaf))
        return leaf

    return pytree.tree_map(copied, tree)


def bind(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All that is in a model's arguments, but None, by the name of its parameter.

    In a sequence or mapping by that name, "_", and its index or key. In the order of the
    parameters. TypeError where the arguments do not fit ``forward``.
    """
    bound = signature_of(model, kwargs).bind(*args, **kwargs).arguments
    return {
        "_".join([name, *steps]): leaf
        for name, value in bound.items()
        for steps, leaf in _leaves(value)
        if leaf is not None
    }


def plain_leaves(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments that a graph has for good, as JSON has them."""
    return {name: x for name, x in leaves.items() if isinstance(x, (bool, int, float, str))}


def signature_of(model: nn.Module, kwargs: Collection[str]) -> inspect.Signature:
    """That of ``forward``, with parameters of these names in the place of ``**kwargs``.

    Of those torch.export would refuse to let sizes change.
    """
    signature = inspect.signature(model.forward)
    plain = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    if len(plain) == len(signature.parameters):
        return signature
    names = {parameter.name for parameter in plain}
    more = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in kwargs if n not in names]
    return signature.replace(parameters=[*plain, *more])


def automatic_shapes(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """torch.export's dynamic_shapes: dimension 0 of every input, and 1 of token ids and masks.

    Those are integers or booleans with two dimensions. A size that the model itself fixes is fixed.
    """
    auto = torch.export.Dim.AUTO

    def dims(leaf: object) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return None
        tokens = leaf.dim() == 2 and not leaf.is_floating_point()
        return {0: auto, 1: auto} if tokens else {0: auto}

    bound = signature_of(model, kwargs).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(dims, value) for name, value in bound.items()}


# What may help where the code that it writes does not run.
NAMES_HINT = (
    "; torch.export writes the names of modules into code: those with quotes, line breaks or "
    "backslashes, and words of Python, must be renamed"
)
