// What a block works in: shared memory where its rows fit, else memory of its own on the device;
// and the packed accesses to either.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <climits>
#include <optional>

#include "cuda/cuda_utils.cuh"

namespace adaround_ext::cuda {

// The shared memory that a block of this device can have beside `fixed` bytes: in whole units,
// since the device counts with both rounded up.
inline int64_t shared_limit(const Tensor& on, size_t fixed) {
  int bytes = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(
      &bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, on.get_device_index()));
  constexpr int64_t kUnit = 128;
  return (bytes - static_cast<int64_t>(fixed)) / kUnit * kUnit;
}

inline int processor_count(const Tensor& on) {
  int count = 0;
  STD_CUDA_CHECK(
      cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, on.get_device_index()));
  return count;
}

// Lets a kernel have all the shared memory there is, whatever it needs now: another host thread may
// be launching it too.
template <typename... Args>
void allow_shared(void (*kernel)(Args...), int64_t limit) {
  STD_CUDA_CHECK(cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit)));
}

// A launch over `items`, each block with `bytes` to work in.
struct WorkingMemory {
  unsigned blocks;
  size_t shared_bytes = 0;
  std::optional<Tensor> scratch;  // [blocks, bytes], where shared memory does not do

  template <typename... Args>
  WorkingMemory(
      void (*kernel)(Args...), bool shared, const Tensor& on, int threads, int64_t items,
      int64_t bytes, int64_t limit)
      : blocks(static_cast<unsigned>(std::min<int64_t>(items, INT_MAX))) {
    if (shared) {
      allow_shared(kernel, limit);
      shared_bytes = static_cast<size_t>(bytes);
      return;
    }
    int per_processor = 0;
    STD_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0));
    const int at_once = per_processor * processor_count(on);
    blocks = std::min(blocks, static_cast<unsigned>(at_once));
    const int64_t shape[] = {blocks, bytes};
    scratch = torch::stable::new_empty(on, {shape, 2}, ScalarType::Byte);
  }
};

// kSize neighbours, in one access where they are 16 bytes.
template <typename T, int kSize>
struct alignas(kSize * sizeof(T)) Pack {
  T at[kSize];
};

template <int kSize, typename T>
__device__ __forceinline__ Pack<T, kSize>& pack(T* array, int index) {
  return reinterpret_cast<Pack<T, kSize>*>(array)[index];
}

// Not __ldg: the compiler moves that behind a barrier, and then nothing waits while it is loading.
template <int kSize, typename T>
__device__ __forceinline__ const Pack<T, kSize>& pack(const T* array, int index) {
  return reinterpret_cast<const Pack<T, kSize>*>(array)[index];
}

}  // namespace adaround_ext::cuda
