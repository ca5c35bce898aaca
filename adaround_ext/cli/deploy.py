"""Commands that deploy: ``adaround-ext export`` and ``verify``, of what ``quantize`` wrote."""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from adaround_ext.checks import some
from adaround_ext.cli.models import Source, load_model
from adaround_ext.cli.options import DTYPES
from adaround_ext.cli.sources import check_data, load_data
from adaround_ext.export.formats import FORMATS, TRACED, export_model
from adaround_ext.export.goal.targets import EXPORT_TARGETS
from adaround_ext.export.manifest import NAME, new_folder, read_manifest
from adaround_ext.export.packed.load import load_quantized
from adaround_ext.export.packed.stored import KIND
from adaround_ext.export.parity import verify as compare

_EXAMPLE = "A short text, as this model may get it."


def export(args: Namespace) -> tuple[dict[str, Any], str, bool]:
    """Writes a quantized model in the formats asked for; whether all that were named are there."""
    formats, runtime = _formats(args)
    kinds = list(FORMATS) if "all" in formats else list(dict.fromkeys(formats))
    if args.output is not None and len(kinds) > 1:
        raise ValueError(f"--output must be left out for several formats, got {args.output}")
    if args.output is not None or len(kinds) == 1:
        new_folder(args.output or Path(args.run, kinds[0]))
    check_data(args.data)
    source = load_run(args.run, args.model, args.quiet)
    batch = _example(args, source)
    if batch is None and len(kinds) == 1 and kinds[0] in TRACED:
        raise ValueError(f"--data must be given for {kinds[0]}, to show what the model takes")
    written: dict[str, str] = {}
    there: dict[str, str] = {}
    refused: dict[str, str] = {}
    for kind in kinds:
        folder = Path(args.run, kind) if args.output is None else Path(args.output)
        if len(kinds) > 1 and (folder / NAME).is_file():
            there[kind] = str(folder)
            continue
        try:
            with source.without_cache():
                export_model(
                    source.model,
                    folder,
                    kind,
                    batch=batch,
                    target=runtime,
                    tokenizer=source.tokenizer(),
                )
        except (ImportError, TypeError, ValueError) as error:
            if len(kinds) == 1:
                raise
            refused[kind] = str(error)
        else:
            written[kind] = str(folder)
    lines = [f"{kind}: written to {folder}" for kind, folder in written.items()]
    lines += [f"{kind}: already in {folder}, left as it is: remove it to write it again"
              for kind, folder in there.items()]  # fmt: skip
    lines += [f"{kind}: refused: {reason}" for kind, reason in refused.items()]
    text = "" if args.quiet else "\n".join(lines)
    document = {"written": written, "there": there, "refused": refused}
    return document, text, "all" in formats or not refused


def _formats(args: Namespace) -> tuple[list[str], str]:
    """Those asked for, and the runtime of ONNX files."""
    if args.export_for is None:
        return args.format, args.target or "ort"
    target = EXPORT_TARGETS[args.export_for]
    if args.target not in (None, target.runtime):
        raise ValueError(f"--target must be left out with --for, got {args.target}")
    return [target.format], target.runtime


def verify(args: Namespace) -> tuple[dict[str, Any], str, bool]:
    """Runs the exports of a quantized model beside it; whether all that must be equal is."""
    check_data(args.data)
    folders = [Path(folder) for folder in args.exports] or sorted(
        path.parent for path in Path(args.run).glob(f"*/{NAME}")
    )
    if not folders:
        raise FileNotFoundError(f"RUN must hold exports, got none in {args.run}: export some first")
    for folder in folders:
        if not (folder / NAME).is_file():
            raise FileNotFoundError(f"EXPORT must be a directory that export wrote, got {folder}")
    source = load_run(args.run, args.model, quiet=False)
    data = load_data(
        args.data, source, nsamples=args.nsamples, seqlen=args.seqlen, batch_size=args.batch_size
    )
    batches = [_with_mask(source, batch) for batch in data]
    with source.without_cache():
        report = compare(source.model, folders, batches, tolerance=args.tolerance)
    return report.to_dict(), str(report), report.ok


def load_run(run: str, model: str | None, quiet: bool) -> Source:
    """The quantized model in a directory that ``quantize`` wrote.

    model: the ``module:factory`` that it came from; not for Hugging Face directories. Raises
    FileNotFoundError and ValueError naming RUN or --model.
    """
    folder = Path(run)
    if not (folder / NAME).is_file():
        raise FileNotFoundError(f"RUN must be a directory that quantize wrote, got {run}")
    details = read_manifest(folder, KIND).details
    dtypes = {layer.get("dtype", "") for layer in details.get("layers", {}).values()}
    dtype = DTYPES.get(dtypes.pop().removeprefix("torch.")) if len(dtypes) == 1 else None
    if (folder / "config.json").exists():
        source = load_model(run, dtype=dtype, quiet=quiet)
    elif model is None:
        raise ValueError(f"--model must name the module:factory that {run} came from")
    else:
        source = load_model(model, dtype=dtype, quiet=quiet)
        _load_state(source.model, folder / "model.safetensors", model)
    load_quantized(folder, source.model)
    source.model.eval()
    return source


def _load_state(model: torch.nn.Module, path: Path, name: str) -> None:
    """ValueError where ``name`` made another model than that whose tensors are at ``path``."""
    rule = f"--model {name} must make the model that was quantized"
    try:
        missing, unexpected = safetensors.torch.load_model(model, path, strict=False)
    except RuntimeError as error:  # of other shapes, one a line
        raise ValueError(f"{rule}, got {str(error).splitlines()[-1].strip()}") from error
    if missing or unexpected:
        parts = {"without": sorted(missing), "with no place for": sorted(unexpected)}
        got = " and ".join(f"{how} {some(names)}" for how, names in parts.items() if names)
        raise ValueError(f"{rule}, got one {got}")


def _example(args: Namespace, source: Source) -> Any:
    """A batch of two samples where the data has as many; None where there is none to be had."""
    if args.data is not None:
        data = load_data(args.data, source, nsamples=2, seqlen=args.seqlen, batch_size=2)
        first = next(iter(data), None)
        if first is None:
            raise ValueError(f"--data must hold at least one batch, got none in {args.data}")
        return _with_mask(source, first)
    tokenizer = source.tokenizer()
    if tokenizer is None:
        return None
    ids = tokenizer(_EXAMPLE)["input_ids"][: args.seqlen]
    return _with_mask(source, {"input_ids": torch.tensor([ids, ids], device="cpu")})


def _with_mask(source: Source, batch: Any) -> Any:
    """Token ids with the attention mask that goes with them, where the model takes one."""
    if not source.pretrained or not isinstance(batch, Mapping):
        return batch
    if "input_ids" not in batch or "attention_mask" in batch:
        return batch
    if "attention_mask" not in inspect.signature(source.model.forward).parameters:
        return batch
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
