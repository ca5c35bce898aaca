"""AdaRound in plain PyTorch: the specification of the native ops, their oracle and the baseline.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020. Shapes and
names as in :mod:`adaround_ext.ops`. Everything here is differentiable by autograd in ``v`` and runs
in the dtype of its arguments. :func:`optimize` is the paper's whole algorithm. Nothing else in the
package imports it.
"""

from adaround_ext.reference.packing import pack_bits, packed_linear, unpack_bits
from adaround_ext.reference.paper import Optimizer, ReferenceConfig, cosine_beta, optimize
from adaround_ext.reference.rounding import (
    ADAM_BETAS,
    ADAM_EPS,
    FRACTION_MARGIN,
    GAMMA,
    ZETA,
    dequantize,
    expand_grid,
    hard_quantize,
    initial_v,
    rectified_sigmoid,
    round_reg,
    rounding_step_,
    soft_quantize,
)
from adaround_ext.reference.search import gptq, refine_, tabu_search_

__all__ = [
    "ADAM_BETAS",
    "ADAM_EPS",
    "FRACTION_MARGIN",
    "GAMMA",
    "ZETA",
    "Optimizer",
    "ReferenceConfig",
    "cosine_beta",
    "dequantize",
    "expand_grid",
    "gptq",
    "hard_quantize",
    "initial_v",
    "optimize",
    "pack_bits",
    "packed_linear",
    "rectified_sigmoid",
    "refine_",
    "round_reg",
    "rounding_step_",
    "soft_quantize",
    "tabu_search_",
    "unpack_bits",
]
