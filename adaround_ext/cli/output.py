"""Output of ``adaround-ext quantize``: a directory, whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
from torch import nn

from adaround_ext.activations.quantizer import ActivationQuantizer
from adaround_ext.cli.models import Source
from adaround_ext.export.packed.save import save_codes
from adaround_ext.files import folder_beside, take_place
from adaround_ext.report.model import ModelReport

_REPORT = "report.json"
_OTHER_INPUTS = ("preprocessor_config.json", "processor_config.json")


@contextmanager
def staged(output: Path, overwrite: bool, inputs: Iterable[Path]) -> Iterator[Path]:
    """An empty directory beside ``output`` that takes its place at the end, or goes on an error.

    overwrite: replaces a directory that an earlier run wrote, which a report.json shows; nothing
    else is ever deleted. inputs: files and directories that must not lie in it. Raises ValueError
    naming --output.
    """
    output = output.resolve()
    _check(output, overwrite, inputs)
    with folder_beside(output) as folder:
        yield folder
        _check(output, overwrite, inputs)  # hours may have passed
        take_place(folder, output, overwrite)


def _check(output: Path, overwrite: bool, inputs: Iterable[Path]) -> None:
    for path in inputs:
        if path.resolve().is_relative_to(output):
            raise ValueError(f"--output must not hold what is read or kept, got {output}")
    if not output.exists():
        return
    if not output.is_dir():
        raise ValueError(f"--output must be a directory, got the file {output}")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"--output must be empty or new without --overwrite, got {output}")
    if not (output / _REPORT).is_file():
        rule = f"--output must be a directory of an earlier run, with a {_REPORT}, to be replaced"
        raise ValueError(f"{rule}, got {output}")


@contextmanager
def _without_quantizers(model: nn.Module) -> Iterator[None]:
    """Inside, a model has no quantizers of activations, as its class has none.

    The file of the codes has them.
    """
    taken = [
        (module._modules, name, child)
        for module in model.modules()
        for name, child in module._modules.items()
        if isinstance(child, ActivationQuantizer)
    ]
    for owner, name, _ in taken:
        del owner[name]
    try:
        yield
    finally:
        for owner, name, child in taken:
            owner[name] = child


def save(source: Source, report: ModelReport, folder: Path) -> None:
    """Model, codes and report of a quantized model; a Hugging Face model with its tokenizer."""
    with _without_quantizers(source.model):
        if source.pretrained:
            source.model.save_pretrained(folder)  # type: ignore[operator]
        else:
            safetensors.torch.save_model(source.model, str(folder / "model.safetensors"))
    if source.pretrained:
        tokenizer = source.tokenizer()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name in _OTHER_INPUTS:
            other = source.named.file(name)
            if other is not None:
                shutil.copy(other, folder)
    save_codes(source.model, folder)
    report.to_html(folder / "report.html")
    report.save(folder / _REPORT)
