// What the kernels share: the stream, the walk over a matrix in chunks, packed loads and stores,
// the grid of a weight, block sums.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "arguments/checks.h"
#include "math/rounding.h"

namespace adaround_ext::cuda {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::stable::accelerator::DeviceGuard;

constexpr int kThreads = 256;              // threads a block
constexpr int kWidth = 4;                  // weights a thread: 16 bytes of float
constexpr int kChunk = kThreads * kWidth;  // weights a block

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls f with a value of the type that a weight or gradient is stored in.
template <typename F>
void dispatch_storage(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::BFloat16) {
    f(BFloat16());
  } else if (dtype == ScalarType::Half) {
    f(Half());
  } else {
    f(float());
  }
}

template <typename T>
const T* input_pointer(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
T* output_pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Blocks for `numel` weights, a chunk each. Fits a grid's x dimension for any matrix in memory.
inline int64_t chunk_count(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Whether kWidth neighbours can be moved in one access. A view with an offset may not allow it.
template <typename... T>
bool aligned(const T*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % (kWidth * sizeof(T)) == 0) && ...);
}

// n / d for 0 <= n < 2^63. With 2^(l-1) < d <= 2^l and m = floor(2^(63+l) / d) + 1, the product
// n m / 2^(63+l) exceeds n / d by less than 1 / d (Granlund & Montgomery 1994, theorem 4.2). About
// ten instructions for a division's eighty, and once for kWidth weights: no 32-bit variant needed.
struct FastDivide {
  uint64_t multiplier;
  int32_t shift;

  explicit FastDivide(int64_t divisor) : shift(0) {
    while ((int64_t{1} << shift) < divisor) {
      ++shift;
    }
    multiplier = static_cast<uint64_t>(
        (static_cast<unsigned __int128>(1) << (63 + shift)) / static_cast<uint64_t>(divisor) + 1);
  }

  __device__ __forceinline__ int64_t operator()(int64_t n) const {
    return static_cast<int64_t>(__umul64hi(multiplier, static_cast<uint64_t>(n) << 1) >> shift);
  }
};

// The grid of a matrix [rows, cols], not empty, with scale and zero_point [rows or 1, n_groups].
// Weight i = row cols + col belongs to run i / group_size = row n_groups + col / group_size.
struct GridView {
  const float* scale;
  const int32_t* zero_point;
  float qmin;
  float qmax;
  bool shared;  // by all rows
  bool wide;    // kWidth neighbours, counted from 0, share a grid
  FastDivide group_size;
  FastDivide n_groups;

  GridView(
      const Tensor& matrix, const Tensor& scale_in, const Tensor& zero_point_in, int64_t qmin_in,
      int64_t qmax_in)
      : scale(input_pointer<float>(scale_in)),
        zero_point(input_pointer<int32_t>(zero_point_in)),
        qmin(static_cast<float>(qmin_in)),
        qmax(static_cast<float>(qmax_in)),
        shared(scale_in.size(0) == 1),
        wide(matrix.size(1) / scale_in.size(1) % kWidth == 0),
        group_size(matrix.size(1) / scale_in.size(1)),
        n_groups(scale_in.size(1)),
        run_length(scale_in.size(1)) {}

  __device__ __forceinline__ Grid<float> at(int64_t i) const {
    int64_t run = group_size(i);
    if (shared) {
      run -= n_groups(run) * run_length;
    }
    return {__ldg(scale + run), static_cast<float>(__ldg(zero_point + run)), qmin, qmax};
  }

 private:
  int64_t run_length;  // n_groups
};

// The kWidth weights of a thread within a chunk: neighbours, or, where alignment, the grid or the
// end of the matrix forbid it, one every kThreads. Both are coalesced.
template <bool kWide_>
struct Span {
  static constexpr bool kWide = kWide_;
  int64_t first;
  int64_t numel;

  __device__ __forceinline__ Span(int64_t chunk, int64_t numel_in)
      : first(chunk * kChunk + (kWide ? kWidth : 1) * static_cast<int>(threadIdx.x)),
        numel(numel_in) {}

  __device__ __forceinline__ int64_t index(int e) const {
    return first + (kWide ? 1 : kThreads) * e;
  }
  __device__ __forceinline__ bool holds(int e) const { return kWide || index(e) < numel; }
};

// Calls f with the span of this thread in a chunk; the same kind for every thread of the block.
template <typename F>
__device__ __forceinline__ void with_span(bool wide, int64_t chunk, int64_t numel, const F& f) {
  if (wide && (chunk + 1) * kChunk <= numel) {
    f(Span<true>(chunk, numel));
  } else {
    f(Span<false>(chunk, numel));
  }
}

// kWidth numbers of type T as one word.
template <typename T>
using Word =
    std::conditional_t<sizeof(T) == 4, uint4, std::conditional_t<sizeof(T) == 2, uint2, uint32_t>>;

// Weights beyond the end are 1, a value every formula takes. Conversions come later: a load whose
// result is used at once would hold up the next one.
template <bool kWide, typename T>
__device__ __forceinline__ void load(T (&to)[kWidth], const T* from, const Span<kWide>& span) {
  if constexpr (kWide) {
    const Word<T> word = *reinterpret_cast<const Word<T>*>(from + span.first);
    memcpy(to, &word, sizeof word);
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      to[e] = span.holds(e) ? from[span.index(e)] : static_cast<T>(1.0f);
    }
  }
}

template <bool kWide>
__device__ __forceinline__ void load(
    Grid<float> (&to)[kWidth], const GridView& grids, const Span<kWide>& span) {
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    to[e] = kWide && e > 0 ? to[0] : grids.at(span.holds(e) ? span.index(e) : 0);
  }
}

template <bool kWide, typename T>
__device__ __forceinline__ void store(T* to, const float (&from)[kWidth], const Span<kWide>& span) {
  if constexpr (kWide) {
    T converted[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      converted[e] = static_cast<T>(from[e]);
    }
    Word<T> word;
    memcpy(&word, converted, sizeof word);
    *reinterpret_cast<Word<T>*>(to + span.first) = word;
  } else {
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      if (span.holds(e)) {
        to[span.index(e)] = static_cast<T>(from[e]);
      }
    }
  }
}

// The sum over a block of kBlock threads, in a fixed order, for thread 0. Once a kernel.
template <int kBlock>
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double warp_sums[kBlock / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x += __shfl_down_sync(0xffffffffu, x, offset);
  }
  if (threadIdx.x % 32 == 0) {
    warp_sums[threadIdx.x / 32] = x;
  }
  __syncthreads();
  double sum = 0.0;
  for (int warp = 0; warp < kBlock / 32; ++warp) {
    sum += warp_sums[warp];
  }
  return sum;
}

}  // namespace adaround_ext::cuda
