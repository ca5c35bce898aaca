"""The CUDA kernels without a GPU: compiled for the processor, in the place of the CPU's kernels."""
