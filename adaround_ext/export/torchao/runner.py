"""torchao runners: the weights in a model of the class, and the exported program."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext.export.hugging_face import load_alike
from adaround_ext.export.manifest import read_manifest
from adaround_ext.export.runner import Runner, module_runner, output_tensors
from adaround_ext.export.torchao.program import load_program
from adaround_ext.export.torchao.tensors import import_torchao

KIND = "torchao"
WEIGHTS, PROGRAM = "weights.pt", "model.pt2"


def runners(folder: Path, model: nn.Module) -> list[Runner]:
    """The weights in a model of the class, by transformers or load_state_dict, and the program."""
    details = read_manifest(folder, KIND).details
    import_torchao()
    if details["pretrained"]:
        ways = [module_runner("transformers", load_alike(folder, type(model)))]
    else:
        loaded = copy.deepcopy(model)
        state = torch.load(folder / WEIGHTS, map_location="cpu", weights_only=True)
        loaded.load_state_dict(state, assign=True)
        ways = [module_runner("load_state_dict", loaded)]
    if details["program"]:
        ways.append(_program_runner(folder / PROGRAM))
    return ways


def _program_runner(path: Path) -> Runner:
    program = load_program(path)

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        with torch.no_grad():
            return output_tensors(program(*args, **kwargs))

    return Runner("torch.export", True, "", run)
