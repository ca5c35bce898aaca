// Takes the place of the CUDA runtime: the kernels of csrc/cuda, compiled for the processor, run
// here a block after the other, with the threads of a block as fibers. Only what the kernels use.
//
// A kernel is stopped with a message where CUDA would hang or leave the result undefined: at a
// barrier or a warp's exchange that not all threads reach. A missing barrier shows as a wrong
// result: blocks, warps and lanes run in the order of EMULATION_ORDER, forward, backward or
// random, and a warp runs ahead of others as far as barriers let it. Dynamic shared memory is
// full of NaN at the start of a block and EMULATION_SHARED bytes large.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

#undef STD_CUDA_CHECK
#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_CHECK(call) static_cast<void>(call)
#define STD_CUDA_KERNEL_LAUNCH_CHECK() static_cast<void>(0)

using cudaStream_t = void*;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x;
};

namespace emulation {

// Of the thread that runs.
extern dim3 thread, block, block_size, grid_size;

// Runs `kernel`, a call with its arguments, for every thread of every block.
void launch(
    unsigned blocks, int threads, size_t shared_bytes, cudaStream_t stream,
    const std::function<void()>& kernel);

void* shared_memory();
int shared_memory_size();

// Waits for all threads of the block.
void barrier();

// Waits for all lanes of the warp; the values that they brought, by lane.
const uint64_t* exchange(uint64_t value);

template <typename T>
T lane_value(T value, int lane) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  memcpy(&value, &exchange(bits)[lane], sizeof value);
  return value;
}

inline int lane() { return static_cast<int>(thread.x % 32); }

}  // namespace emulation

#define threadIdx emulation::thread
#define blockIdx emulation::block
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

using std::max;
using std::min;

inline void __syncthreads() { emulation::barrier(); }

template <typename T>
T __ldg(const T* from) {
  return *from;
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::lane_value(value, lane);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::lane_value(value, emulation::lane() ^ mask);
}

// Beyond the last lane there is nothing: a lane gets its own value.
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const int from = emulation::lane() + delta;
  return emulation::lane_value(value, from < 32 ? from : emulation::lane());
}

inline unsigned __ballot_sync(unsigned, bool vote) {
  const uint64_t* votes = emulation::exchange(vote);
  unsigned mask = 0;
  for (int lane = 0; lane < 32; ++lane) {
    mask |= static_cast<unsigned>(votes[lane]) << lane;
  }
  return mask;
}

inline int __ffs(int mask) { return __builtin_ffs(mask); }

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64);
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };

inline int cudaDeviceGetAttribute(int* value, int attribute, int) {
  const bool shared = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin;
  *value = shared ? emulation::shared_memory_size() : 2;
  return 0;
}

// A driver counts in units, static and dynamic memory apart: no odd bytes may be asked for.
template <typename Kernel>
int cudaFuncSetAttribute(Kernel*, int, int bytes) {
  return bytes % 16;
}

template <typename Kernel>
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return 0;
}

inline int cudaMemsetAsync(void* to, int byte, size_t size, cudaStream_t) {
  memset(to, byte, size);
  return 0;
}

inline int aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }
