"""Names of a graph's inputs, outputs and axes, from a model's signature and its output."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from adaround_ext.export.torch_export import leaves_of

if TYPE_CHECKING:
    import onnx_ir as ir


def output_names_of(output: object) -> list[str]:
    """A name for every tensor of an output: its keys, as the fields of a transformers ModelOutput.

    "output" where there are none, and before an index.
    """
    names = []
    for steps, leaf in leaves_of(output):
        if isinstance(leaf, Tensor):
            keyed = bool(steps) and not steps[0].isdigit()
            names.append("_".join(steps if keyed else ["output", *steps]))
    return names


def chosen_names(
    option: str, given: Sequence[str] | None, defaults: Sequence[str], taken: Sequence[str] = ()
) -> list[str]:
    """The names that the caller gave, or else ``defaults``, made distinct.

    ValueError for given names of another number, or that are not distinct.
    """
    if given is not None:
        names = [given] if isinstance(given, str) else list(given)
        if len(names) != len(defaults) or len({*names, *taken}) != len(names) + len(taken):
            rule = f"{option} must be {len(defaults)} distinct names, for {', '.join(defaults)}"
            raise ValueError(f"{rule}, got {names}")
        return names
    names = []
    for name in defaults:
        while name in (*names, *taken):
            name += "_out"
        names.append(name)
    return names


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
