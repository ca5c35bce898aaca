"""Loads the native libraries and says what they are."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
_BUILD_COMMAND = "pip install --no-build-isolation -e . (from the source tree)"


def _load() -> bool:
    """Loads the op libraries; True where the CUDA one is among them."""
    cpu, cuda = _FOLDER / "_C_cpu.so", _FOLDER / "_C_cuda.so"
    if not cpu.exists():
        raise ImportError(
            f"adaround_ext is not built: {cpu.name} is missing. Build with: {_BUILD_COMMAND}"
        )
    torch.ops.load_library(str(cpu))
    # Under a CPU-only torch the CUDA library has unresolved symbols and cannot load.
    if torch.version.cuda is None or not cuda.exists():
        return False
    torch.ops.load_library(str(cuda))
    return True


_CUDA_LOADED = _load()


def build_info() -> dict[str, Any]:
    """What was compiled and what of it is in use.

    Returns a dict: ``version``, ``compiler``, ``torch_built_with``, ``instruction_sets`` and
    ``cuda_architectures`` compiled for (``cuda_toolkit`` is empty where CUDA was not built), and in
    use here: ``torch``, ``instruction_set`` of the CPU kernels, ``cuda_loaded``.
    """
    from adaround_ext import _C  # type: ignore[attr-defined]

    return {
        **_C.build_info(),
        "torch": torch.__version__,
        "instruction_set": use_instruction_set(),
        "cuda_loaded": _CUDA_LOADED,
    }


def use_instruction_set(name: str = "") -> str:
    """Chooses the loops of the CPU kernels: "auto", "baseline", "avx2" or "avx512".

    Returns the name now in use; without an argument only that. The environment variable
    ``ADAROUND_EXT_ISA`` makes the first choice. Raises ValueError where this machine or build lacks
    the one asked for.
    """
    try:
        used: str = torch.ops.adaround_ext._use_instruction_set(name)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return used


if os.environ.get("ADAROUND_EXT_ISA"):
    use_instruction_set(os.environ["ADAROUND_EXT_ISA"])
