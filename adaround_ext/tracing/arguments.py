"""Arguments of a model: one rule for which parameter gets which value of a batch."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaround_ext.checks import describe, describe_value
from adaround_ext.tracing.evaluation import evaluation

_logger = logging.getLogger("adaround_ext")
Given = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword arguments
# Parameters and keys that are for what a model shall answer.
_LABELS = frozenset({"label", "labels", "label_ids", "target", "targets", "y"})
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_OPEN = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_TENSOR = (Tensor, "Tensor", "torch.Tensor")


@dataclass(frozen=True)
class _Reading:
    """What of a batch is given.

    count: so many of a sequence's values. whole: as one argument. left_out: keys of a mapping.
    first: how a sequence's first value is read, which is all that is given.
    """

    count: int = 0
    whole: bool = False
    left_out: frozenset[Any] = frozenset()
    first: _Reading | None = None

    def arguments(self, batch: Any) -> Given:
        if self.first is not None:
            return self.first.arguments(batch[0])
        if isinstance(batch, Mapping):
            given = {key: value for key, value in batch.items() if key not in self.left_out}
            return ((given,), {}) if self.whole else ((), given)
        if isinstance(batch, (tuple, list)):
            values = batch if self.count == len(batch) else batch[: self.count]
            return ((values,) if self.whole else tuple(values)), {}
        return (batch,), {}


class Arguments:
    """Batches as arguments of one model, by the signature of its ``forward``.

    A mapping holds keyword arguments, without labels by name ("labels", "target") that the model
    does not take. A tuple or list holds positional arguments: values behind those that the model
    has parameters for are left out, and so is a label, one integer (or string) a sample, that comes
    last and would go to a parameter with a default whose name is not a label's. The one parameter
    of a model gets a tuple whole, or a mapping of other names, where the model runs so; that is
    tried, in eval mode.
    name: of the argument that holds the batches. device: where they are tried, None for where they
    are. ``notes`` says what went where, once for batches that are alike, where something was left
    out or the batch could have been read in another way.
    """

    def __init__(self, model: nn.Module, name: str, device: torch.device | None = None) -> None:
        self._model, self._name, self._device = model, name, device
        self.signature = _signature(model)
        self.notes: list[str] = []
        parameters = [] if self.signature is None else list(self.signature.parameters.values())
        kinds = {parameter.kind for parameter in parameters}
        self._slots = [p for p in parameters if p.kind in _POSITIONAL]
        self._any_value = self.signature is None or inspect.Parameter.VAR_POSITIONAL in kinds
        self._any_key = self.signature is None or inspect.Parameter.VAR_KEYWORD in kinds
        self._names = {p.name for p in parameters if p.kind not in _OPEN}
        self._readings: dict[Hashable, _Reading] = {}

    def of(self, batch: Any) -> Given:
        """(positional, keyword) arguments that a batch stands for, whether they fit or not."""
        if not isinstance(batch, (Mapping, tuple, list)):
            return (batch,), {}
        key = _structure(batch)
        if key not in self._readings:
            self._readings[key] = self._read(batch)
        return self._readings[key].arguments(batch)

    def check(self, batch: Any, index: int, rule: str) -> Given:
        """The same; TypeError with ``rule``, the parameters and what came where they do not fit."""
        try:
            args, kwargs = self.of(batch)
            if self.signature is not None:
                self.signature.bind(*args, **kwargs)
        except _Misfit as error:
            raise TypeError(f"{rule}: batch {index}: {error}") from error.__cause__
        except TypeError as error:
            raise TypeError(f"{rule}: batch {index}: {self._misfit(batch, error)}") from error
        return args, kwargs

    def _misfit(self, batch: Any, why: object) -> _Misfit:
        parameters = [] if self.signature is None else self.signature.parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        taken = ", ".join(map(str, bare)) or "nothing"
        return _Misfit(f"forward takes ({taken}), got {describe(batch)}: {why}")

    def _read(self, batch: Any) -> _Reading:
        reading = self._read_one(batch)
        note = self._note(batch, reading)
        if note:
            self.notes.append(f"{self._name}: {note}")
        return reading

    def _read_one(self, batch: Any) -> _Reading:
        if isinstance(batch, Mapping):
            return self._read_mapping(batch)
        return self._read_sequence(batch)

    def _holds_arguments(self, batch: tuple[Any, ...] | list[Any]) -> bool:
        """Whether all arguments are in the first value, as in (arguments by name, label)."""
        first = batch[0] if len(batch) else None
        if isinstance(first, Mapping):
            return len(first) > 0 and self._names.union(_LABELS).issuperset(first)
        required = [slot for slot in self._slots if slot.default is slot.empty]
        alone = len(batch) > 1 and len(batch) - 1 == _labels(batch)
        return alone and isinstance(first, (tuple, list)) and 1 < len(required) <= len(first)

    def _read_mapping(self, batch: Mapping[Any, Any]) -> _Reading:
        unknown = {key for key in batch if key not in self._names}
        required = {slot.name for slot in self._slots if slot.default is slot.empty}
        if unknown and len(unknown) == len(batch) and self._slots and len(required) < 2:
            by_name = self._any_key and not required
            reading = _Reading(whole=not by_name)
            error = self._failure(batch, reading)
            if error is not None:
                how = "with these names" if by_name else f"with all of it as {self._slots[0].name}"
                raise self._misfit(batch, f"{how}, {type(error).__name__}: {error}") from error
            return reading
        if not self._any_key and unknown <= _LABELS:
            return _Reading(left_out=frozenset(unknown))
        return _Reading()

    def _read_sequence(self, batch: tuple[Any, ...] | list[Any]) -> _Reading:
        size, labels = len(batch), _labels(batch)
        if self._holds_arguments(batch):
            return _Reading(1, first=self._read_one(batch[0]))
        if self._any_value:
            return self._first([_Reading(size), _Reading(size - labels)][: 1 + bool(labels)], batch)
        count = min(size, len(self._slots))
        while count > 1 and self._refuses_label(count - 1, batch):
            count -= 1
        if len(self._slots) != 1 or size == 1 or self._slots[0].annotation in _TENSOR:
            return _Reading(count)
        wholes = [_Reading(size, whole=True)]
        if labels and size - labels > 1:
            wholes.append(_Reading(size - labels, whole=True))
        return self._first([*wholes, _Reading(count)], batch)

    def _refuses_label(self, index: int, batch: tuple[Any, ...] | list[Any]) -> bool:
        slot = self._slots[index]
        optional = slot.default is not slot.empty and slot.name not in _LABELS
        return optional and _is_label(batch[index], _sizes(batch[0]))

    def _first(self, readings: list[_Reading], batch: tuple[Any, ...] | list[Any]) -> _Reading:
        """The first one with which the model runs; the last is not tried."""
        for reading in readings[:-1]:
            error = self._failure(batch, reading)
            if error is None:
                return reading
            # The parameter is a tuple, of another length: the first value must not pass for it.
            unpacked = isinstance(error, ValueError) and "values to unpack" in str(error)
            last = reading is readings[-2]
            if last and reading.whole and unpacked and len(batch) - _labels(batch) > 1:
                raise self._misfit(batch, error) from error
        return readings[-1]

    def _failure(self, batch: Any, reading: _Reading) -> Exception | None:
        def copied(tensor: Tensor) -> Tensor:
            return tensor.to(self._device, copy=True)

        args, kwargs = pytree.tree_map_only(Tensor, copied, reading.arguments(batch))
        try:
            with evaluation(self._model):
                self._model(*args, **kwargs)
        except Exception as error:  # whatever a model says of arguments that are not its own
            return error
        return None

    def _note(self, batch: Any, reading: _Reading) -> str:
        """What a report says of a reading; "" where there was no other."""
        if reading.first is not None:
            left = [
                f"value {i} ({describe_value(v)}): left out" for i, v in enumerate(batch[1:], 2)
            ]
            said = f"value 1, {describe(batch[0])}, holds all arguments"
            return "; ".join(filter(None, (said, self._note(batch[0], reading.first), *left)))
        if not isinstance(batch, Mapping):
            return self._note_on_sequence(batch, reading)
        if reading.whole:
            return f"{describe(batch)} -> {self._slots[0].name}, as one argument"
        left = [f"{key} ({describe_value(batch[key])})" for key in batch if key in reading.left_out]
        return f"{', '.join(left)}: taken as label, left out" if left else ""

    def _note_on_sequence(self, batch: tuple[Any, ...] | list[Any], reading: _Reading) -> str:
        values = [f"value {i} ({describe_value(value)})" for i, value in enumerate(batch, 1)]
        given = values[: reading.count]
        names = [slot.name for slot in self._slots] + ["*args"] * len(values)
        if reading.whole:
            said = [f"{', '.join(given)} -> {names[0]}, as one argument"]
        else:
            said = [", ".join(f"{a} -> {b}" for a, b in zip(given, names, strict=False))]
        for index in range(reading.count, len(batch)):
            label = _is_label(batch[index], _sizes(batch[0]))
            why = "taken as label" if label else "no parameter is left for it"
            said.append(f"{values[index]}: {why}, left out")
        chosen = any(s.default is not s.empty for s in self._slots[1 : reading.count])
        chosen |= self._any_value and _labels(batch) > 0
        return "; ".join(said) if chosen or reading.whole or len(said) > 1 else ""


class _Misfit(TypeError):
    """A batch that a model takes in no way."""


def _signature(model: nn.Module) -> inspect.Signature | None:
    """Of ``forward``, or of that which a wrapper hands everything on to; None where it has none."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return None
    if any(parameter.kind not in _OPEN for parameter in signature.parameters.values()):
        return signature
    parallel = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    wrapped = getattr(model, "module" if parallel else "_orig_mod", None)  # or torch.compile's
    return _signature(wrapped) if isinstance(wrapped, nn.Module) else signature


def _structure(batch: Any) -> Hashable:
    """Equal for batches that are read in the same way."""
    if isinstance(batch, Mapping):
        return frozenset(batch)
    kinds: list[Hashable] = []
    for value in batch:
        if isinstance(value, Tensor):
            kinds.append((value.is_floating_point(), value.dim()))
        elif isinstance(value, Mapping):
            kinds.append(frozenset(value))
        else:
            inner = len(value) if isinstance(value, (tuple, list)) else 0
            kinds.append((type(value), inner))
    return (tuple(kinds), _labels(batch))


def _labels(batch: tuple[Any, ...] | list[Any]) -> int:
    """How many values at the end, but never the first, are labels."""
    sizes = _sizes(batch[0]) if len(batch) else set()
    count = 0
    while count < len(batch) - 1 and _is_label(batch[-1 - count], sizes):
        count += 1
    return count


def _is_label(value: Any, sizes: set[int]) -> bool:
    """Whether it is one integer a sample, or one string."""
    if isinstance(value, Tensor):
        real = value.is_floating_point() or value.is_complex() or value.dtype == torch.bool
        return value.dim() == 1 and not real and len(value) in sizes
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iuU" and len(value) in sizes
    if isinstance(value, (tuple, list)) and len(value) in sizes:
        return all(isinstance(v, (int, str)) and not isinstance(v, bool) for v in value)
    return False


def _sizes(first: Any) -> set[int]:
    """How many samples a batch may have, by its first value."""
    counts = {len(first)} if isinstance(first, (tuple, list)) else set()
    for leaf in pytree.tree_leaves(first):
        if isinstance(leaf, (Tensor, np.ndarray)):
            return counts | ({len(leaf)} if leaf.ndim else set())
    return counts


def arguments(model: nn.Module, batch: Any, name: str) -> Given:
    """One batch as :meth:`Arguments.of` reads it; its notes go to the log."""
    reader = Arguments(model, name)
    try:
        given = reader.of(batch)
    except _Misfit as error:
        raise TypeError(f"{name} must fit the model's forward: {error}") from error.__cause__
    for note in reader.notes:
        _logger.info("%s", note)
    return given
