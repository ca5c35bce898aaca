// Argmin over a block: of the changes of a code that its threads propose the first, and the
// cheapest. The first column's where several cost the same, so neither depends on how columns are
// dealt out to threads.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace adaround_ext::cuda {

constexpr float kForbidden = 3e38f;  // the cost of no change
constexpr uint32_t kNoMove = 0xffffffffu;

// A change of one code, or none. The least move is the first column's.
struct Candidate {
  float cost = kForbidden;  // candidates cost less
  uint32_t move = kNoMove;  // 2 column, + 1 where up
};

// The same, with the cost as an unsigned number of the same order.
struct Key {
  uint32_t cost;
  uint32_t move;
};

// Unsigned numbers in the order of floats, and back. -0 becomes 0: they are one cost.
__device__ __forceinline__ uint32_t to_ordered(float x) {
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float from_ordered(uint32_t bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

__device__ __forceinline__ uint32_t warp_min(uint32_t x) {
#if __CUDA_ARCH__ >= 800
  return __reduce_min_sync(0xffffffffu, x);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    x = min(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
#endif
}

__device__ __forceinline__ Key warp_cheapest(const Key& key) {
  const uint32_t cost = warp_min(key.cost);
  return {cost, warp_min(key.cost == cost ? key.move : kNoMove)};
}

// The cheapest candidate of the block, for every thread. A barrier must come before the next call.
__device__ __forceinline__ Key cheapest(const Candidate& own, Key* of_warps) {
  const Key of_warp = warp_cheapest({to_ordered(own.cost), own.move});
  const int lane = static_cast<int>(threadIdx.x % 32);
  if (lane == 0) {
    of_warps[threadIdx.x / 32] = of_warp;
  }
  __syncthreads();
  const bool there = lane < static_cast<int>(blockDim.x / 32);
  return warp_cheapest(there ? of_warps[lane] : Key{kNoMove, kNoMove});
}

// The first proposal of the block, for every thread: the least key where the keys of a warp, but
// for kNoMove, rise with the lane. `of_warps` may not be that of the call before: a slow thread may
// still be reading it.
__device__ __forceinline__ uint32_t first_move(uint32_t key, uint32_t* of_warps) {
  const unsigned mask = __ballot_sync(0xffffffffu, key != kNoMove);
  const int first_lane = mask ? __ffs(static_cast<int>(mask)) - 1 : 0;
  if (static_cast<int>(threadIdx.x % 32) == first_lane) {
    of_warps[threadIdx.x / 32] = key;
  }
  __syncthreads();
  uint32_t first = kNoMove;
  for (int warp = 0; warp < static_cast<int>(blockDim.x / 32); ++warp) {
    first = min(first, of_warps[warp]);
  }
  return first;
}

}  // namespace adaround_ext::cuda
