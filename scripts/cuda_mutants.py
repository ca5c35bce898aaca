"""Bugs in the CUDA kernels for scripts/mutation_check.py; the tests run the kernels emulated."""

from __future__ import annotations

from scripts.mutants import Mutant

CUDA_MUTANTS = [
    # Barriers.
    Mutant(
        "a block's sum does not wait for its warps",
        "csrc/cuda/cuda_utils.cuh",
        "    warp_sums[threadIdx.x / 32] = x;\n  }\n  __syncthreads();\n",
        "    warp_sums[threadIdx.x / 32] = x;\n  }\n",
        "ops",
    ),
    Mutant(
        "the step does not wait for the schedule",
        "csrc/cuda/rounding_step.cu",
        "    __syncthreads();\n",
        "",
        "rounding_step",
    ),
    Mutant(
        "proposals are compared before all warps have one",
        "csrc/cuda/argmin.cuh",
        "    of_warps[threadIdx.x / 32] = key;\n  }\n  __syncthreads();\n",
        "    of_warps[threadIdx.x / 32] = key;\n  }\n",
        "refine",
    ),
    Mutant(
        "the next proposals do not wait for the residual",
        "csrc/cuda/refine.cu",
        "      __syncthreads();  // the next proposals read what was written here\n",
        "",
        "refine",
    ),
    Mutant(
        "proposals of two turns share their memory",
        "csrc/cuda/refine.cu",
        "      turn ^= 1;\n",
        "",
        "refine",
    ),
    Mutant(
        "the first panel is rounded before it is there",
        "csrc/cuda/gptq.cu",
        "    load_panel(s, tile, 0, panel);\n    __syncthreads();\n",
        "    load_panel(s, tile, 0, panel);\n",
        "gptq",
    ),
    Mutant(
        "the columns behind do not wait for what the panel missed",
        "csrc/cuda/gptq.cu",
        "      round_panel(s, tile, start, panel);\n      __syncthreads();\n",
        "      round_panel(s, tile, start, panel);\n",
        "gptq",
    ),
    Mutant(
        "the next panel does not wait for its shift",
        "csrc/cuda/gptq.cu",
        "      shift_behind<kRows, kSize>(s, tile, start, panel);\n      __syncthreads();\n",
        "      shift_behind<kRows, kSize>(s, tile, start, panel);\n",
        "gptq",
    ),
    Mutant(
        "the pass does not wait for the verdict",
        "csrc/cuda/tabu_search.cu",
        "    }\n    __syncthreads();\n    const Verdict verdict",
        "    }\n    const Verdict verdict",
        "tabu_search",
    ),
    Mutant(
        "the cheapest step is taken before all warps have one",
        "csrc/cuda/argmin.cuh",
        "    of_warps[threadIdx.x / 32] = of_warp;\n  }\n  __syncthreads();\n",
        "    of_warps[threadIdx.x / 32] = of_warp;\n  }\n",
        "tabu_search",
    ),
    Mutant(
        "some threads alone come to a barrier",
        "csrc/cuda/rounding_step.cu",
        "    if (threadIdx.x == 0) {\n      params = read_schedule(s.schedule, s.steps, *s.step);\n"
        "    }\n    __syncthreads();\n",
        "    if (threadIdx.x == 0) {\n      params = read_schedule(s.schedule, s.steps, *s.step);\n"
        "      __syncthreads();\n    }\n",
        "rounding_step",
    ),
    # Bounds, alignment, places.
    Mutant(
        "the end of the matrix is one weight further",
        "csrc/cuda/cuda_utils.cuh",
        "return kWide || index(e) < numel;",
        "return kWide || index(e) <= numel;",
        "ops",
    ),
    Mutant(
        "the last chunk counts as full",
        "csrc/cuda/cuda_utils.cuh",
        "if (wide && (chunk + 1) * kChunk <= numel) {",
        "if (wide) {",
        "ops",
    ),
    Mutant(
        "the last chunk is left out",
        "csrc/cuda/cuda_utils.cuh",
        "return (numel + kChunk - 1) / kChunk;",
        "return std::max<int64_t>(numel / kChunk, 1);",
        "rounding_step",
    ),
    Mutant(
        "addresses are not looked at",
        "csrc/cuda/cuda_utils.cuh",
        "return ((reinterpret_cast<uintptr_t>(pointers) % (kWidth * sizeof(T)) == 0) && ...);",
        "return sizeof...(pointers) > 0;",
        "ops rounding_step",
    ),
    Mutant(
        "a thread's weights may have two scales",
        "csrc/cuda/cuda_utils.cuh",
        "wide(matrix.size(1) / scale_in.size(1) % kWidth == 0),",
        "wide(true),",
        "ops",
    ),
    Mutant(
        "every row has the first one's scales",
        "csrc/cuda/cuda_utils.cuh",
        "shared(scale_in.size(0) == 1),",
        "shared(true),",
        "ops",
    ),
    Mutant(
        "the last columns of a row get no residual",
        "csrc/cuda/refine.cu",
        "for (int i = threadIdx.x; i < cols; i += blockDim.x) {\n      residual[i] += delta",
        "for (int i = threadIdx.x; i + 1 < cols; i += blockDim.x) {\n      residual[i] += delta",
        "refine",
    ),
    Mutant(
        "all groups have the first one's Gram matrix",
        "csrc/cuda/refine.cu",
        "s.gram + r / s.rows_per_gram * s.cols * s.cols,",
        "s.gram,",
        "refine",
    ),
    Mutant(
        "rows that are not there are rounded",
        "csrc/cuda/gptq.cu",
        "const int64_t j = k < s.cols && row < tile.rows ? __ldg(tile.order + k) : -1;",
        "const int64_t j = k < s.cols ? __ldg(tile.order + k) : -1;",
        "gptq",
    ),
    Mutant(
        "a block's scratch memory begins too late",
        "csrc/cuda/tabu_search.cu",
        "s.scratch + blockIdx.x * (Row::kBytes * s.cols)",
        "s.scratch + blockIdx.x * (Row::kBytes * s.cols) + 4 * s.cols",
        "tabu_search",
    ),
    Mutant(
        "the best codes are kept before the residual is theirs",
        "csrc/cuda/tabu_search.cu",
        "    if (verdict.improved) {  // now that",
        "    if (messages.verdict.improved && step > 1) {  // now that",
        "tabu_search",
    ),
    Mutant(
        "the last row of blocks of codes is left out",
        "csrc/cuda/pack_bits.cu",
        "return static_cast<unsigned>((blocks + kThreads - 1) / kThreads);",
        "return static_cast<unsigned>(std::max<int64_t>(blocks / kThreads, 1));",
        "packing",
    ),
    Mutant(
        "a partial block of codes is read whole",
        "csrc/cuda/pack_bits.cu",
        "address % kBlock == 0 && cols % kBlock == 0;",
        "address % kBlock == 0;",
        "packing",
    ),
]
