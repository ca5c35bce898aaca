"""Commands: each takes parsed arguments and returns its JSON document and its text."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from argparse import Namespace
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import adaround_ext.cli.show as show
from adaround_ext.checks import device_here
from adaround_ext.cli.models import Source
from adaround_ext.cli.options import check_parent
from adaround_ext.cli.output import save, staged
from adaround_ext.cli.sensitivity import layer_bits, without_left
from adaround_ext.cli.show import Output
from adaround_ext.cli.sources import check_data, load_inputs
from adaround_ext.distributed import Ranks, launched
from adaround_ext.export.goal.goal import Goal
from adaround_ext.export.goal.targets import EXPORT_TARGETS
from adaround_ext.layers.matrix import SUPPORTED
from adaround_ext.model.quantize import quantize_
from adaround_ext.model.workspace import WorkspaceOptions, opened
from adaround_ext.ops.library import build_info
from adaround_ext.planning.plan import make_plan
from adaround_ext.report.model import ModelReport
from adaround_ext.tracing.trace import ModuleCall, Trace, Value


def quantize(args: Namespace) -> Output:
    """Quantizes a model and writes it with its report; the report is the document."""
    inputs = [Path(name) for name in (args.model, args.data, args.checkpoint_dir) if name]
    bits = {} if args.layer_bits is None else layer_bits(args.layer_bits, args.average_bits)
    _check_options(args)
    with ExitStack() as stack:
        group = stack.enter_context(launched(_own_device(args)))
        ranks = Ranks(group)
        folder = None
        with ranks.together("the preparation of --output"):
            if ranks.first:
                output = Path(args.output)
                folder = stack.enter_context(staged(output, args.overwrite, inputs))
        torch.manual_seed(args.seed)
        source, data = load_inputs(args)
        with source.without_cache():
            report = quantize_(
                source.model,
                data,
                mode=args.mode,
                overrides=without_left(bits, source.model, args.export_for) | args.overrides,
                batch_norm="keep",  # the files must fit the model's class, which has them
                activations=args.activations,
                memory_budget=args.memory_budget,
                cache_dir=args.cache_dir,
                checkpoint_dir=args.checkpoint_dir,
                process_group=group,
                reduction=args.reduction,
                export_for=args.export_for,
                progress=not args.quiet,
                **_scales_of(source, args) | args.settings,
            )
        if folder is None:  # one rank writes, and says what
            return None, ""
        save(source, report, folder)
        written = sorted(path.name for path in folder.iterdir())
    if args.html is not None:
        report.to_html(args.html)
    text = "" if args.quiet else f"{report}\nwritten to {args.output}: {', '.join(written)}"
    if text and args.export_for is not None:
        text += f"\nnext: adaround-ext export {args.output} --for {args.export_for}"
    return report.to_dict(), text


def inspect(args: Namespace) -> Output:
    """What would be quantized of a model, or what a report says."""
    if Path(args.model).is_file():
        return show.of_report(ModelReport.load(args.model))
    check_data(args.data)
    torch.manual_seed(args.seed)
    args.nsamples = args.batch_size = 1
    source, data = load_inputs(args)
    model, goal = source.model, Goal(args.export_for, source.model)
    config = goal.config(None, args.settings)
    overrides, notes = goal.overrides(args.overrides), list[str]()
    if args.data is None:
        order, trace = "definition", _as_defined(model)
        reasons, complete = goal.refused(), goal.settings
        plan = make_plan(model, trace, config, overrides, reasons=reasons, complete=complete)
    else:
        order, first = "execution", data if isinstance(data, (Tensor, Mapping)) else islice(data, 1)
        options = WorkspaceOptions(config, overrides, batch_norm="keep")
        with source.without_cache(), opened(model, first, options, goal) as workspace:
            plan, notes = workspace.analyse().plan, workspace.data.notes
    goal.check(plan.targets)
    return show.of_plan(model, plan, order, notes)


def compare(args: Namespace) -> Output:
    """Two reports, layer by layer."""
    first, second = (ModelReport.load(_report_path(path)) for path in (args.a, args.b))
    return show.of_two_reports((args.a, args.b), first, second)


def env(args: Namespace) -> Output:
    """Versions and what of this machine is in use."""
    build = build_info()
    devices = []
    for index in range(torch.cuda.device_count()):
        known = torch.cuda.get_device_properties(index)
        capability = f"{known.major}.{known.minor}"
        devices.append({"name": known.name, "memory": known.total_memory, "capability": capability})
    document = {
        "adaround_ext": build["version"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": build["instruction_set"],
        "cuda_devices": devices,
        "build": build,
    }
    rows = [[name, _plain(value)] for name, value in document.items() if name != "build"]
    rows += [[f"build: {name}", _plain(value)] for name, value in build.items()]
    return document, show.table(rows, left=2)


def _own_device(args: Namespace) -> torch.device:
    """--device; under torchrun, for "cuda" the one of this rank."""
    device = torch.device(args.device or "cpu")
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        args.device = str(device)
    return device


def _scales_of(source: Source, args: Namespace) -> dict[str, Any]:
    """Without a target, scales as transformers loads them: in a half-precision model's dtype."""
    dtype = getattr(source.model, "dtype", None) if source.pretrained else None
    half = args.export_for is None and dtype in (torch.float16, torch.bfloat16)
    return {"scale_dtype": dtype} if half else {}


def _check_options(args: Namespace) -> None:
    """Everything that can be wrong before a model is loaded. Raises what names the option."""
    check_parent("--html", args.html)
    if args.cache_dir is not None and not Path(args.cache_dir).is_dir():
        raise FileNotFoundError(f"--cache-dir must be a directory, got {args.cache_dir}")
    if args.checkpoint_dir is not None and Path(args.checkpoint_dir).is_file():
        got = f"got the file {args.checkpoint_dir}"
        raise ValueError(f"--checkpoint-dir must be a directory, {got}")
    if args.device is not None:
        device_here(args.device)
    if args.export_for is not None:
        EXPORT_TARGETS[args.export_for].check_packages()
    check_data(args.data)


def _as_defined(model: nn.Module) -> Trace:
    """As if each layer ran once, in the order in which the model defines them."""
    layers = [module for module in model.modules() if isinstance(module, SUPPORTED)]
    calls = [
        ModuleCall(layer, 0, 2 * time, 2 * time + 1, (Value(time, 0, 0, (), ()),), ())
        for time, layer in enumerate(layers)
    ]
    return Trace(calls, [], (), {})


def _report_path(path: str) -> Path:
    """A report, or that of a directory which quantize wrote."""
    return Path(path) / "report.json" if Path(path).is_dir() else Path(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "; ".join(map(_plain, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return "none" if value in (None, "") else str(value)
