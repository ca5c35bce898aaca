"""Verified changes of a model, which keep its function: made, run, and taken back where not."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from adaround_ext.layers.matrix import MatrixLayer, matrix_layer
from adaround_ext.linalg.precision import full_precision
from adaround_ext.tensors import HALF_TOLERANCE, TOLERANCE, extent, tensors
from adaround_ext.tracing.trace import ModuleCall, OperatorCall, Trace, Value

Change = TypeVar("Change")


class Journal:
    """Writes things down before they are changed, and takes the changes back, the last one first.

    Parameters keep their identity and get their exact values back.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def write_(self, tensor: Tensor, values: Tensor) -> None:
        """New values for a tensor, rounded to its dtype."""
        before, version = tensor.detach().clone(), tensor._version

        def undo() -> None:
            tensor.detach().copy_(before)
            # The same bits as ever: a backward that waits for them may go on.
            torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))

        tensor.detach().copy_(values)
        self._steps.append(undo)

    def put(self, mapping: dict[str, Any], key: str, value: object) -> None:
        """Another object under a key that exists."""
        before = mapping[key]
        self._steps.append(lambda: mapping.update({key: before}))
        mapping[key] = value

    def undo(self, length: int = 0) -> None:
        """Takes back all but the first ``length`` changes; harmless where there are none."""
        while len(self._steps) > length:
            self._steps.pop()()


@dataclass(frozen=True)
class Changed:
    """Which pairs of modules were changed, by name, and why others were not."""

    pairs: tuple[tuple[str, str], ...]
    skipped: dict[str, str]
    _journal: Journal = field(repr=False, compare=False)

    def undo(self) -> None:
        """The model exactly as it was: the same modules and parameters, with the same bits.

        Later changes of the same layers are lost, so those are to be undone before.
        """
        self._journal.undo()


class TracedLayers:
    """The Linear, Conv and ConvTranspose layers that ran, and what keeps one from being changed."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.trace = trace
        self.names = {module: name for name, module in model.named_modules()}
        self._layers: dict[nn.Module, MatrixLayer | str] = {}
        # Of layers inside one another the innermost, which began last, produced the value.
        self.produced_by: dict[Value, ModuleCall] = {}
        self.read_by: dict[Value, ModuleCall] = {}
        for call in trace.calls:
            if call.module in self.names and self._is_layer(call.module):
                if len(call.outputs) == 1:
                    self.produced_by[call.outputs[0]] = call
                if len(call.inputs) == 1:
                    self.read_by[call.inputs[0]] = call
        self._times = [operator.time for operator in trace.operators]
        self._memory: dict[torch.device, list[tuple[int, int, nn.Module, str]]] = defaultdict(list)
        for module in self.names:
            for kind in (module._parameters, module._buffers):
                for key, tensor in kind.items():
                    if tensor is not None and tensor.numel() and not tensor.is_meta:
                        place = (*extent(tensor), module, key)
                        self._memory[tensor.device].append(place)

    def __getitem__(self, layer: nn.Module) -> MatrixLayer:
        """A layer without an obstacle as a matrix product."""
        matrix = self._layers[layer]
        assert isinstance(matrix, MatrixLayer)
        return matrix

    def __iter__(self) -> Iterator[nn.Module]:
        """The layers, in the order in which they first ran."""
        return iter(self._layers)

    def _is_layer(self, module: nn.Module) -> bool:
        if module not in self._layers:
            try:
                self._layers[module] = matrix_layer(module)
            except TypeError:
                return False
            except ValueError as error:
                self._layers[module] = str(error)
        return True

    def readers(self, value: Value, time: int) -> list[OperatorCall]:
        """The operators that take this value after that time."""
        return [operator for operator in self.trace.readers(value) if operator.time > time]

    def obstacle(self, layer: nn.Module) -> str | None:
        """Why this layer's weight and bias cannot be changed by themselves; None where they can."""
        name, seen = self.names[layer], self._layers[layer]
        if isinstance(seen, str):
            return f"{name}: {seen}"
        if "bias" not in layer._parameters:
            return f"{name} has a bias that is no parameter of its own"
        for key in ("weight", "bias"):
            tensor = layer._parameters[key]
            if tensor is None or not tensor.numel():
                continue
            begin, end = extent(tensor)
            for other_begin, other_end, module, other in self._memory[tensor.device]:
                itself = module is layer and other == key
                if not itself and begin < other_end and other_begin < end:
                    holder = ".".join(filter(None, (self.names[module], other)))
                    return f"{name} shares its {key} with {holder}"
        if self._read_outside(layer):
            return f"{name} has a weight or bias that is also read outside of it"
        return None

    def _read_outside(self, layer: nn.Module) -> bool:
        """Whether operators elsewhere take what the layer's own take beside its input."""
        calls = self.trace.calls_of(layer)
        spans = [
            (bisect_right(self._times, call.begin), bisect_left(self._times, call.end))
            for call in calls
        ]
        inside = [op for begin, end in spans for op in self.trace.operators[begin:end]]
        weights = {value for op in inside for value in op.inputs}
        weights -= {value for op in inside for value in op.outputs}
        weights -= {value for call in calls for value in call.inputs}
        times = {op.time for op in inside}
        return any(op.time not in times for value in weights for op in self.trace.readers(value))


def channel_dim(layer: nn.Module, value: Value) -> int:
    """The dimension of channels in an input or output of a Linear, Conv or ConvTranspose layer."""
    return len(value.shape) - 1 - len(getattr(layer, "kernel_size", ()))


def make_verified(
    model: nn.Module,
    run: Callable[[], object],
    changes: Sequence[Change],
    make: Callable[[Journal, Sequence[Change]], None],
) -> tuple[Journal, list[Change], dict[Change, str]]:
    """Makes those changes that keep all outputs of ``run``; the others are taken back.

    Kept are those with ||after - before|| <= tolerance ||before|| for each output tensor, TOLERANCE
    or, with weights or outputs of 16 bits, HALF_TOLERANCE; entries that were not finite must be the
    same.
    All changes are made together first, and halved where that fails.

    Returns the journal, the changes made, and for each of the others the reason. Where an error
    leaves this function, no change is left.
    """
    journal, accepted, reasons = Journal(), list[Change](), dict[Change, str]()
    if not changes:
        return journal, accepted, reasons
    before = _outputs(model, run)
    if not before:
        return journal, accepted, dict.fromkeys(changes, "the model returned no tensor to compare")
    half = any(map(_is_half, (*model.parameters(), *before)))
    tolerance = HALF_TOLERANCE if half else TOLERANCE

    def problem() -> str | None:
        try:
            after = _outputs(model, run)
        except Exception as error:  # the model looked at what was changed
            return f"the model fails with it: {type(error).__name__}: {error}"
        return _difference(before, after, tolerance)

    waiting = [changes]
    try:
        while waiting:
            trial = waiting.pop()
            length = len(journal)
            make(journal, trial)
            reason = problem()
            if reason is None:
                accepted += trial
                continue
            journal.undo(length)
            if trial is changes and _difference(before, _outputs(model, run), tolerance):
                reason = "the model's output changes from run to run, so nothing can be verified"
                return journal, accepted, dict.fromkeys(changes, reason)
            if len(trial) == 1:
                reasons[trial[0]] = reason
            else:
                middle = len(trial) // 2
                waiting += [trial[middle:], trial[:middle]]
    except BaseException:
        journal.undo()
        raise
    return journal, accepted, reasons


def _is_half(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4


def _outputs(model: nn.Module, run: Callable[[], object]) -> list[Tensor]:
    """Copies of all tensors that come out of ``run``, from the same random state each time."""
    parameters = [*model.parameters(), torch.empty(0, device="cpu")]
    cuda = list({p.device.index for p in parameters if p.device.type == "cuda"})
    with full_precision(parameters[0].device), torch.no_grad(), torch.random.fork_rng(cuda):
        return [tensor.detach().clone() for tensor in tensors(run())]


def _difference(before: list[Tensor], after: list[Tensor], tolerance: float) -> str | None:
    """What is wrong with the later outputs; None where nothing is."""
    if [(t.shape, t.dtype) for t in before] != [(t.shape, t.dtype) for t in after]:
        return "the model's outputs have other shapes or dtypes with it"
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        wide = torch.complex128 if old.is_complex() else torch.float64
        old, new = old.to(wide), new.to(wide)
        finite = old.isfinite()
        rest = torch.isclose(new[~finite], old[~finite], equal_nan=True)
        if not (new.isfinite().equal(finite) and rest.all()):
            return f"output {index} of the model has other infinities or NaN with it"
        error, size = float((new - old)[finite].norm()), float(old[finite].norm())
        if not error <= tolerance * size:
            return f"output {index} of the model moves by {error:.1e}, its norm is {size:.1e}"
    return None
