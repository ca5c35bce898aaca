// refine_ on CUDA: cyclic coordinate descent over the whole grid, a block a row. The descent is the
// sequential one of cpu/loops/refine.h: the threads look at consecutive columns at once, and the
// first of them that improves is the one that the sequential scan would change next, because
// nothing before it changes.
#include <torch/csrc/stable/library.h>

#include <climits>

#include "arguments/search.h"
#include "cuda/argmin.cuh"
#include "cuda/working_memory.cuh"
#include "math/search.h"

namespace adaround_ext::cuda {
namespace {

// Rather more rows on a processor than more threads a row, since each row waits for memory; but of
// large rows no two fit.
constexpr int kMaxThreads = 1024;
constexpr int kThreadsOfMany = 256;
constexpr int kMaxBlocks = 6;  // at once on a processor of those: the registers are cut for it

// A proposal to change a column's code, by at most 255 up or down, with the thread in front: the
// least proposal is that of the first column.
constexpr int kChangeBits = 9;
constexpr int kChangeOffset = 255;

// The first proposal of every warp, for two calls of first_move() in turn.
using Keys = uint32_t[2][kMaxThreads / 32];

template <typename code_t>
struct RefinePointers {
  code_t* codes;       // [rows, cols]
  float* residual;     // [rows, cols]: error times gram (minus the constant of the asymmetric form)
  const float* gram;   // [groups, cols, cols], symmetric
  const float* scale;  // [rows or 1, n_groups]
  int64_t rows;
  int64_t rows_per_gram;
  int64_t scale_stride;  // n_groups, or 0 where all rows share the scale
  int cols;              // a Gram matrix of more columns than an int holds fits no memory
  int group_size;
  float qmin;
  float qmax;
  int64_t max_sweeps;
  bool wide;  // rows of gram and of the residual in use can be read in float4
};

// A row at work: in shared memory with its curvature where that fits, else in place.
template <typename code_t>
struct Row {
  code_t* codes;
  float* residual;
  float* curvature;  // gram[j][j] scale_j, or null: then it is computed where it is needed
  const float* gram;
  const float* scale;
};

template <bool kShared, typename code_t>
__device__ __forceinline__ float curvature_of(
    const RefinePointers<code_t>& s, const Row<code_t>& row, int j) {
  if (kShared) {
    return row.curvature[j];
  }
  const float diagonal = __ldg(row.gram + static_cast<int64_t>(j) * s.cols + j);
  return diagonal * __ldg(row.scale + j / s.group_size);
}

template <bool kShared, typename code_t>
__device__ __forceinline__ uint32_t
propose(const RefinePointers<code_t>& s, const Row<code_t>& row, int j) {
  if (j >= s.cols) {
    return kNoMove;
  }
  const float old_code = static_cast<float>(row.codes[j]);
  const float code =
      refined_code(old_code, row.residual[j], curvature_of<kShared>(s, row, j), s.qmin, s.qmax);
  if (code == old_code) {
    return kNoMove;
  }
  const int change = static_cast<int>(code - old_code);
  return threadIdx.x << kChangeBits | static_cast<uint32_t>(change + kChangeOffset);
}

// residual += delta gram_row. The row comes from the second-level cache or beyond: kBatch loads are
// on their way before the first is used.
__device__ __forceinline__ void add_row(
    float* residual, const float* gram_row, float delta, int cols, bool wide) {
  if (!wide) {
    for (int i = threadIdx.x; i < cols; i += blockDim.x) {
      residual[i] += delta * __ldg(gram_row + i);
    }
    return;
  }
  constexpr int kBatch = 4;
  float4* to = reinterpret_cast<float4*>(residual);
  const float4* from = reinterpret_cast<const float4*>(gram_row);
  const int size = cols / 4;
  const int stride = static_cast<int>(blockDim.x);
  for (int first = threadIdx.x; first < size; first += kBatch * stride) {
    float4 g[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * stride;
      g[k] = i < size ? __ldg(from + i) : float4();
    }
#pragma unroll
    for (int k = 0; k < kBatch; ++k) {
      const int i = first + k * stride;
      if (i < size) {
        const float4 r = to[i];
        to[i] = {
            r.x + delta * g[k].x, r.y + delta * g[k].y, r.z + delta * g[k].z, r.w + delta * g[k].w};
      }
    }
  }
}

template <bool kShared, typename code_t>
__device__ __forceinline__ void refine_row(
    const RefinePointers<code_t>& s, const Row<code_t>& row, Keys& keys) {
  int turn = 0;
  for (int64_t sweep = 0; sweep < s.max_sweeps; ++sweep) {
    bool changed = false;
    for (int start = 0; start < s.cols;) {
      const int column = start + static_cast<int>(threadIdx.x);
      const uint32_t key = first_move(propose<kShared>(s, row, column), keys[turn]);
      turn ^= 1;
      if (key == kNoMove) {
        start += static_cast<int>(blockDim.x);
        continue;
      }
      const int j = start + static_cast<int>(key >> kChangeBits);
      const int change = static_cast<int>(key & ((1u << kChangeBits) - 1)) - kChangeOffset;
      const float delta = static_cast<float>(change) * __ldg(row.scale + j / s.group_size);
      add_row(row.residual, row.gram + static_cast<int64_t>(j) * s.cols, delta, s.cols, s.wide);
      if (column == j) {
        row.codes[j] = static_cast<code_t>(row.codes[j] + change);
      }
      changed = true;
      start = j + 1;
      __syncthreads();  // the next proposals read what was written here
    }
    if (!changed) {
      return;
    }
  }
}

template <bool kShared, bool kAlone, typename code_t>
__global__ void __launch_bounds__(kAlone ? kMaxThreads : kThreadsOfMany, kAlone ? 1 : kMaxBlocks)
    refine_kernel(const __grid_constant__ RefinePointers<code_t> s) {
  extern __shared__ float4 row_memory[];
  __shared__ Keys keys;
  for (int64_t r = blockIdx.x; r < s.rows; r += gridDim.x) {
    code_t* codes = s.codes + r * s.cols;
    float* residual = s.residual + r * s.cols;
    Row<code_t> row{
        codes, residual, nullptr, s.gram + r / s.rows_per_gram * s.cols * s.cols,
        s.scale + r * s.scale_stride};
    if (kShared) {
      row.residual = reinterpret_cast<float*>(row_memory);
      row.curvature = row.residual + s.cols;
      row.codes = reinterpret_cast<code_t*>(row.curvature + s.cols);
      for (int j = threadIdx.x; j < s.cols; j += blockDim.x) {
        row.codes[j] = codes[j];
        row.residual[j] = residual[j];
        row.curvature[j] = curvature_of<false>(s, row, j);
      }
    }
    __syncthreads();  // the row is there, and no thread still reads the keys of the row before
    refine_row<kShared>(s, row, keys);
    if (kShared) {  // the columns that this thread brought: no barrier before the next row's
      for (int j = threadIdx.x; j < s.cols; j += blockDim.x) {
        codes[j] = row.codes[j];
        residual[j] = row.residual[j];
      }
    }
  }
}

template <bool kShared, bool kAlone, typename code_t>
void launch_refine(
    const RefinePointers<code_t>& s, int64_t row_bytes, int64_t limit, cudaStream_t stream) {
  const auto kernel = refine_kernel<kShared, kAlone, code_t>;
  allow_shared(kernel, limit);
  // A float4 of the row a thread.
  const int most = kAlone ? kMaxThreads : kThreadsOfMany;
  const int threads = std::min(std::max((s.cols + 127) / 128 * 32, 64), most);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(s.rows, INT_MAX));
  kernel<<<blocks, threads, kShared ? static_cast<size_t>(row_bytes) : 0, stream>>>(s);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename code_t>
void run_refine(
    const SearchArguments& args, const Tensor& codes, const Tensor& residual, int64_t qmin,
    int64_t qmax, int64_t max_sweeps) {
  const RowLayout layout(codes, args.gram, args.scale);
  const int64_t limit = shared_limit(codes, sizeof(Keys));
  const int64_t row_bytes = layout.cols * static_cast<int64_t>(2 * sizeof(float) + sizeof(code_t));
  const bool fits = row_bytes <= limit;
  RefinePointers<code_t> s{
      output_pointer<code_t>(codes),
      output_pointer<float>(residual),
      input_pointer<float>(args.gram),
      input_pointer<float>(args.scale),
      layout.rows,
      layout.rows_per_gram,
      layout.scale_stride,
      static_cast<int>(layout.cols),
      static_cast<int>(layout.group_size),
      static_cast<float>(qmin),
      static_cast<float>(qmax),
      max_sweeps,
      false};
  s.wide = layout.cols % 4 == 0 && aligned(s.gram) && (fits || aligned(s.residual));
  const auto launch = !fits                   ? launch_refine<false, false, code_t>
                      : 2 * row_bytes > limit ? launch_refine<true, true, code_t>
                                              : launch_refine<true, false, code_t>;
  launch(s, row_bytes, limit, current_stream(codes));
}

void refine_cuda(
    const Tensor& codes, const Tensor& residual, const Tensor& gram, const Tensor& scale,
    int64_t qmin, int64_t qmax, int64_t max_sweeps) {
  const SearchArguments args(codes, residual, gram, scale, qmin, qmax);
  check_max_sweeps(max_sweeps);
  if (codes.numel() == 0) {
    return;
  }
  const DeviceGuard guard(codes.get_device_index());
  dispatch_codes(codes.scalar_type(), [&](auto value) {
    run_refine<decltype(value)>(args, codes, residual, qmin, qmax, max_sweeps);
  });
}

}  // namespace
}  // namespace adaround_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CUDA, m) {
  m.impl("refine_", TORCH_BOX(&adaround_ext::cuda::refine_cuda));
}
