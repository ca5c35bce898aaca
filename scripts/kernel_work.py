"""Instructions a weight of the kernels that memory limits, counted in their machine code.

Of a whole chunk, on the longest way through the kernel that leaves out calls (division and square
root of denormal and huge numbers): an upper bound. An H200 starts instructions for 132 x 4 x 32
threads a cycle; what part of them a kernel needs while memory moves its bytes at full speed says
whether memory can be its limit. No GPU is needed, cuobjdump as in scripts/kernel_code.py.

    python -m scripts.kernel_work [--arch sm_90] [--output FILE.json]
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

from scripts.kernel_code import LIBRARY, command, kernel_names

_WIDTH = 4  # weights a thread: kWidth of csrc/cuda/cuda_utils.cuh
# Bytes a weight that a kernel reads and writes, float32.
BYTES = {
    "rounding_step_kernel<float, float>": 36,
    "soft_quantize_kernel<false, float>": 12,
    "soft_quantize_kernel<true, float>": 20,
    "soft_quantize_backward_kernel<float>": 16,
    "hard_quantize_kernel<float, signed char>": 9,
    "dequantize_kernel<float, signed char>": 5,
}
# NVIDIA's data sheet and the clock under load: 132 multiprocessors, 1.98 GHz, 4.8 TB/s.
_STARTS = 132 * 4 * 32 * 1.98e9  # instructions of single threads a second
_BANDWIDTH = 4.8e12
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/ +(@!?U?P\d )?([A-Z0-9_.]+)(.*?);")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code; ``target`` of a branch."""

    address: int
    conditional: bool
    name: str
    target: int | None


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other, and where it goes from there."""

    instructions: tuple[Instruction, ...]
    following: tuple[int, ...]

    @property
    def rare(self) -> bool:
        """Whether a whole chunk does not come here: calls, and accesses that may be left out."""
        return any(
            i.name.startswith("CALL") or (i.conditional and i.name.startswith(("LDG", "STG")))
            for i in self.instructions
        )


def instructions(sass: str) -> list[Instruction]:
    """Of a function, as cuobjdump prints it."""
    found = []
    for address, predicate, name, rest in _LINE.findall(sass):
        target = re.search(r"0x([0-9a-f]+) *$", rest) if name.startswith("BRA") else None
        # A branch may have its condition among its operands: BRA P1, 0x100.
        conditional = bool(predicate) or (target is not None and bool(re.search(r"!?U?P\d,", rest)))
        place = int(target.group(1), 16) if target else None
        found.append(Instruction(int(address, 16), conditional, name, place))
    return found


def blocks(code: list[Instruction]) -> dict[int, Block]:
    """By address of the first instruction."""
    starts = {code[0].address} | {i.target for i in code if i.target is not None}
    starts |= {
        after.address
        for before, after in pairwise(code)
        if before.name.startswith(("BRA", "EXIT", "RET", "CALL"))
    }
    places = [n for n, i in enumerate(code) if i.address in starts] + [len(code)]
    found = {}
    for begin, end in pairwise(places):
        part = tuple(code[begin:end])
        last = part[-1]
        following = [] if last.target is None else [last.target]
        ends = last.name.startswith(("BRA", "EXIT", "RET")) and not last.conditional
        if not ends and end < len(code):
            following.append(code[end].address)
        found[part[0].address] = Block(part, tuple(following))
    return found


def work(code: list[Instruction]) -> tuple[int, int]:
    """(instructions, those of the special function unit) of a thread for its part of a chunk."""
    graph = {start: block for start, block in blocks(code).items() if not block.rare}
    ends = {start: block.instructions[-1] for start, block in graph.items()}
    # A loop over chunks is counted once, from its head to the branch back.
    loads = [i.address for i in code if i.name.startswith("LDG")]
    back = [
        (last.target, start)
        for start, last in ends.items()
        if last.target is not None and any(last.target <= load < start for load in loads)
    ]
    first, final = (
        max(back, key=lambda edge: edge[1] - edge[0]) if back else (code[0].address, None)
    )

    @cache
    def longest(start: int) -> tuple[int, int, int]:
        """(whether it ends where it should, instructions, special ones) from a block on."""
        block = graph[start]
        special = sum(i.name.startswith("MUFU") for i in block.instructions)
        own = (len(block.instructions), special)
        if start == final or (final is None and not block.following):
            return (1, *own)
        ways = [longest(to) for to in block.following if to > start and to in graph]
        ends_well, length, rest = max(ways, default=(0, 0, 0))
        return ends_well, own[0] + length, own[1] + rest

    ends_well, length, special = longest(first) if first in graph else (0, 0, 0)
    if not ends_well:
        raise ValueError("no way through the kernel was found")
    return length, special


def count(arch: str) -> dict[str, dict[str, float]]:
    """By kernel: per weight, and the share of an H200's instructions at its full bandwidth."""
    dump = ["cuobjdump", "-arch", arch, "-sass", str(LIBRARY)]
    parts = re.split(r"Function : (\S+)", subprocess.check_output(dump, text=True))[1:]
    listings = dict(zip(kernel_names(parts[::2]), parts[1::2], strict=True))
    found = {}
    for kernel, size in BYTES.items():
        length, special = (number / _WIDTH for number in work(instructions(listings[kernel])))
        share = length * _BANDWIDTH / size / _STARTS
        found[kernel] = {
            "bytes": size,
            "instructions": length,
            "special": special,
            "share_of_h200": round(share, 3),
        }
    return found


if __name__ == "__main__":
    names = ("bytes a weight", "instructions", "special", "share of an H200's")
    command(__doc__ or "", count, names)
