"""AdaRound, learned weight rounding for post-training quantization, with fused native kernels."""

from adaround_ext.native import build_info

__all__ = ["build_info"]
