"""What is done to a model before its layers are fitted, all of it undone if the fit fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from adaround_ext.activations.hooks import attach, detach, full_precision_activations, observing
from adaround_ext.activations.placement import Place, place
from adaround_ext.activations.quantizer import ActivationConfig
from adaround_ext.config import check_flag
from adaround_ext.layers.matrix import SUPPORTED, MatrixLayer, matrix_layer
from adaround_ext.replay.calibration import Calibration, unpadded
from adaround_ext.replay.census import first_marks
from adaround_ext.replay.checksums import Marks
from adaround_ext.tracing.dataflow import Dataflow
from adaround_ext.tracing.padding import PaddingMasks
from adaround_ext.tracing.trace import Trace, tensors, trace
from adaround_ext.transforms.batch_norm import fold_batch_norm_
from adaround_ext.transforms.equalize import equalize_
from adaround_ext.transforms.verified import HALF_TOLERANCE, TOLERANCE

BatchNorm = Literal["fold", "keep"]


_FORWARDS = {kind.forward for kind in SUPPORTED}
_CONVOLUTIONS = {
    nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward
}  # fmt: skip
_SAMPLES = 16  # of a layer's input, or one of a convolution's
_REASON = "its output is not that of its weight and bias alone, as it was called"


@dataclass
class Prepared:
    """The model's last trace, and what was done to it."""

    trace: Trace
    marks: Marks  # of that run
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def of(model: nn.Module, run: Callable[[], object]) -> Prepared:
        """Watches a run on the first batch."""
        with first_marks(model, 0) as marks:
            return Prepared(trace(model, run), marks)

    def again(self, model: nn.Module, run: Callable[[], object]) -> None:
        """Watches another run, of the model as it is now."""
        later = Prepared.of(model, run)
        self.trace, self.marks = later.trace, later.marks


def quantize_activations_(
    model: nn.Module,
    trace: Trace,
    layers: Sequence[nn.Module],
    data: Calibration,
    config: ActivationConfig,
    undo: ExitStack,
    flow: Dataflow,
    masks: PaddingMasks,
) -> list[str]:
    """Attaches quantizers of activations, their ranges from one pass over the data; notes.

    ``undo`` gets what takes them out again.
    """
    placement = place(model, trace, layers)
    places = placement.places
    quantizers = attach(places, model, config)
    undo.callback(detach, model)
    padding = {item.name: masks.name_of(_positions(model, trace, flow, item)) for item in places}
    batch = 0

    def counted(name: str, x: Tensor) -> Tensor:
        return unpadded(x, data.mask(batch, padding[name]))

    with observing(quantizers, counted) as observation:
        for batch in range(data.batches):
            data.run(batch)
    observation.set_ranges()
    note = f"{len(quantizers)} quantizers of activations at {config.bits} bits"
    return [note, *placement.notes]


def _positions(model: nn.Module, trace: Trace, flow: Dataflow, place: Place) -> frozenset[str]:
    """The model's arguments whose positions the values of a place have."""
    modules = dict(model.named_modules())
    values = [
        value
        for site in place.sites
        for call in trace.calls_of(modules[site.module])
        for index, value in enumerate(call.inputs if site.kind == "input" else call.outputs)
        if index in site.tensors
    ]
    return frozenset().union(*(flow.inputs.get(v.storage, frozenset()) for v in values))


def unlike_layers(
    model: nn.Module, trace: Trace, run: Callable[[], object]
) -> dict[nn.Module, str]:
    """Linear and convolution layers that do more than their class, and a reason.

    These are subclasses with another forward (standardized weights, adapters), layers with hooks on
    their outputs, transposed convolutions of a size given by the call. They are run: where the
    output is that of weight and bias nevertheless, as with hooks that only look, they are fine.
    """
    suspects: dict[nn.Module, MatrixLayer] = {}
    for module in dict.fromkeys(call.module for call in trace.calls):
        own = "forward" in module.__dict__ or bool(module._forward_hooks)
        if isinstance(module, SUPPORTED) and (own or not is_plain(module)):
            with suppress(TypeError, ValueError):  # those are skipped anyway
                suspects[module] = matrix_layer(module)
    found: dict[nn.Module, str] = {}
    given: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        first = next(tensors((args, kwargs)), None)
        if first is not None:
            given[module] = first.clone()

    def after(module: nn.Module, args: object, output: object) -> None:
        x = given.pop(module, None)
        if x is not None and not _computes(suspects[module], x, output):
            found[module] = _REASON

    with ExitStack() as hooks:
        # Quantizers of activations are hooks too, of which a layer's fit knows.
        hooks.enter_context(full_precision_activations(model))
        for module in suspects:
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(after))
        if suspects:
            run()
    return found


def is_plain(module: nn.Module) -> bool:
    """Whether a layer's class computes what torch's own does, and nothing beside it."""
    kind = type(module)
    if kind.forward not in _FORWARDS or isinstance(module, _ConvTransposeNd):
        return False
    return not isinstance(module, _ConvNd) or getattr(kind, "_conv_forward", None) in _CONVOLUTIONS


def _computes(layer: MatrixLayer, x: Tensor, output: object) -> bool:
    """Whether an output is weight times input plus bias, by some of it."""
    try:
        assert isinstance(output, Tensor)
        samples, wanted = layer.samples(x), layer.output_samples(output)
        count = _SAMPLES if isinstance(layer.layer, nn.Linear) else 1
        pieces = layer.patches(samples[:count].double(), wanted[:count].double())
        if len(samples) != len(wanted):
            return False
        weight = layer.weight_matrix().double().view(layer.groups, -1, layer.cols)
        bias = 0.0 if layer.bias is None else layer.bias.double().view(layer.groups, -1, 1)
        half = min(output.dtype.itemsize, layer.weight.dtype.itemsize) < 4
        for patches, y in pieces:
            assert y is not None
            error = weight @ patches + bias - y
            if error.norm() > (HALF_TOLERANCE if half else TOLERANCE) * y.norm():
                return False
    except (AssertionError, ValueError):  # of another shape
        return False
    return True


def prepare_(
    model: nn.Module,
    run: Callable[[], object],
    undo: ExitStack,
    batch_norm: BatchNorm,
    equalize: bool,
) -> Prepared:
    """Traces the model on one batch; folds batch norms and equalizes layers where that is asked.

    ``undo`` gets what takes the changes back. Batch norms and pairs that cannot be folded or
    equalized are noted with the reason. ValueError that names ``equalize``.
    """
    check_flag("equalize", equalize)
    prepared = Prepared.of(model, run)
    if batch_norm == "fold":
        folded = fold_batch_norm_(model, prepared.trace, run)
        undo.callback(folded.undo)
        if folded.pairs:
            prepared.notes.append(f"{len(folded.pairs)} batch norms folded into their layers")
            prepared.again(model, run)
        prepared.notes += [f"{name} not folded: {why}" for name, why in folded.skipped.items()]
    if equalize:
        equalized = equalize_(model, prepared.trace, run)
        undo.callback(equalized.undo)
        pairs = ", ".join(f"{a} -> {b}" for a, b in equalized.pairs)
        prepared.notes.append(f"equalized: {pairs or 'no layers'}")
        reasons = Counter(equalized.skipped.values())
        prepared.notes += [f"{count} layers not equalized: {why}" for why, count in reasons.items()]
        if equalized.pairs:
            prepared.again(model, run)
    return prepared
