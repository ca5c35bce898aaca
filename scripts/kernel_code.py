"""Registers, stack and shared memory of every CUDA kernel, as the compiler left them.

Stack or local memory of a kernel without arrays means spilled registers. Needs cuobjdump, of the
CUDA toolkit or of ``pip install nvidia-cuda-cuobjdump``, and no GPU.

    python -m scripts.kernel_code [--arch sm_90] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks import common

LIBRARY = Path(__file__).parent.parent / "adaround_ext" / "_C_cuda.so"
_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_NAMES = ("registers", "stack", "shared", "local")


def kernel_names(mangled: Sequence[str]) -> list[str]:
    """With their template arguments, and nothing else."""
    text = subprocess.check_output(["c++filt"], input="\n".join(mangled), text=True)
    found = []
    for name in text.splitlines():
        kernel = re.search(r"(\w+(?:<[^()]*>)?)\((?!anonymous)", name)
        found.append(kernel.group(1) if kernel else name)
    return found


def usage(arch: str) -> dict[str, dict[str, int]]:
    """By kernel with its template arguments: registers a thread, bytes of the rest."""
    dump = ["cuobjdump", "-arch", arch, "--dump-resource-usage", str(LIBRARY)]
    rows = _USAGE.findall(subprocess.check_output(dump, text=True))
    names = kernel_names([name for name, *_ in rows])
    values = [dict(zip(_NAMES, map(int, numbers), strict=True)) for _, *numbers in rows]
    return dict(sorted(zip(names, values, strict=True)))


def command(
    description: str, find: Callable[[str], Mapping[str, Mapping[str, float]]], names: Sequence[str]
) -> None:
    """The command line of what ``find`` says of an architecture's kernels, under ``names``."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    found = find(options.arch)
    rows = [[kernel, *values.values()] for kernel, values in found.items()]
    common.print_table(f"Kernels for {options.arch}", ("kernel", *names), rows)
    if options.output is not None:
        facts = common.machine_facts(torch.device("cpu"))
        common.write_json(
            options.output, {"machine": facts, "arch": options.arch, "results": found}
        )


if __name__ == "__main__":
    command(__doc__ or "", usage, _NAMES)
