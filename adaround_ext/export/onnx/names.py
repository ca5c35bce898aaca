"""Names for what goes into a model and comes out of it, from its signature and its output."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    import onnx_ir as ir


def output_names_of(output: object) -> list[str]:
    """A name for every tensor of an output: its keys, as the fields of a transformers ModelOutput.

    "output" where there are none, and before an index.
    """
    found = []
    for steps, leaf in _leaves(output):
        if isinstance(leaf, Tensor):
            keyed = bool(steps) and not steps[0].isdigit()
            found.append("_".join(steps if keyed else ["output", *steps]))
    return found


def chosen_names(
    option: str, given: Sequence[str] | None, found: Sequence[str], taken: Sequence[str] = ()
) -> list[str]:
    """The names that the caller gave, or else those that were found, made distinct.

    ValueError for given names of another number, or that are not distinct.
    """
    if given is not None:
        names = [given] if isinstance(given, str) else list(given)
        if len(names) != len(found) or len({*names, *taken}) != len(names) + len(taken):
            rule = f"{option} must be {len(found)} distinct names, for {', '.join(found)}"
            raise ValueError(f"{rule}, got {names}")
        return names
    names = []
    for name in found:
        while name in (*names, *taken):
            name += "_out"
        names.append(name)
    return names


def _leaves(tree: object) -> list[tuple[list[str], Any]]:
    """All leaves of a pytree, each with the steps that lead to it."""
    found = []
    for path, node in pytree.tree_flatten_with_path(tree, is_leaf=_has_no_keys)[0]:
        steps = [_step(entry) for entry in path]
        if _has_no_keys(node):
            found += [([*steps, *more], leaf) for more, leaf in _leaves_without_keys(node)]
        else:
            found.append((steps, node))
    return found


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
    return [([key, *steps], leaf) for key, child in pairs for steps, leaf in _leaves(child)]


def _step(entry: Any) -> str:
    """Of a pytree's path: a mapping's key, a sequence's index or an attribute's name."""
    for kind in ("key", "idx", "name"):
        if hasattr(entry, kind):
            return str(getattr(entry, kind))
    return str(entry)


def name_values_(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Gives a graph's inputs and outputs these names, and what has one of them another."""
    from onnx_ir.passes import common

    for values, names in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    common.NameFixPass()(model)


def name_axes_(model: ir.Model) -> None:
    """Names sizes of inputs that may change "batch" (dimension 0), "sequence" (1) and "size".

    One name for those that are always equal; a number behind it for the second that is not.
    """
    import onnx_ir as ir

    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for place, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value not in (None, *names):
                names[str(size.value)] = _unused(
                    ("batch", "sequence", "size")[min(place, 2)], names
                )
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    for value in (*model.graph.inputs, *(v for node in nodes for v in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(size, names) for size in value.shape])


def _unused(name: str, names: Mapping[str, str]) -> str:
    numbered = (f"{name}_{count}" for count in range(2, len(names) + 3))
    return next(n for n in (name, *numbered) if n not in names.values())


def _renamed(size: Any, names: Mapping[str, str]) -> Any:
    """A size, which may be computed, as "2*s1 + 3"."""
    if isinstance(size, int) or size.value is None:
        return size
    return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.value)
