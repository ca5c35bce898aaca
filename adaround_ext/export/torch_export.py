"""Arguments of a model as ``torch.export`` takes them, for all formats: order, names, sizes.

A model's positional and keyword arguments are bound to the parameters of its ``forward``; every
leaf of what is bound has a name, and dimensions that may change are marked. The exports to ONNX,
AIMET and torchao share this, and the runners that give an exported graph its inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# The end of an error where code that torch.export writes does not run.
NAMES_HINT = (
    "; torch.export writes the names of modules into code: those with quotes, line breaks or "
    "backslashes, and words of Python, must be renamed"
)


def ordered(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of ``forward``, those by keyword in the order of its parameters.

    Args:
        model: The model that is called with them.
        args: Its positional arguments.
        kwargs: Its keyword arguments, in any order.

    Returns:
        Positional arguments, and keyword arguments in order.

    Raises:
        TypeError: They do not fit ``forward``, or hold no tensor.
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
    """All leaves of a model's arguments but None, by name, in the order of its parameters.

    A leaf has the name of its parameter; in a sequence or mapping that name, "_", and its index or
    key.

    Args:
        model: The model that is called with them.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        From names to tensors and whatever else the arguments hold.

    Raises:
        TypeError: The arguments do not fit ``forward``.
    """
    bound = signature_of(model, kwargs).bind(*args, **kwargs).arguments
    return {
        "_".join([name, *steps]): leaf
        for name, value in bound.items()
        for steps, leaf in leaves_of(value)
        if leaf is not None
    }


def plain_leaves(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Those leaves of :func:`bind` that a graph has for good: booleans, numbers and text."""
    return {name: x for name, x in leaves.items() if isinstance(x, (bool, int, float, str))}


def signature_of(model: nn.Module, kwargs: Collection[str]) -> inspect.Signature:
    """The signature of ``forward``, with the names ``kwargs`` in the place of ``**kwargs``.

    torch.export refuses to let sizes change of what goes into ``**kwargs``.
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

    Token ids and masks are integers or booleans with two dimensions. A size that the model itself
    fixes is fixed.

    Args:
        model: The model to export.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        By parameter of ``forward``, trees as the arguments are, with ``Dim.AUTO`` a dimension that
        may change.
    """
    auto = torch.export.Dim.AUTO

    def dims(leaf: object) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            return None
        tokens = leaf.dim() == 2 and not leaf.is_floating_point()
        return {0: auto, 1: auto} if tokens else {0: auto}

    bound = signature_of(model, kwargs).bind(*args, **kwargs).arguments
    return {name: pytree.tree_map(dims, value) for name, value in bound.items()}


def leaves_of(tree: object) -> list[tuple[list[str], Any]]:
    """All leaves of a pytree, each with the steps that lead to it."""
    leaves = []
    for path, node in pytree.tree_flatten_with_path(tree, is_leaf=_has_no_keys)[0]:
        steps = [_step(entry) for entry in path]
        if _has_no_keys(node):
            leaves += [([*steps, *more], leaf) for more, leaf in _leaves_without_keys(node)]
        else:
            leaves.append((steps, node))
    return leaves


def _has_no_keys(node: object) -> bool:
    """Whether its class was registered without them, as ModelOutput in transformers 4."""
    known = pytree.SUPPORTED_NODES.get(type(node))
    return known is not None and known.flatten_with_keys_fn is None


def _leaves_without_keys(node: Any) -> list[tuple[list[str], Any]]:
    """The keys of a mapping whose values the children are, else their numbers."""
    children, _ = pytree.SUPPORTED_NODES[type(node)].flatten_fn(node)
    children = list(children)
    keys: list[str] = [str(index) for index in range(len(children))]
    if isinstance(node, Mapping) and len(node) == len(children):
        matched = zip(node.values(), children, strict=True)
        keys = list(map(str, node)) if all(a is b for a, b in matched) else keys
    pairs = zip(keys, children, strict=True)
    return [([key, *steps], leaf) for key, child in pairs for steps, leaf in leaves_of(child)]


def _step(entry: Any) -> str:
    """Of a pytree's path: a mapping's key, a sequence's index or an attribute's name."""
    for kind in ("key", "idx", "name"):
        if hasattr(entry, kind):
            return str(getattr(entry, kind))
    return str(entry)
