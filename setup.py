"""Builds the native libraries; all metadata is in pyproject.toml.

_C_cpu   op schemas and CPU kernels, free of Python, on LibTorch's stable ABI
_C_cuda  CUDA kernels, likewise; built where nvcc is found
_C       pybind11 module with build_info(), free of torch

Environment: FORCE_CUDA=1 fails without nvcc, USE_CUDA=0 builds without CUDA, DEBUG=1 builds with
symbols and without optimisation, SANITIZE=address,undefined or SANITIZE=thread the CPU library with
sanitizers (scripts/sanitize.sh); TORCH_CUDA_ARCH_LIST and MAX_JOBS as in PyTorch.
"""

import glob
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

try:
    import torch
    from pybind11.setup_helpers import Pybind11Extension
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(
        f"adaround_ext: {error.name} is needed to build; leave out --no-build-isolation or install "
        "torch>=2.10, pybind11, ninja, packaging and setuptools first"
    )

MIN_TORCH = (2, 10)
DEFAULT_ARCHS = {"7.5": 0, "8.0": 0, "8.6": 0, "8.9": 0, "9.0": 0, "10.0": 12.8, "12.0": 12.8}


def flag(name: str, default: str = "0") -> bool:
    return os.environ.get(name, default).upper() in ("1", "ON", "YES", "TRUE")


def check_tools() -> None:
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < MIN_TORCH:
        sys.exit(f"adaround_ext: needs torch >= 2.10, found {torch.__version__}")
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        sys.exit(
            f"adaround_ext: C++ compiler {compiler!r} not found: install g++ or clang++, or set CXX"
        )
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        sys.exit(f"adaround_ext: no Python.h in {headers}: install python3-dev or python3-devel")


def find_cuda() -> tuple[str, str]:
    """(toolkit folder, version), or empty strings where CUDA is not built."""
    if not flag("USE_CUDA", "1"):
        return "", ""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which(f"{home}/bin/nvcc" if home else "nvcc")
    if nvcc is None:
        if flag("FORCE_CUDA"):
            sys.exit("adaround_ext: FORCE_CUDA is set but nvcc was not found: set CUDA_HOME")
        return "", ""
    if not home:  # nvcc itself knows, also behind links and wrapper scripts
        trial = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        text = subprocess.run(trial, capture_output=True, text=True, check=True).stderr
        home = os.path.realpath(re.search(r"TOP=(.+)", text).group(1))
    text = subprocess.check_output([nvcc, "--version"], text=True)
    return home, re.search(r"release (\d+\.\d+)", text).group(1)


check_tools()
version = re.search(r'^version = "(.+)"', Path("pyproject.toml").read_text(), re.M).group(1)
cuda_home, cuda_version = find_cuda()
archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
if cuda_home and not archs:
    archs = ";".join(a for a, least in DEFAULT_ARCHS.items() if float(cuda_version) >= least)
    archs += "+PTX"
    os.environ["TORCH_CUDA_ARCH_LIST"] = archs

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
stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # the oldest torch that can load it: 2.10
nvcc = [*optimise, "-std=c++17", "-DUSE_CUDA", *stable]

extensions = [
    Pybind11Extension(
        "adaround_ext._C",
        ["csrc/bindings.cpp"],
        cxx_std=17,
        define_macros=[
            ("ADAROUND_VERSION", f'"{version}"'),
            ("ADAROUND_TORCH_VERSION", f'"{torch.__version__}"'),
            ("ADAROUND_CUDA_VERSION", f'"{cuda_version}"'),
            ("ADAROUND_CUDA_ARCHS", f'"{archs if cuda_home else ""}"'),
        ],
        extra_compile_args=["-O2"],
    ),
    cpp_extension.CppExtension(
        "adaround_ext._C_cpu",
        ["csrc/library.cpp", *sorted(glob.glob("csrc/cpu/*.cpp"))],
        extra_compile_args={"cxx": cxx + stable},
        extra_link_args=sanitize,
        py_limited_api=True,
    ),
]
if cuda_home:
    cpp_extension.CUDA_HOME = cuda_home  # None under a CPU-only torch even where nvcc exists
    # Under a CPU-only torch ninja is not told which headers a .cu reads: it would keep old objects.
    torch.version.cuda = torch.version.cuda or cuda_version
    extensions.append(
        cpp_extension.CppExtension(
            "adaround_ext._C_cuda",
            sorted(glob.glob("csrc/cuda/*.cu")),
            include_dirs=[f"{cuda_home}/include"],
            library_dirs=[f"{cuda_home}/lib64", f"{cuda_home}/lib"],
            libraries=["cudart_static", "rt", "dl", "pthread"],
            # libtorch.so is what brings in libtorch_cuda where torch has CUDA.
            extra_link_args=["-Wl,--no-as-needed", "-ltorch"],
            extra_compile_args={"cxx": cxx + stable, "nvcc": nvcc},
            py_limited_api=True,
        )
    )
without = "no nvcc" if flag("USE_CUDA", "1") else "USE_CUDA=0"
print(f"adaround_ext: building for CPU {'and CUDA ' + archs if cuda_home else f'only ({without})'}")


class BuildExtension(cpp_extension.BuildExtension):
    """Op libraries are not Python modules: the same file serves every Python version."""

    def get_ext_filename(self, name: str) -> str:
        if name.rsplit(".", 1)[-1] in ("_C_cpu", "_C_cuda"):
            return name.replace(".", os.sep) + ".so"
        return super().get_ext_filename(name)

    def get_export_symbols(self, ext):
        return []

    def build_extensions(self) -> None:
        if self.editable_mode:
            self.build_temp = "build/editable"  # pip's own is new each time: no incremental build
        super().build_extensions()


setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
