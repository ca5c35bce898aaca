"""Native libraries: they are loaded here, and say what they are."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import torch

_FOLDER = Path(__file__).parents[1]
_CPU, _CUDA = "_C_cpu.so", "_C_cuda.so"
_DISPATCHED = {"packed_linear", "_use_instruction_set"}  # of other ops, or without tensors


def _load() -> bool:
    """Loads the op libraries; True where the CUDA one is among them."""
    if not (_FOLDER / _CPU).exists():
        raise ImportError(missing_libraries(_FOLDER, sys.path))
    torch.ops.load_library(str(_FOLDER / _CPU))
    # Under a CPU-only torch the CUDA library has unresolved symbols and cannot load.
    if torch.version.cuda is None or not (_FOLDER / _CUDA).exists():
        return False
    torch.ops.load_library(str(_FOLDER / _CUDA))
    return True


def missing_libraries(folder: Path, path: list[str]) -> str:
    """Why the package in ``folder`` has no libraries, and what to do; ``path`` as in sys."""
    root = folder.parent
    if not (root / "setup.py").exists() or not (root / "csrc").is_dir():
        return (
            f"adaround_ext in {folder} is not whole: {_CPU} is missing. Install it again, from its "
            "source tree: pip install --force-reinstall --no-deps ."
        )
    others = (Path(entry, folder.name) for entry in path)
    hidden = next((other for other in others if (other / _CPU).exists()), None)
    in_place = f"build it in place: pip install --no-build-isolation -e {root}"
    if hidden is None:
        return (
            f"adaround_ext is imported from its source tree {root}, which is not built: {_CPU} is "
            f"missing. Install it (pip install {root}) and start Python in another folder, or "
            f"{in_place}"
        )
    return (
        f"adaround_ext is imported from its source tree {root}, which is not built and hides the "
        f"one that is installed in {hidden}. Start Python in another folder, or {in_place}"
    )


_CUDA_LOADED = _load()


def without_cuda() -> str:
    """Why there are no kernels for CUDA, and what to do."""
    if (_FOLDER / _CUDA).exists():
        return f"adaround_ext's library for CUDA does not load under torch {torch.__version__}"
    return (
        "adaround_ext was built without CUDA, as USE_CUDA=0 was set or nvcc was not found. Install "
        f"the CUDA toolkit {torch.version.cuda or ''}".rstrip()
        + " (nvcc) or set CUDA_HOME to where it is, and in the source tree: FORCE_CUDA=1 pip "
        "install --no-build-isolation ."
    )


def check_device(name: str, device: torch.device) -> None:
    """ValueError, about ``name``, for a device without kernels; "meta" is for others to refuse."""
    if device.type in ("cpu", "meta") or (device.type == "cuda" and _CUDA_LOADED):
        return
    if device.type == "cuda":
        raise ValueError(f"{name} must be on the CPU, got {device}: {without_cuda()}")
    raise ValueError(f"{name} must be on the CPU or on CUDA, got {device}: it has no kernels")


def _refuse_cuda() -> torch.library.Library:
    """Ops that say why they do not run on CUDA; torch's own message has forty lines without it."""
    library = torch.library.Library("adaround_ext", "IMPL")

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise ValueError(f"tensors must be on the CPU, got some on CUDA: {without_cuda()}")

    for name in torch._C._dispatch_get_all_op_names():
        namespace, _, op = name.partition("::")
        if namespace == "adaround_ext" and op not in _DISPATCHED:
            library.impl(op, refuse, "CUDA")
    return library


_REFUSALS = None if _CUDA_LOADED else _refuse_cuda()  # they go when it does


def build_info() -> dict[str, Any]:
    """What was compiled and what of it is in use.

    Returns:
        A dict of ``version``, ``compiler``, ``torch_built_with``, ``instruction_sets`` and
        ``cuda_architectures`` compiled for (``cuda_toolkit`` is empty where CUDA was not built),
        and in use here: ``torch``, ``instruction_set`` of the CPU kernels, ``cuda_loaded``.
    """
    _C = importlib.import_module("adaround_ext._C")

    return {
        **_C.build_info(),
        "torch": torch.__version__,
        "instruction_set": use_instruction_set(),
        "cuda_loaded": _CUDA_LOADED,
    }


def use_instruction_set(name: str = "") -> str:
    """Chooses the loops of the CPU kernels.

    The environment variable ``ADAROUND_EXT_ISA`` makes the first choice.

    Args:
        name: "auto", "baseline", "avx2" or "avx512"; empty leaves it as it is.

    Returns:
        The name now in use.

    Raises:
        ValueError: This machine or build lacks the one asked for.
    """
    try:
        used: str = torch.ops.adaround_ext._use_instruction_set(name)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    return used


if os.environ.get("ADAROUND_EXT_ISA"):
    use_instruction_set(os.environ["ADAROUND_EXT_ISA"])
