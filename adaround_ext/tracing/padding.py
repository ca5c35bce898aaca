"""Padding masks: which of a model's masks tells where a layer's rows are padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from adaround_ext.tracing.dataflow import Dataflow, same_positions
from adaround_ext.tracing.trace import Trace

PaddingMask = str | Callable[[Any], Tensor | None] | None
# In the place of a mask's name: the mask is made by a function, of a batch.
BY_FUNCTION = ""


class PaddingMasks:
    """The masks [batch, tokens] of one model by the positions that they belong to.

    padding_mask: as :func:`adaround_ext.quantize_` has it. A mask "decoder_" + padding_mask is of
    the arguments whose names begin with "decoder", and so for every prefix; padding_mask itself is
    of the others of its shape: without the targets ("labels") and what has another argument's name
    with a prefix. ``notes`` says where that leaves a choice.
    """

    def __init__(self, padding_mask: PaddingMask, trace: Trace, flow: Dataflow) -> None:
        self.notes: list[str] = []
        self._main = padding_mask if isinstance(padding_mask, str) else BY_FUNCTION
        self._none = padding_mask is None
        self._masks: dict[frozenset[str], str] = {}
        shapes = _shapes(trace)
        masks = [name for name in shapes if self._prefix(name) is not None]
        groups = [group.difference(masks) for group in same_positions(trace, flow)]
        groups = [group for group in groups if group]
        names = set(shapes)
        for mask in masks:
            prefix = self._prefix(mask)
            for group in groups:
                if prefix and any(f"{name}_".startswith(prefix) for name in group):
                    self._masks[group] = mask
        rest = [
            group
            for group in groups
            if group not in self._masks
            and not all(_is_secondary(name, names) for name in group)
            and self._fits(shapes, group)
        ]
        if rest:
            self._masks[rest[0]] = self._main
        if len(rest) > 1 and self._main in shapes:
            others = ", ".join(sorted(name for group in rest[1:] for name in group))
            self.notes.append(
                f"{self._main} is taken for the padding of {', '.join(sorted(rest[0]))}, not of "
                f"{others}: for those give the model a mask whose name begins as theirs do, or none"
            )
        self._known = bool(groups)

    def name_of(self, positions: frozenset[str]) -> str | None:
        """The mask of rows whose positions are those of these arguments, None for none.

        Where nothing is known of the positions it is padding_mask's: shapes decide then.
        """
        if self._none:
            return None
        if not positions or not self._known:
            return self._main
        return next((mask for group, mask in self._masks.items() if group & positions), None)

    def _prefix(self, name: str) -> str | None:
        """What stands before padding_mask in a mask's name; None for what is no mask."""
        if not self._main:
            return None
        if name == self._main:
            return ""
        return name.removesuffix(self._main) if name.endswith("_" + self._main) else None

    def _fits(self, shapes: dict[str, tuple[int, ...]], group: frozenset[str]) -> bool:
        mask = shapes.get(self._main)
        return mask is None or any(shapes[name][:2] == mask for name in group)


def _shapes(trace: Trace) -> dict[str, tuple[int, ...]]:
    """Of the model's arguments, in their order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for value in trace.calls[0].inputs if trace.calls else ():
        name = trace.arguments.get(value.storage)
        if name is not None:
            shapes.setdefault(name, value.shape)
    return shapes


def _is_secondary(name: str, names: set[str]) -> bool:
    """Whether a mask without a prefix is not of this argument, as in "decoder_input_ids"."""
    prefixed = any(name != other and name.endswith("_" + other) for other in names)
    return prefixed or name == "labels" or name.startswith("decoder_")
