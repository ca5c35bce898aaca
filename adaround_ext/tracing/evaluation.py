"""Evaluation mode: a model that runs without gradients, with the same random numbers each time."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from adaround_ext.tensors import version

_NUMPY_SEEDS = 1 << 32  # so many: NumPy takes no others


def gpus(devices: Iterable[torch.device | None]) -> list[torch.device]:
    """Those of the devices that are one, each once."""
    return [d for d in dict.fromkeys(devices) if d is not None and d.type == "cuda"]


def seed_all(seed: int, devices: Iterable[torch.device]) -> None:
    """Seeds torch on the CPU and on some GPUs, NumPy's global generator and Python's.

    ``torch.manual_seed`` would also change the state of all other GPUs, which the caller may use,
    and takes longer than a small model where there is no GPU.
    """
    np.random.seed(seed % _NUMPY_SEEDS)
    random.seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    torch.default_generator.manual_seed(seed)  # last: other threads draw from it, if any do


@contextmanager
def restored_random_state(devices: Iterable[torch.device]) -> Iterator[None]:
    """What was drawn or seeded inside is undone: of torch, of NumPy and of Python."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng([device.index for device in devices]):
            yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Compiled functions run as they were written.

    torch's dynamo, which would be told, takes seconds to import: if nothing has yet, then what the
    model compiles on its way does.
    """
    with ExitStack() as stack:

        def tell() -> None:
            stack.enter_context(torch.compiler.set_stance("force_eager"))

        if "torch._dynamo" in sys.modules:
            tell()
            yield
            return
        compile_ = torch.compile

        def telling(*args: Any, **kwargs: Any) -> Any:
            torch.compile = compile_
            tell()
            return compile_(*args, **kwargs)

        torch.compile = telling
        try:
            yield
        finally:
            torch.compile = compile_


@contextmanager
def evaluation(
    model: nn.Module, seed: int = 0, device: torch.device | None = None
) -> Iterator[None]:
    """Eval mode, no gradients, no compiled graphs, a fixed random state; all as it was afterwards.

    device: where the model is run, if that is not where it is.

    Fused paths that go around a module's own submodules are off, so that hooks see every layer.
    Autocast keeps no copies of weights, which would outlive a change of them. Buffers that the
    model writes to get their values back.
    """
    buffers = [
        (module._buffers, name, buffer, buffer.detach().clone(), version(buffer))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not nn.parameter.is_lazy(buffer)
    ]
    autocast_cache = torch.is_autocast_cache_enabled()
    training = {module: module.training for module in model.modules()}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = gpus([device, *(t.device for t in model.parameters())])
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            restored_random_state(devices),
            _uncompiled(),
        ):
            for module in training:  # not model.eval(), which a class may have overridden
                module.training = False
            seed_all(seed, devices)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        torch.set_autocast_cache_enabled(autocast_cache)
        for owner, name, buffer, before, writes in buffers:
            if owner.get(name) is not buffer:
                owner[name] = buffer
            if version(buffer) != writes:
                buffer.detach().copy_(before)
        for module in {*training, *model.modules()}:  # there may be new ones
            module.training = training.get(module, training[model])


_COMPILED = "_orig_mod"  # what torch.compile has put between a module's name and its layers'


def plain_module_name(name: str) -> str:
    """A module's name as it is without torch.compile."""
    return ".".join(step for step in name.split(".") if step != _COMPILED)
