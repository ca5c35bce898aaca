"""AdaRound for a whole model, in one call."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from adaround_ext.activations.hooks import full_precision_activations
from adaround_ext.activations.hooks import quantizers as quantizers_of
from adaround_ext.activations.quantizer import ActivationConfig
from adaround_ext.checks import check_devices, check_module, device_here, refuse_inference, some
from adaround_ext.config import AdaRoundConfig
from adaround_ext.distributed import Ranks, Reduction
from adaround_ext.export.goal.goal import Goal
from adaround_ext.model.apply import apply_, uninterrupted
from adaround_ext.model.checkpoint import Checkpoint, traced_batches
from adaround_ext.model.fitter import Fitter, wanted_by
from adaround_ext.model.mapped import Offload
from adaround_ext.model.prepare import prepare_, quantize_activations_
from adaround_ext.model.run_record import (
    model_digest,
    plain_config,
    plain_name,
    run_fingerprint,
    versions,
)
from adaround_ext.model.units import Unit, parallel_segments, sequential_segments
from adaround_ext.model.workspace import Choices, Traces, analyse
from adaround_ext.planning.overrides import Overrides, check_overrides
from adaround_ext.planning.plan import FilterFn, Plan
from adaround_ext.process.memory import device_memory, free_device_memory, host_memory
from adaround_ext.process.omp_waits import short_waits_when_busy
from adaround_ext.process.turns import one_caller
from adaround_ext.replay.cache import MEMORY_BUDGET, ActivationCache
from adaround_ext.replay.calibration import Calibration, ForwardFn, single_device
from adaround_ext.replay.census import Census, NewCalls
from adaround_ext.replay.onload import Onloader
from adaround_ext.replay.replay import Replay
from adaround_ext.report.coverage import few_quantized
from adaround_ext.report.model import LayerEntry, ModelReport
from adaround_ext.tracing.blocks import BlockCall, Blocks
from adaround_ext.tracing.evaluation import evaluation
from adaround_ext.tracing.padding import PaddingMask
from adaround_ext.transforms.batch_norm import BatchNorm

_logger = logging.getLogger("adaround_ext")
_MODES = ("sequential", "parallel")
_BATCH_NORM = ("fold", "keep")
_SHARE = 4  # of a GPU's free memory one in so many bytes is for what is kept


@one_caller()  # seeds and precisions are the process's
def quantize_(
    model: nn.Module,
    calibration: Iterable[Any],
    config: AdaRoundConfig | None = None,
    *,
    mode: Literal["sequential", "parallel"] = "sequential",
    overrides: Overrides | None = None,
    filter_fn: FilterFn | None = None,
    forward_fn: ForwardFn | None = None,
    blocks: Blocks = None,
    batch_norm: BatchNorm = "fold",
    equalize: bool = False,
    activations: ActivationConfig | None = None,
    activation_aware: bool = False,
    padding_mask: PaddingMask = "attention_mask",
    device: torch.device | str | None = None,
    memory_budget: int = MEMORY_BUDGET,
    device_budget: int | None = None,
    cache_dir: str | None = None,
    cache_dtype: torch.dtype | None = None,
    checkpoint_dir: str | None = None,
    offload_dir: str | None = None,
    process_group: dist.ProcessGroup | None = None,
    reduction: Reduction = "ordered",
    export_for: str | None = None,
    progress: bool = True,
    **settings: Any,
) -> ModelReport:
    """Quantizes the weights of all Linear and convolution layers of a model, in place.

    Each layer minimises E || f(y) - f(W_q x + b) ||^2 (AdaRound, eq. (25)), as
    :func:`adaround_ext.optimize_layer` does, in the order in which the model runs them.

    calibration: an iterable of batches of whatever the model takes: tensors, tuples (positional
    arguments), mappings (keyword arguments; a tokenizer's output); with ``forward_fn(model,
    batch)`` anything. Labels behind the inputs are left out, as the report then says. One tensor or
    mapping of all samples is cut into batches of 32. It is iterated once: generators and shuffling
    loaders are fine.
    config and settings: of every layer, see :class:`AdaRoundConfig`; as ``bits=4``.

    mode: "sequential": x are inputs from the model with all layers before quantized, y what the
    full-precision model gives there (the paper's asymmetric reconstruction). "parallel": x and y
    are the full-precision model's.
    overrides: other settings for some layers, or "skip": {"head": {"bits": 8}, nn.Conv2d: {...},
    "*.mlp.*": "skip"}. Keys are names or patterns of names (of a layer, or a module with layers in
    it), "<first>" and "<last>" in execution order, or module types; of several that match the
    later settings win. filter_fn(module, name): False leaves a layer alone.
    blocks: names, patterns or types of the modules that are carried forward: once its layers are
    done a block does not run again, its outputs are kept. None finds them. Without blocks every
    layer is one, and what lies between layers runs again for every layer.
    Where kept outputs would change what a model does (it counts calls, or takes another way for
    some batches), all of it runs again for every layer, and a note in the report says so.
    batch_norm: "fold" puts batch norms that follow a layer into it first, "keep" leaves them.
    equalize: cross-layer equalization (Nagel et al. 2019) first, for per-tensor grids.
    activations: quantizes activations too (simulated): see :class:`ActivationConfig`. Their ranges
    come from one pass of the full-precision model; in sequential mode the weights are fitted to
    inputs that are quantized so. A model that has quantizers already is refused:
    ``adaround_ext.activations.detach(model)`` takes them out. With None they stay as they are.
    activation_aware: puts the ReLU, ReLU6, GELU or SiLU that directly follows a layer into its
    loss: then minibatches instead of the Gram matrix, and the layer's inputs kept (at
    ``cache_dir`` if that is given, else in memory).
    padding_mask: name of the argument [batch, tokens] that is 0 at padding, or a function from a
    batch to such a tensor; padding is left out of the statistics. None: all counts.

    device: where the fitting runs; None: where the model is. Of a model on the CPU only what is in
    no block and the blocks at hand are brought to another device, so it may be larger than that.
    memory_budget: bytes that kept batches and activations may take in memory; what does not fit
    goes to files under ``cache_dir`` (None: the system's folder for temporary files). Statistics of
    a layer (about 8 columns^2 bytes) come on top; in parallel mode they are what is budgeted.
    device_budget: the same of a GPU's memory, where what comes from there is kept first; None: a
    quarter of what is free. Without a GPU it has no effect.
    cache_dtype: torch.bfloat16 or float16 to keep activations in half the memory, rounded.
    checkpoint_dir: a folder for every layer's result. A run that was killed goes on from there and
    ends with the same codes; one with another model, data or configuration is refused.
    offload_dir: a folder on whose disk results are kept, in mapped files that are gone with the
    model; then a model whose weights are mapped (:func:`map_weights_`) may be larger than memory.
    process_group: of torch.distributed, as ``dist.group.WORLD`` under torchrun. Every rank makes
    the same call, with the same model and calibration, runs its share of the batches, solves its
    share of the rows or layers, and ends with the same result.
    reduction: "ordered": the codes are those of one process with as many threads, bit by bit.
    "fast": statistics are summed by one all-reduce, with less memory (a matrix a layer and rank
    instead of up to 16 over all ranks) and other last bits for other numbers of ranks.
    export_for: "onnxruntime", "openvino", "tensorrt" (these make a bfloat16 model float32), "vllm",
    "transformers" or "gguf": grid, groups, dtype of scales and layers left alone are chosen for it,
    where settings and overrides leave them open, and what cannot end there is refused, at once.
    progress: show a bar.

    The model is run in eval mode without gradients. It changes only at the very end, so after an
    error it is as it was; parameters keep their identity, and tied weights stay tied. Each
    quantized module gets ``quantized_weight`` (:class:`QuantizedWeight`), the codes for export.
    Returns a :class:`ModelReport`: every layer in numbers, and what was skipped, with the reason.
    Raises TypeError and ValueError that name the argument or layer, the rule and what came;
    ImportError where what writes the format of ``export_for`` is missing.
    """
    _check(model, mode, batch_norm, activations)
    goal = Goal(export_for, model)
    config = goal.config(config, settings, quantize_)
    goal.check_activations(activations)
    batch_norm = goal.batch_norm(batch_norm)
    _check_budgets(memory_budget, device_budget)
    check_overrides(overrides, config, model)
    attached = quantizers_of(model)
    ranks = Ranks(process_group, reduction)
    started = time.perf_counter()
    host_before, _ = host_memory()
    with ExitStack() as stack:
        stack.enter_context(short_waits_when_busy())
        stack.enter_context(goal.widened())
        home = single_device(model)
        device = home if device is None else device_here(device)
        check_devices(model, device)
        free = free_device_memory(device)
        if device_budget is None or free == 0:
            device_budget = free // _SHARE
        # One for all ranks: in parallel mode it decides on the passes.
        device_budget = min(ranks.gather(device_budget, "the start"))
        budgets = memory_budget, cache_dir, device_budget, cache_dtype
        cache = stack.enter_context(ActivationCache(*budgets))
        stack.enter_context(evaluation(model, config.seed, device))
        moves = device != home
        offload = None if offload_dir is None else Offload(offload_dir)
        if offload is not None and (home is None or home.type != "cpu"):
            raise ValueError(f"offload_dir needs a model on the CPU, got one on {home}")
        if moves and home is None:
            raise ValueError(f"device must be None for a model on several devices, got {device}")
        told = checkpoint_dir is not None or ranks.size > 1
        with ranks.together("the reading of calibration"):
            batches = goal.batches(calibration)
            data = Calibration(model, batches, forward_fn, padding_mask, cache, home, told)
        laps = {"calibration": time.perf_counter() - started}
        undo = stack.enter_context(ExitStack())
        digest = model_digest(model) if told else ""
        wanted = goal.overrides(overrides)
        choices = Choices(config, wanted, filter_fn, padding_mask, activation_aware, blocks, goal)
        with ranks.together("tracing"), full_precision_activations(model):
            run = partial(data.run, 0, config.seed)
            prepared = prepare_(model, run, undo, batch_norm, equalize)
            traces = Traces(model, data, {0: prepared.trace})
        sequential = mode == "sequential"
        room = max(memory_budget, device_budget)  # for statistics, which are where the layer is
        parts: dict[str, object] = {}
        if told:
            parts |= {"mode": mode, "batch_norm": batch_norm, "equalize": equalize}
            parts |= {"cache_dtype": str(cache_dtype)}
            names = {"forward_fn": forward_fn, "padding_mask": padding_mask}
            parts |= {name: plain_name(value) for name, value in names.items()}
            parts |= {"activations": None if activations is None else activations.to_dict()}
            parts |= {"reduction": ranks.summation}
        new = ranks.from_first(
            "the reading of checkpoint_dir", lambda: traced_batches(checkpoint_dir, data.batches)
        )
        data.share(ranks)
        while True:
            quantizers = undo.enter_context(ExitStack())
            with ranks.together("tracing"), full_precision_activations(model):
                traces.add(new)
                known = analyse(model, traces, choices)
                calls, plan, units = known.calls, known.plan, known.units
                goal.check(plan.targets, None if forward_fn else partial(data.run, 0))
                switch, common, notes = None, _common(calls, plan), list[str]()
                if activations is not None:
                    layers = [target.matrix.layer for target in plan.targets]
                    notes = quantize_activations_(
                        model, known.trace, layers, data, activations, quantizers, known.flow,
                        known.masks,
                    )  # fmt: skip
                elif attached:
                    notes = [f"{len(attached)} quantizers of activations stay as they were"]
                if activations is not None or attached:
                    switch, common = partial(full_precision_activations, model), 0
            if sequential:
                segments = sequential_segments(units)
            else:
                segments = parallel_segments(units, room)
            if told:
                parts |= run_fingerprint(digest, data, plan, calls)
                parts |= {"traced": list(traces.by_batch)}
            ranks.same(parts | {"memory_budget": memory_budget})
            checkpoint = None
            with ranks.together("the opening of checkpoint_dir"):
                if checkpoint_dir is not None and ranks.first:
                    checkpoint = Checkpoint(checkpoint_dir, parts)
            modules = [call.call.module for call in calls]
            onloader = Onloader(model, modules, device if moves else None)
            every = [wanted_by(unit) for unit in units] if sequential else []
            census = Census(model, known.trace, cache.rounds)
            replay = Replay(
                model, data, calls, cache, onloader, common, config.seed, census, every,
                None if moves else prepared.marks,
            )  # fmt: skip
            laps["tracing"] = time.perf_counter() - started - laps["calibration"]
            fitter = Fitter(
                replay, data, segments, sequential, checkpoint, switch, cache_dir,
                home if moves else None, progress, ranks, offload,
            )  # fmt: skip
            try:
                with onloader:
                    data.device = device
                    fitter.run()
                break
            except NewCalls as found:
                new, data.device = found.batches, home
                quantizers.close()
                replay.give_up("")
                if checkpoint is not None:
                    checkpoint.discard()
        prepared.notes += notes
        passes = max(ranks.gather(replay.passes, "the end"))  # each has its own room
        with uninterrupted():
            for target, fitted in fitter.fitted.items():
                apply_(target, fitted.weight, fitted.bias, fitted.dequantized)
            undo.pop_all()  # from here on the changes stay
    laps |= fitter.seconds | {"total": time.perf_counter() - started}
    memory = {"host_before": host_before, "host_peak": host_memory()[1]}
    memory |= {f"cache_{place}": size for place, size in cache.peak.items()}
    if device is not None and device.type == "cuda":
        memory["device_peak"] = device_memory(device)
    else:
        del memory["cache_device"]
    weights = [target.matrix.layer.get_parameter("weight") for target in fitter.fitted]
    skipped = plan.skipped | fitter.skipped
    few = few_quantized(model, weights, skipped)
    for note in few if ranks.first else ():
        _logger.warning("%s", note)
    return ModelReport(
        model=type(model).__name__,
        mode=mode,
        layers=_entries(units, calls, fitter),
        skipped=skipped,
        blocks=tuple(dict.fromkeys(call.name for call in calls if len(call.layers) > 1)),
        parameters=sum(p.numel() for p in model.parameters()),
        passes=passes + (activations is not None),
        batches=data.batches,
        samples=data.samples,
        notes=(*few, *goal.notes, *data.notes, *prepared.notes, *plan.notes, *fitter.notes),
        seconds=laps,
        memory=memory,
        versions=versions(),
        seed=config.seed,
    )


def _check(model: nn.Module, mode: object, batch_norm: object, activations: object) -> None:
    check_module(model)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"model must have been run once, got {name} without a shape")
    refuse_inference(model.named_parameters())
    choices = {"mode": (mode, _MODES), "batch_norm": (batch_norm, _BATCH_NORM)}
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    if activations is not None and not isinstance(activations, ActivationConfig):
        came = type(activations).__name__
        raise TypeError(f"activations must be an ActivationConfig or None, got {came}")
    attached = list(quantizers_of(model))
    if activations is not None and attached:
        raise ValueError(
            "activations must be None for a model that has quantizers of activations, got "
            f"{len(attached)} of them ({some(attached)}): adaround_ext.activations.detach(model) "
            "takes them out; with activations=None they stay as they are"
        )


def _check_budgets(memory: object, device: object) -> None:
    for name, value in (
        ("memory_budget", memory),
        ("device_budget", 0 if device is None else device),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{name} must be a number of bytes, got {value!r}")


def _common(calls: list[BlockCall], plan: Plan) -> int:
    """How many leading block calls run before any layer that is quantized."""
    modules = {module for target in plan.targets for module in target.modules}
    for index, call in enumerate(calls):
        if call.layers & modules:
            return index
    return len(calls)


def _entries(units: list[Unit], calls: list[BlockCall], fitter: Fitter) -> tuple[LayerEntry, ...]:
    block = {m: call.name for call in calls for m in call.layers if m is not call.call.module}
    entries = []
    for unit in units:
        for target in unit.targets:
            if target not in fitter.fitted:
                continue
            layer = target.matrix.layer
            entries.append(
                LayerEntry(
                    name=target.name,
                    kind=type(layer).__name__,
                    shape=tuple(target.matrix.weight.shape),
                    calls=len(target.calls),
                    block=block.get(layer),
                    shared_inputs=tuple(t.name for t in unit.targets if t is not target),
                    tied=tuple(name for name, _ in target.tied),
                    config=plain_config(target),
                    report=fitter.fitted[target].report,
                    rows=target.matrix.rows,
                )
            )
    return tuple(entries)
