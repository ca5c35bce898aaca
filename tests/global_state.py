"""What a call must leave as it was: the process around it, and the model it was given."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from adaround_ext.native import use_instruction_set

_GLOBAL_HOOKS = [name for name in vars(torch_module) if name.startswith("_global_")]


@contextmanager
def unchanged(model: nn.Module | None = None, *, written: bool = False) -> Iterator[None]:
    """Inside, whatever happens, nothing is left changed; on an exception not even by ``written``.

    written: the call is there to write to the model: then values, the tensors' versions and what
    modules hold may be others afterwards, but not identity, training flags, gradients or hooks.
    """
    process, modules = process_state(), {} if model is None else model_state(model)
    try:
        yield
    except BaseException:
        written = False
        raise
    finally:
        changes = differences(process, process_state())
        if model is not None:
            changes += differences(modules, model_state(model), written)
        assert not changes, "changed: " + "; ".join(changes)


def process_state() -> dict[str, Any]:
    """All that is global, by name."""
    backends = torch.backends
    state: dict[str, Any] = {
        "random numbers of torch": torch.get_rng_state().numpy().tobytes(),
        "random numbers of numpy": [
            np.random.get_state()[0],
            np.random.get_state()[1].tobytes(),
            *np.random.get_state()[2:],
        ],
        "random numbers of Python": random.getstate(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly mode": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "deterministic algorithms": torch.get_deterministic_debug_mode(),
        "deterministic fill": torch.utils.deterministic.fill_uninitialized_memory,
        "matmul precision": _or_error(torch.get_float32_matmul_precision),
        "cuBLAS": [
            backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
            backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        ],
        "cuDNN": [getattr(backends.cudnn, n) for n in ("enabled", "benchmark", "deterministic")],
        "TF32": [
            place.fp32_precision
            for place in (
                backends.cuda.matmul,
                backends.cudnn,
                backends.cudnn.conv,
                backends.mkldnn,
                backends.mkldnn.conv,
                backends.mkldnn.matmul,
            )
        ],
        "TF32 of cuDNN": _or_error(lambda: backends.cudnn.allow_tf32),
        "oneDNN": (backends.mkldnn.enabled, backends.mkldnn.deterministic),
        "fused attention": backends.mha.get_fastpath_enabled(),
        "autocast": [
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
        ],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "function modes": torch._C._len_torch_function_stack(),
        "compiler stance": torch._dynamo.eval_frame._stance.stance,
        "instruction set": use_instruction_set(),
        "warnings": list(warnings.filters),
        "sys.path": list(sys.path),
        "standard files": (sys.stdin, sys.stdout, sys.stderr, sys.excepthook),
        "current directory": os.getcwd(),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)],
        "logging": _logging(),
    }
    state |= {name: list(getattr(torch_module, name).items()) for name in _GLOBAL_HOOKS
              if isinstance(getattr(torch_module, name), dict)}  # fmt: skip
    return state


def _or_error(get: Callable[[], object]) -> object:
    """What torch's older functions say, which raise where only its newer ones can."""
    try:
        return get()
    except RuntimeError as error:
        return type(error).__name__


def _logging() -> dict[str, Any]:
    """Of the root and our own loggers."""
    loggers = {name: logging.getLogger(name) for name in ("root", "adaround_ext")}
    state = {
        name: (own.level, list(own.handlers), list(own.filters), own.disabled, own.propagate)
        for name, own in loggers.items()
    }
    return state | {"disabled": logging.root.manager.disable}


def model_state(model: nn.Module) -> dict[str, Any]:
    """All that a model is, by name; keys that start with "content" are what a call may write."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        state[f"training of {name}"] = module.training
        state[f"content of {name}"] = (id(module), sorted(module.__dict__), [*module._modules])
        hooks = {key: value for key, value in module.__dict__.items() if "hooks" in key}
        state |= {f"hooks of {name}, {key}": list(value.items()) for key, value in hooks.items()}
        state[f"content of {name}, forward"] = module.__dict__.get("forward")
        for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
            for key, tensor in tensors.items():
                if tensor is not None:
                    state |= _tensor_state(f"{kind} {name}.{key}", tensor)
    return state


def _tensor_state(name: str, tensor: Tensor) -> dict[str, Any]:
    grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
    where = (id(tensor), tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape)
    return {
        f"{name}, which it is": (*where, tensor.stride()),
        f"{name}, gradient": (tensor.requires_grad, grad, list(tensor._backward_hooks or ())),
        f"content of {name}": tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes(),
        f"content of {name}, version": tensor._version,
    }


def differences(before: dict[str, Any], after: dict[str, Any], written: bool = False) -> list[str]:
    """What is another in ``after``, in words; ``written``: but for content, and what is new."""
    found = []
    for name in before:
        if written and (name.startswith("content") or name not in after):
            continue
        if written and name.startswith("hooks") and set(before[name]) <= set(after[name]):
            continue
        if name not in after or before[name] != after[name]:
            found.append(f"{name}: {_short(before[name])} -> {_short(after.get(name, 'gone'))}")
    if not written:
        found += [f"{name} is new" for name in after.keys() - before.keys()]
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) < 120 else f"{text[:117]}..."
