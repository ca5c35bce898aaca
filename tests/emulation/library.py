"""Builds the kernels of csrc/cuda for the processor and puts them in the place of the CPU's."""

from __future__ import annotations

import os
import re
from pathlib import Path
from unittest import mock

from adaround_ext.ops import library as native  # noqa: F401  the kernels that are replaced come first

_ROOT = Path(__file__).resolve().parents[2]
_HERE = _ROOT / "tests" / "emulation"
_SANITIZE = os.environ.get("SANITIZE", "")  # as in setup.py
_BUILD = _ROOT / "build" / f"emulation-{_SANITIZE}".strip("-").replace(",", "-")
_FLAGS = [
    "-O1", "-g1", "-Wall", "-Wno-unknown-pragmas", "-fno-math-errno", "-fno-trapping-math",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
]  # fmt: skip
# kernel<<<blocks, threads, bytes, stream>>>(arguments);
_LAUNCH = re.compile(r"([\w:]+(?:<[^;{}]*?>)?)\s*<<<(.*?)>>>\((.*?)\);", re.DOTALL)
_SHARED = re.compile(r"extern __shared__ (\w+) (\w+)\[\];")


def load() -> None:
    """Builds what has changed; from here on the CPU's ops are the emulated ones."""
    from torch.utils import cpp_extension  # wants setuptools, which not everyone who tests has

    _BUILD.mkdir(parents=True, exist_ok=True)
    sources = [str(_HERE / "emulator.cpp")]
    for kernels in sorted((_ROOT / "csrc" / "cuda").glob("*.cu")):
        target = _BUILD / f"{kernels.stem}.cpp"
        text = as_cpp(kernels.read_text())
        if not target.exists() or target.read_text() != text:
            own = target.with_suffix(f".{os.getpid()}")  # workers may be at the same file
            own.write_text(text)
            own.replace(target)
        sources.append(str(target))
    sanitize = [f"-fsanitize={_SANITIZE}"] if _SANITIZE else []
    with mock.patch.dict(os.environ):
        os.environ.pop("LD_PRELOAD", None)  # a sanitizer's, not for the compiler
        cpp_extension.load(
            "adaround_emulated",
            sources,
            extra_cflags=[*_FLAGS, *sanitize, "-fno-sanitize-recover"],
            extra_ldflags=sanitize,
            extra_include_paths=[str(_HERE), str(_ROOT / "csrc")],
            build_directory=str(_BUILD),
            is_python_module=False,
        )


def as_cpp(source: str) -> str:
    """CUDA's own syntax as calls of the emulator, and the ops as the CPU's."""
    source = _SHARED.sub(r"\1* \2 = static_cast<\1*>(emulation::shared_memory());", source)
    source, launches = _LAUNCH.subn(r"emulation::launch(\2, [&] { \1(\3); });", source)
    source, ops = re.subn(r"(LIBRARY_IMPL\(\w+, )CUDA", r"\1CPU", source)
    if not launches or not ops or "<<<" in source or "extern __shared__" in source:
        raise ValueError("a launch, shared memory or the ops were not found where they should be")
    return source
