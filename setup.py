"""Builds the native libraries; all metadata is in pyproject.toml.

_C_cpu   op schemas and CPU kernels, free of Python, on LibTorch's stable ABI
_C_cuda  CUDA kernels, likewise; built where nvcc is found
_C       pybind11 module with build_info(), free of torch

Environment: FORCE_CUDA=1 fails without nvcc, USE_CUDA=0 builds without CUDA, DEBUG=1 builds with
symbols and without optimisation, SANITIZE=address,undefined or SANITIZE=thread the CPU library with
sanitizers (scripts/sanitize.sh); MAX_JOBS as in PyTorch. TORCH_CUDA_ARCH_LIST as in PyTorch, or
"all"; without it CUDA is built for the GPUs that are visible, where there are none for all.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

# Those of pyproject.toml that a build uses: without isolation nobody else looks after them.
BUILD_REQUIREMENTS = {"torch": "2.10", "pybind11": "2.13", "ninja": "", "setuptools": "77"}
# The toolkit that each needs.
DEFAULT_ARCHS = {
    "7.5": "0", "8.0": "0", "8.6": "0", "8.9": "0", "9.0": "0", "10.0": "12.8", "12.0": "12.8",
}  # fmt: skip
OLDEST_ARCH = (7, 5)


def flag(name: str, default: str = "0") -> bool:
    return os.environ.get(name, default).upper() in ("1", "ON", "YES", "TRUE")


def check_packages() -> None:
    """Ends with what is missing or too old, and the command that installs it."""
    if shutil.which("ninja") is None:  # of an environment that is not activated
        scripts = sysconfig.get_path("scripts")
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), scripts])
    wrong, wanted = [], []
    for name, least in BUILD_REQUIREMENTS.items():
        there = version_of(name)
        if there is None or (there and numbers(there) < numbers(least)):
            rule = f"{name} >= {least}" if least else name
            wrong.append(f"{rule} ({there} is installed)" if there else rule)
            wanted.append(f'"{name}>={least}"' if least else name)
    if wrong:
        sys.exit(
            f"adaround_ext: a build without isolation needs {', '.join(wrong)}: pip install "
            f"{' '.join(wanted)}, or leave out --no-build-isolation"
        )


def version_of(name: str) -> str | None:
    """Of an installed package; "" where it has none, None where it is not installed."""
    there = shutil.which(name) if name == "ninja" else importlib.util.find_spec(name)
    try:
        return importlib.metadata.version(name) if there else None
    except importlib.metadata.PackageNotFoundError:
        return ""


def numbers(version: str) -> tuple[int, ...]:
    """The first two of a version, to be compared."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def check_tools() -> None:
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        sys.exit(
            f"adaround_ext: C++ compiler {compiler!r} not found: install g++ or clang++, or set CXX"
        )
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        sys.exit(f"adaround_ext: no Python.h in {headers}: install python3-dev or python3-devel")


class Toolkit(NamedTuple):
    """CUDA's: its folder, version, and the architectures it compiles for."""

    home: str
    version: str
    archs: frozenset[tuple[int, int]]


def find_cuda() -> Toolkit | None:
    """None where CUDA is not built."""
    if not flag("USE_CUDA", "1"):
        return None
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if nvcc is None and not home:  # where it is installed, also if the path does not say so
        nvcc = shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        if flag("FORCE_CUDA"):
            sys.exit("adaround_ext: FORCE_CUDA is set but nvcc was not found: set CUDA_HOME")
        return None
    if not home:  # nvcc itself knows, also behind links and wrapper scripts
        trial = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        text = subprocess.run(trial, capture_output=True, text=True, check=True).stderr
        home = os.path.realpath(re.search(r"TOP=(.+)", text).group(1))
    version = re.search(
        r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True)
    ).group(1)
    known = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)
    archs = frozenset((int(a), int(b)) for a, b in re.findall(r"compute_(\d+)(\d)\b", known))
    return Toolkit(home, version, archs)


def visible_gpus() -> list[tuple[int, int]]:
    """Their compute capabilities, each once, by the torch that builds."""
    import torch

    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    return sorted({torch.cuda.get_device_capability(index) for index in range(count)})


def choose_archs(asked: str, toolkit: Toolkit, gpus: Sequence[tuple[int, int]]) -> tuple[str, str]:
    """What TORCH_CUDA_ARCH_LIST shall be, and the reason."""
    every = [a for a, least in DEFAULT_ARCHS.items() if numbers(toolkit.version) >= numbers(least)]
    if asked.lower() == "all":
        return ";".join(every) + "+PTX", "TORCH_CUDA_ARCH_LIST=all"
    if asked:
        return asked, "TORCH_CUDA_ARCH_LIST"
    if not gpus:
        return ";".join(every) + "+PTX", "no GPU is visible"
    unknown = [f"{a}.{b}" for a, b in gpus if (a, b) not in toolkit.archs or (a, b) < OLDEST_ARCH]
    if unknown:
        return ";".join(every) + "+PTX", f"{', '.join(unknown)} cannot be compiled for"
    return ";".join(f"{a}.{b}" for a, b in gpus) + "+PTX", "what is visible here"


def announcements(
    toolkit: Toolkit | None, archs: str, reason: str, torch_cuda: str
) -> Iterator[str]:
    """What the builder should know before it takes minutes, or is not what was meant."""
    if toolkit is None:
        meant = not flag("USE_CUDA", "1")
        yield f"building for CPU only ({'USE_CUDA=0' if meant else 'no nvcc'})"
        if torch_cuda and not meant:
            yield (
                f"WARNING: this torch has CUDA {torch_cuda}, but no nvcc was found: tensors on a "
                f"GPU will be refused. Install the CUDA toolkit {torch_cuda}, or set CUDA_HOME to "
                "where it is, and build again (FORCE_CUDA=1 fails where it is not found); "
                "USE_CUDA=0 says that the CPU alone is meant"
            )
        return
    count = len(re.findall(r"\d+\.\d+", archs))
    yield f"building for CPU and CUDA {archs} ({reason})"
    if count > 1:
        yield (
            f"{count} architectures take about {count + 1} minutes on two cores: "
            "TORCH_CUDA_ARCH_LIST=9.0 builds for one, USE_CUDA=0 for the CPU alone"
        )
    if not torch_cuda:
        yield "this torch has no CUDA and will not load what is built for it: USE_CUDA=0 saves that"


def main() -> None:
    check_packages()
    check_tools()
    import torch
    from pybind11.setup_helpers import Pybind11Extension
    from setuptools import setup
    from torch.utils import cpp_extension

    version = re.search(r'^version = "(.+)"', Path("pyproject.toml").read_text(), re.M).group(1)
    toolkit, archs, reason = find_cuda(), "", ""
    if toolkit is not None:
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        archs, reason = choose_archs(asked, toolkit, [] if asked else visible_gpus())
        os.environ["TORCH_CUDA_ARCH_LIST"] = archs
    said = list(announcements(toolkit, archs, reason, torch.version.cuda or ""))

    optimise = ["-O0", "-g"] if flag("DEBUG") else ["-O3"]
    # Not -ffast-math: it would flush denormals in the whole process and break NaN checks.
    cxx = [
        "-g0",  # Python's own flags have -g
        *optimise,
        "-std=c++17",
        "-fvisibility=hidden",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
    ]
    cxx += ["-Wno-maybe-uninitialized"]  # gcc's own AVX-512 header
    sanitize = [f"-fsanitize={kinds}"] if (kinds := os.environ.get("SANITIZE")) else []
    if sanitize:
        cxx += [*sanitize, "-fno-sanitize-recover", "-fno-omit-frame-pointer", "-g1", "-O1"]
        cxx += ["-fexpensive-optimizations"]  # for the fused multiply-adds of -O3
        cxx += ["-fno-sanitize-address-use-after-scope"]  # of every inlined vector: twice the build
    stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # the oldest torch to load it: 2.10
    nvcc = [*optimise, "-std=c++17", "-DUSE_CUDA", *stable]

    sources = os.path.abspath("csrc")  # ninja runs elsewhere
    extensions = [
        Pybind11Extension(
            "adaround_ext._C",
            ["csrc/bindings.cpp"],
            include_dirs=[sources],
            cxx_std=17,
            define_macros=[
                ("ADAROUND_VERSION", f'"{version}"'),
                ("ADAROUND_TORCH_VERSION", f'"{torch.__version__}"'),
                ("ADAROUND_CUDA_VERSION", f'"{toolkit.version if toolkit else ""}"'),
                ("ADAROUND_CUDA_ARCHS", f'"{archs}"'),
            ],
            extra_compile_args=["-O2"],
        ),
        cpp_extension.CppExtension(
            "adaround_ext._C_cpu",
            ["csrc/library.cpp", *sorted(glob.glob("csrc/cpu/**/*.cpp", recursive=True))],
            include_dirs=[sources],
            extra_compile_args={"cxx": cxx + stable},
            extra_link_args=sanitize,
            py_limited_api=True,
        ),
    ]
    if toolkit is not None:
        cpp_extension.CUDA_HOME = toolkit.home  # None under a CPU-only torch even where nvcc exists
        # Under a CPU-only torch ninja is not told which headers a .cu reads: it would keep old
        # objects.
        torch.version.cuda = torch.version.cuda or toolkit.version
        extensions.append(
            cpp_extension.CppExtension(
                "adaround_ext._C_cuda",
                sorted(glob.glob("csrc/cuda/*.cu")),
                include_dirs=[sources, f"{toolkit.home}/include"],
                library_dirs=[f"{toolkit.home}/lib64", f"{toolkit.home}/lib"],
                libraries=["cudart_static", "rt", "dl", "pthread"],
                # libtorch.so is what brings in libtorch_cuda where torch has CUDA.
                extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
                extra_compile_args={"cxx": cxx + stable, "nvcc": nvcc},
                py_limited_api=True,
            )
        )

    class BuildExtension(cpp_extension.BuildExtension):
        """Op libraries are not Python modules: the same file serves every Python version."""

        def get_ext_filename(self, name: str) -> str:
            if name.rsplit(".", 1)[-1] in ("_C_cpu", "_C_cuda"):
                return name.replace(".", os.sep) + ".so"
            return super().get_ext_filename(name)

        def get_export_symbols(self, ext):
            return []

        def build_extensions(self) -> None:
            for line in said:
                print(f"adaround_ext: {line}", file=sys.stderr, flush=True)
            if self.editable_mode:
                self.build_temp = (
                    "build/editable"  # pip's own is new each time: no incremental build
                )
            super().build_extensions()

    setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})


if __name__ == "__main__":  # also for pip
    main()
