"""What stands in for CUDA where there is no GPU: its kernels (library), a device (pretended)."""

import os

EMULATED = "EMULATION_ORDER" in os.environ  # the CPU's ops run the kernels of csrc/cuda
PRETENDED = "PRETENDED_CUDA" in os.environ  # there is a device "cuda"
