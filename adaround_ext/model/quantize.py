"""AdaRound for a whole model, in one call."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parameter import is_lazy

from adaround_ext.activations.hooks import full_precision_activations
from adaround_ext.activations.hooks import quantizers as quantizers_of
from adaround_ext.activations.quantizer import ActivationConfig
from adaround_ext.checks import check_module, refuse_inference, some
from adaround_ext.config import AdaRoundConfig
from adaround_ext.distributed import Ranks, Reduction
from adaround_ext.export.goal.goal import Goal
from adaround_ext.model.apply import apply_, uninterrupted
from adaround_ext.model.checkpoint import (
    Checkpoint,
    plain_name,
    run_fingerprint,
    traced_batches,
)
from adaround_ext.model.fitter import Fit, Fitter
from adaround_ext.model.mapped import Offload
from adaround_ext.model.prepare import quantize_activations_
from adaround_ext.model.summary import summarize
from adaround_ext.model.sweep import targets_of
from adaround_ext.model.units import parallel_passes, sequential_passes
from adaround_ext.model.workspace import Analysis, Workspace, WorkspaceOptions, opened
from adaround_ext.planning.candidates import FilterFn
from adaround_ext.planning.overrides import Overrides, check_overrides
from adaround_ext.process.turns import one_caller
from adaround_ext.replay.cache import MEMORY_BUDGET
from adaround_ext.replay.calibration import ForwardFn, single_device
from adaround_ext.replay.census import NewCalls
from adaround_ext.report.model import ModelReport
from adaround_ext.tracing.blocks import Blocks
from adaround_ext.tracing.padding import PaddingMask
from adaround_ext.transforms.batch_norm import BatchNorm

_MODES = ("sequential", "parallel")
_BATCH_NORM = ("fold", "keep")


@dataclass(frozen=True)
class _Run:
    """Arguments of :func:`quantize_` that the fit has for itself; ``offload`` is open."""

    mode: str
    activations: ActivationConfig | None
    checkpoint_dir: str | None
    offload: Offload | None
    progress: bool


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

    The model is run in eval mode without gradients. It changes only at the very end, so after an
    error it is as it was; parameters keep their identity, and tied weights stay tied. Each
    quantized module gets ``quantized_weight`` (:class:`QuantizedWeight`), the codes for export.

    Args:
        model: the model, changed in place.
        calibration: an iterable of batches of whatever the model takes: tensors, tuples (positional
            arguments), mappings (keyword arguments; a tokenizer's output); with
            ``forward_fn(model, batch)`` anything. Labels behind the inputs are left out, as the
            report then says. One tensor or mapping of all samples is cut into batches of 32. It is
            iterated once: generators and shuffling loaders are fine.
        config: of every layer, see :class:`AdaRoundConfig`.
        mode: "sequential": x are inputs from the model with all layers before quantized, y what the
            full-precision model gives there (the paper's asymmetric reconstruction). "parallel": x
            and y are the full-precision model's.
        overrides: other settings for some layers, or "skip": {"head": {"bits": 8}, nn.Conv2d:
            {...}, "*.mlp.*": "skip"}. Keys are names or patterns of names (of a layer, or a module
            with layers in it), "<first>" and "<last>" in execution order, or module types; of
            several that match the later settings win.
        filter_fn: of a module and its name; False leaves a layer alone.
        forward_fn: of the model and a batch; runs the model on it.
        blocks: names, patterns or types of the modules that are carried forward: once its layers
            are done a block does not run again, its outputs are kept. None finds them. Without
            blocks every layer is one, and what lies between layers runs again for every layer.
            Where kept outputs would change what a model does (it counts calls, or takes another way
            for some batches), all of it runs again for every layer, and a note in the report says
            so.
        batch_norm: "fold" puts batch norms that follow a layer into it first, "keep" leaves them.
        equalize: cross-layer equalization (Nagel et al. 2019) first, for per-tensor grids.
        activations: quantizes activations too (simulated): see :class:`ActivationConfig`. Their
            ranges come from one pass of the full-precision model; in sequential mode the weights
            are fitted to inputs that are quantized so. A model that has quantizers already is
            refused: ``adaround_ext.activations.detach(model)`` takes them out. With None they stay
            as they are.
        activation_aware: puts the ReLU, ReLU6, GELU or SiLU that directly follows a layer into its
            loss: then minibatches instead of the Gram matrix, and the layer's inputs kept (at
            ``cache_dir`` if that is given, else in memory).
        padding_mask: name of the argument [batch, tokens] that is 0 at padding, or a function from
            a batch to such a tensor; padding is left out of the statistics. None: all counts.
        device: where the fitting runs; None: where the model is. Of a model on the CPU only what is
            in no block and the blocks at hand are brought to another device, so it may be larger
            than that.
        memory_budget: bytes that kept batches and activations may take in memory; what does not fit
            goes to files under ``cache_dir``. Statistics of a layer (about 8 columns^2 bytes) come
            on top; in parallel mode they are what is budgeted.
        device_budget: the same of a GPU's memory, where what comes from there is kept first; None:
            a quarter of what is free. Without a GPU it has no effect.
        cache_dir: of these files; None: the system's folder for temporary files.
        cache_dtype: torch.bfloat16 or float16 to keep activations in half the memory, rounded.
        checkpoint_dir: a folder for every layer's result. A run that was killed goes on from there
            and ends with the same codes; one with another model, data or configuration is refused.
        offload_dir: a folder on whose disk results are kept, in mapped files that are gone with the
            model; then a model whose weights are mapped (:func:`map_weights_`) may be larger than
            memory.
        process_group: of torch.distributed, as ``dist.group.WORLD`` under torchrun. Every rank
            makes the same call, with the same model and calibration, runs its share of the batches,
            solves its share of the rows or layers, and ends with the same result.
        reduction: "ordered": the codes are those of one process with as many threads, bit by bit.
            "fast": statistics are summed by one all-reduce, with less memory (a matrix a layer and
            rank instead of up to 16 over all ranks) and other last bits for other numbers of ranks.
        export_for: "onnxruntime", "openvino", "tensorrt" (these make a bfloat16 model float32),
            "vllm", "transformers" or "gguf": grid, groups, dtype of scales and layers left alone
            are chosen for it, where settings and overrides leave them open, and what cannot end
            there is refused, at once.
        progress: show a bar.
        **settings: of every layer, instead of those of ``config``; as ``bits=4``.

    Returns:
        Every layer in numbers, and what was skipped, with the reason.

    Raises:
        TypeError, ValueError: naming the argument or layer, the rule and what came.
        ImportError: where what writes the format of ``export_for`` is missing.
    """
    _check(model, mode, batch_norm, activations)
    goal = Goal(export_for, model)
    config = goal.config(config, settings, quantize_)
    goal.check_activations(activations)
    batch_norm = goal.batch_norm(batch_norm)
    _check_budgets(memory_budget, device_budget)
    check_overrides(overrides, config, model)
    options = WorkspaceOptions(
        config, goal.overrides(overrides), filter_fn, forward_fn, blocks, batch_norm, equalize,
        activation_aware, padding_mask, device, memory_budget, device_budget, cache_dir,
        cache_dtype,
    )  # fmt: skip
    ranks = Ranks(process_group, reduction)
    offload = None if offload_dir is None else _offload(offload_dir, model)
    run = _Run(mode, activations, checkpoint_dir, offload, progress)
    fingerprinted = checkpoint_dir is not None or ranks.size > 1
    with opened(model, calibration, options, goal, ranks, fingerprinted) as workspace:
        batches = workspace.data.batches
        traced = ranks.from_first(
            "the reading of checkpoint_dir", lambda: traced_batches(checkpoint_dir, batches)
        )
        workspace.data.share(ranks)
        fit = workspace.with_all_calls(partial(_fit, workspace, run), traced)
        passes = max(ranks.gather(fit.passes, "the end"))  # each has its own room
        with uninterrupted():
            for target, fitted in fit.fitted.items():
                apply_(target, fitted.weight, fitted.bias, fitted.dequantized)
            workspace.keep_changes()
    return summarize(workspace, fit, mode, passes + (activations is not None))


def _fit(workspace: Workspace, run: _Run, analysis: Analysis) -> Fit:
    """Fits all layers; NewCalls, with all as it was before, where some calls are in no trace."""
    model, ranks, sequential = workspace.model, workspace.ranks, run.mode == "sequential"
    units, plan = analysis.units, analysis.plan
    changes = workspace.changes.enter_context(ExitStack())
    shared_prefix, switch = _shared_prefix(analysis), None
    with ranks.together("tracing"), full_precision_activations(model):
        forward = None if workspace.options.forward_fn else partial(workspace.data.run, 0)
        workspace.goal.check(plan.targets, forward)
        notes = _quantized_activations(workspace, run.activations, analysis, changes)
    if notes:
        # The quantized stream differs from the start.
        shared_prefix, switch = 0, partial(full_precision_activations, model)
    if sequential:
        passes = sequential_passes(units)
    else:  # statistics are where the layer is
        room = max(workspace.options.memory_budget, workspace.device_budget)
        passes = parallel_passes(units, room)
    checkpoint = _checkpoint(workspace, run, analysis)
    targets = [targets_of(unit) for unit in units] if sequential else []
    try:
        with workspace.replaying(analysis, targets, shared_prefix) as replay:
            fitter = Fitter(
                workspace, analysis, replay, passes, sequential, checkpoint, run.offload, switch,
                run.progress,
            )  # fmt: skip
            fit = fitter.run()
    except NewCalls:
        changes.close()
        if checkpoint is not None:
            checkpoint.discard()
        raise
    workspace.prepared.notes += notes
    return fit


def _quantized_activations(
    workspace: Workspace,
    activations: ActivationConfig | None,
    analysis: Analysis,
    changes: ExitStack,
) -> list[str]:
    """Quantizes the model's activations, if it is asked; notes, none without any quantizers."""
    if activations is not None:
        layers = [target.matrix.layer for target in analysis.plan.targets]
        return quantize_activations_(
            workspace.model, analysis.trace, layers, workspace.data, activations, changes,
            analysis.flow, analysis.masks,
        )  # fmt: skip
    attached = quantizers_of(workspace.model)
    return [f"{len(attached)} quantizers of activations stay as they were"] if attached else []


def _shared_prefix(analysis: Analysis) -> int:
    """How many leading block calls run before any layer that is quantized."""
    modules = {module for target in analysis.plan.targets for module in target.modules}
    for index, call in enumerate(analysis.calls):
        if call.layers & modules:
            return index
    return len(analysis.calls)


def _checkpoint(workspace: Workspace, run: _Run, analysis: Analysis) -> Checkpoint | None:
    """The first rank's, where one is asked for; ValueError unless all ranks make the same run."""
    ranks, fingerprint = workspace.ranks, _fingerprint(workspace, run, analysis)
    ranks.same(fingerprint | {"memory_budget": workspace.options.memory_budget})
    with ranks.together("the opening of checkpoint_dir"):
        if run.checkpoint_dir is not None and ranks.first:
            return Checkpoint(run.checkpoint_dir, fingerprint)
    return None


def _fingerprint(workspace: Workspace, run: _Run, analysis: Analysis) -> dict[str, object]:
    """What must be the same for two runs to be one; empty where nobody compares."""
    if not workspace.digest:
        return {}
    options = workspace.options
    arguments = {
        "mode": run.mode,
        "batch_norm": options.batch_norm,
        "equalize": options.equalize,
        "cache_dtype": str(options.cache_dtype),
        "forward_fn": plain_name(options.forward_fn),
        "padding_mask": plain_name(options.padding_mask),
        "activations": None if run.activations is None else run.activations.to_dict(),
        "reduction": workspace.ranks.summation,
    }
    known = run_fingerprint(workspace.digest, workspace.data, analysis.plan, analysis.calls)
    return arguments | known | {"traced": list(workspace.traces)}


def _offload(folder: str, model: nn.Module) -> Offload:
    offload, home = Offload(folder), single_device(model)
    if home is None or home.type != "cpu":
        raise ValueError(f"offload_dir needs a model on the CPU, got one on {home}")
    return offload


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
