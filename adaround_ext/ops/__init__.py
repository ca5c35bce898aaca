"""The native ops: for each a typed wrapper, its fake kernel and, where it has one, its autograd.

``weight`` is the layer in matrix form [rows, cols], rows being output channels. ``scale`` and
``zero_point`` (int32) have shape [rows or 1, n_groups]: the columns are cut into n_groups equal
runs. ``qmin`` and ``qmax`` lie in [-128, 127] (codes int8) or [0, 255] (codes uint8). ``weight`` is
float32, bfloat16 or float16, on the CPU also float64; ``v``, the moments and ``scale`` are float32,
or float64 beside a float64 weight; arithmetic is float32 (float64). Arguments that are written must
be contiguous and share no memory with others (what lies between the elements of a strided one
counts as its own); those that are read may have any strides.
Every op raises ValueError with a message that names the argument, the rule and what came;
RuntimeError where memory is short, from fake kernels, and from torch 2.15 on, which translates all
C++ exceptions alike.
The source is Nagel et al., "Up or Down?", ICML 2020; formulas: csrc/math.
"""

from adaround_ext.ops.packing import pack_bits, packed_linear, unpack_bits
from adaround_ext.ops.rounding import (
    dequantize,
    hard_quantize,
    rounding_step_,
    soft_quantize,
    soft_quantize_with_grad,
)
from adaround_ext.ops.search import gptq, refine_, tabu_search_

__all__ = [
    "dequantize",
    "gptq",
    "hard_quantize",
    "pack_bits",
    "packed_linear",
    "refine_",
    "rounding_step_",
    "soft_quantize",
    "soft_quantize_with_grad",
    "tabu_search_",
    "unpack_bits",
]
