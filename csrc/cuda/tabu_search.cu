// tabu_search_ on CUDA: a block a row. The search is that of cpu/loops/tabu_search.h, step by step:
// one pass puts the step before into the residual and looks for the next one. Every thread has
// columns of its own, whose residual and codes no other thread touches. Two barriers a step:
//   - within the pass, before its arithmetic: what thread 0 says about the step before is there;
//   - after the pass: the cheapest step of every warp is there.
#include <torch/csrc/stable/library.h>

#include "arguments/search.h"
#include "cuda/argmin.cuh"
#include "cuda/working_memory.cuh"
#include "math/search.h"

namespace adaround_ext::cuda {
namespace {

constexpr int kMaxThreads = 1024;  // where one block fits onto a processor, else half of them
constexpr int kMaxBlocks = 3;      // at once on a processor of those: the registers are cut for it
constexpr int kPacks = 2;  // packs of columns that a thread has, as long as there are threads
constexpr int kBatch = 2;  // packs on their way from the Gram matrix at once

struct TabuPointers {
  uint8_t* codes;      // [rows, cols]: the best so far, as is the residual
  float* residual;     // [rows, cols]: error times gram (minus the constant of the asymmetric form)
  const float* gram;   // [groups, cols, cols], symmetric
  const float* scale;  // [rows or 1, n_groups]
  uint8_t* scratch;    // [blocks, Row::kBytes cols], where shared memory does not do
  int64_t rows;
  int64_t rows_per_gram;
  int64_t scale_stride;  // n_groups, or 0 where all rows share the scale
  int cols;              // a Gram matrix of more columns than an int holds fits no memory
  int group_size;
  uint32_t sign;  // (codes ^ sign) - lowest counts from 0 to span, whether codes are signed or not
  uint32_t lowest;
  uint32_t span;  // qmax - qmin
  uint32_t steps;
  uint64_t seed;
};

// The row at work. mark: the code, counted from qmin, in the low 8 bits, and above them the step
// from which the column may be changed again, at most kMaxTabuSteps + cols / 20, which 24 bits
// hold.
struct Row {
  static constexpr int64_t kBytes = 3 * sizeof(float) + sizeof(uint32_t);  // a column
  float* residual;
  float* scale;
  float* curvature;  // gram[j][j] scale_j, infinite where that is not positive: no step is cheap
  uint32_t* mark;
  uint8_t* best_codes;  // in the outputs, as is the next
  float* best_residual;

  __device__ __forceinline__ Row(const TabuPointers& s, int64_t r, void* memory)
      : residual(static_cast<float*>(memory)),
        scale(residual + s.cols),
        curvature(scale + s.cols),
        mark(reinterpret_cast<uint32_t*>(curvature + s.cols)),
        best_codes(s.codes + r * s.cols),
        best_residual(s.residual + r * s.cols) {}
};

// What thread 0 says about the step that the block has decided on.
struct Verdict {
  float aspiration;    // what must cost less for a resting column to change
  uint32_t free_from;  // for the changed column
  bool improved;       // the new codes are the best so far
};

struct Messages {
  Key keys[kMaxThreads / 32];  // of each warp
  Verdict verdict;
};

// One pack of columns: the step before comes into the residual, and the cheapest of the steps that
// are allowed now into `least`. This is where the time goes: code_step in integers, no branch, and
// the direction, which is the residual's, is left for later.
template <int kSize>
__device__ __forceinline__ void pass_over(
    const TabuPointers& s, const Row& row, int index, const Pack<float, kSize>& gram_row,
    float delta, uint32_t step, float aspiration, Candidate& least) {
  Pack<float, kSize> residual = pack<kSize>(row.residual, index);
  const Pack<float, kSize> scale = pack<kSize>(row.scale, index);
  const Pack<float, kSize> curvature = pack<kSize>(row.curvature, index);
  const Pack<uint32_t, kSize> mark = pack<kSize>(row.mark, index);
  const uint32_t now = step << 8 | 0xffu;
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    residual.at[e] += delta * gram_row.at[e];
    const float cost = code_step_cost(residual.at[e], scale.at[e], curvature.at[e]);
    const float with_margin = code_step_with_margin(cost, scale.at[e], curvature.at[e]);
    const uint32_t end = residual.at[e] >= 0.0f ? 0u : s.span;  // of the grid, that way
    const bool allowed = (now >= mark.at[e]) | (with_margin < aspiration);
    const bool better = allowed & ((mark.at[e] & 0xffu) != end) & (cost < least.cost);
    least.cost = better ? cost : least.cost;
    least.move = better ? static_cast<uint32_t>(kSize * index + e) : least.move;
  }
  pack<kSize>(row.residual, index) = residual;
}

// Puts this thread's columns into the outputs.
template <int kSize>
__device__ __forceinline__ void keep(const TabuPointers& s, const Row& row) {
  for (int i = threadIdx.x; i < s.cols / kSize; i += blockDim.x) {
    const Pack<uint32_t, kSize> mark = pack<kSize>(row.mark, i);
    Pack<uint8_t, kSize> codes;
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      codes.at[e] = static_cast<uint8_t>((mark.at[e] + s.lowest) ^ s.sign);
    }
    pack<kSize>(row.best_codes, i) = codes;
    pack<kSize>(row.best_residual, i) = pack<kSize>(row.residual, i);
  }
}

// Leaves the best codes and their residual in the outputs, which hold the first ones.
template <int kSize>
__device__ __forceinline__ void search_row(
    const TabuPointers& s, const Row& row, const float* gram, Messages& messages) {
  const int size = s.cols / kSize;
  const int stride = static_cast<int>(blockDim.x);
  const int thread = static_cast<int>(threadIdx.x);
  uint64_t random = s.seed;                // thread 0 uses these three
  double change = 0.0, best_change = 0.0;  // of the objective since the beginning
  if (thread == 0) {
    messages.verdict = {0.0f, 0, false};
  }
  float delta = 0.0f;
  const float* gram_row = gram;
  Key before{};                 // the step before
  uint32_t own_move = kNoMove;  // the same, where it is in a column of this thread
  for (uint32_t step = 0; step <= s.steps; ++step) {  // the last pass settles the last step
    Pack<float, kSize> factors[kBatch];
    const auto load = [&](int first) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int i = first + k * stride;
        factors[k] = i < size ? pack<kSize>(gram_row, i) : Pack<float, kSize>();
      }
    };
    load(thread);
    if (thread == 0 && step > 0) {  // while the loads are on their way
      change += static_cast<double>(from_ordered(before.cost));
      const auto tenure = static_cast<uint32_t>(tabu_tenure(s.cols, random));
      const bool improved = change < best_change;
      best_change = improved ? change : best_change;
      messages.verdict = {static_cast<float>(best_change - change), step - 1 + tenure, improved};
    }
    __syncthreads();
    const Verdict verdict = messages.verdict;
    if (own_move != kNoMove) {
      uint32_t& mark = row.mark[own_move / 2];
      const uint32_t code = (mark & 0xffu) + (own_move % 2 ? 1u : -1u);
      mark = verdict.free_from << 8 | code;
    }
    Candidate least;
    for (int first = thread;;) {
#pragma unroll
      for (int k = 0; k < kBatch; ++k) {
        const int i = first + k * stride;
        if (i < size) {
          pass_over<kSize>(s, row, i, factors[k], delta, step, verdict.aspiration, least);
        }
      }
      first += kBatch * stride;
      if (first >= size) {
        break;
      }
      load(first);
    }
    if (verdict.improved) {  // now that the residual belongs to the codes
      keep<kSize>(s, row);
    }
    if (step == s.steps) {
      return;
    }
    if (least.move != kNoMove) {  // a column so far
      least.move = 2u * least.move + !(row.residual[least.move] >= 0.0f);
    }
    before = cheapest(least, messages.keys);
    if (before.move == kNoMove) {
      return;
    }
    own_move = least.move == before.move ? least.move : kNoMove;
    const auto j = static_cast<int>(before.move / 2);
    delta = before.move % 2 ? row.scale[j] : -row.scale[j];
    gram_row = gram + static_cast<int64_t>(j) * s.cols;
  }
}

template <bool kShared, int kSize, bool kAlone>
__global__ void __launch_bounds__(
    kAlone ? kMaxThreads : kMaxThreads / 2, kAlone ? 1 : (kShared ? kMaxBlocks : 2))
    tabu_search_kernel(const __grid_constant__ TabuPointers s) {
  extern __shared__ float4 row_memory[];
  __shared__ Messages messages;
  for (int64_t r = blockIdx.x; r < s.rows; r += gridDim.x) {
    const Row row(
        s, r,
        kShared ? static_cast<void*>(row_memory) : s.scratch + blockIdx.x * (Row::kBytes * s.cols));
    const float* gram = s.gram + r / s.rows_per_gram * s.cols * s.cols;
    const float* scale = s.scale + r * s.scale_stride;
    __syncthreads();  // no thread is still at the row before
    // A thread brings the columns that it has in the search.
    for (int i = threadIdx.x; i < s.cols / kSize; i += blockDim.x) {
      for (int j = kSize * i; j < kSize * (i + 1); ++j) {
        row.residual[j] = row.best_residual[j];
        row.scale[j] = __ldg(scale + j / s.group_size);
        const float curvature = __ldg(gram + static_cast<int64_t>(j) * s.cols + j) * row.scale[j];
        row.curvature[j] = curvature > 0.0f ? curvature : INFINITY;
        row.mark[j] = (row.best_codes[j] ^ s.sign) - s.lowest;
      }
    }
    search_row<kSize>(s, row, gram, messages);
  }
}

template <bool kShared, int kSize, bool kAlone>
void launch_tabu_search(TabuPointers s, const Tensor& codes, int64_t bytes, int64_t limit) {
  const auto kernel = tabu_search_kernel<kShared, kSize, kAlone>;
  const int wanted = (s.cols / kSize + 32 * kPacks - 1) / (32 * kPacks) * 32;
  const int threads = std::min(wanted, kAlone ? kMaxThreads : kMaxThreads / 2);
  const WorkingMemory memory(kernel, kShared, codes, threads, s.rows, bytes, limit);
  s.scratch = memory.scratch ? output_pointer<uint8_t>(*memory.scratch) : nullptr;
  kernel<<<memory.blocks, threads, memory.shared_bytes, current_stream(codes)>>>(s);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void tabu_search_cuda(
    const Tensor& codes, const Tensor& residual, const Tensor& gram, const Tensor& scale,
    int64_t qmin, int64_t qmax, int64_t steps, int64_t seed) {
  const SearchArguments args(codes, residual, gram, scale, qmin, qmax);
  check_tabu_steps(steps, seed);
  if (codes.numel() == 0) {
    return;
  }
  const DeviceGuard guard(codes.get_device_index());
  const RowLayout layout(codes, args.gram, args.scale);
  const int sign = qmin < 0 ? 0x80 : 0;
  const TabuPointers s{
      output_pointer<uint8_t>(codes),
      output_pointer<float>(residual),
      input_pointer<float>(args.gram),
      input_pointer<float>(args.scale),
      nullptr,
      layout.rows,
      layout.rows_per_gram,
      layout.scale_stride,
      static_cast<int>(layout.cols),
      static_cast<int>(layout.group_size),
      static_cast<uint32_t>(sign),
      static_cast<uint32_t>(qmin + sign),
      static_cast<uint32_t>(qmax - qmin),
      static_cast<uint32_t>(steps),
      static_cast<uint64_t>(seed)};
  const int64_t limit = shared_limit(codes, sizeof(Messages));
  const int64_t bytes = Row::kBytes * layout.cols;
  const bool wide = layout.cols % 4 == 0 && aligned(s.gram, s.residual) && aligned(s.codes);
  const auto run = [&](auto kShared, auto kAlone) {
    const auto launch =
        wide ? launch_tabu_search<kShared, 4, kAlone> : launch_tabu_search<kShared, 1, kAlone>;
    launch(s, codes, bytes, limit);
  };
  using Yes = std::true_type;
  using No = std::false_type;
  if (bytes > limit) {
    run(No(), No());
  } else if (2 * bytes > limit) {
    run(Yes(), Yes());
  } else {
    run(Yes(), No());
  }
}

}  // namespace
}  // namespace adaround_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CUDA, m) {
  m.impl("tabu_search_", TORCH_BOX(&adaround_ext::cuda::tabu_search_cuda));
}
