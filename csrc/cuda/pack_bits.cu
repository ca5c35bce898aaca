// pack_bits and unpack_bits on CUDA: a thread a block of eight codes, which are whole bytes.
#include <torch/csrc/stable/library.h>

#include "arguments/packing.h"
#include "cuda/cuda_utils.cuh"

namespace adaround_ext::cuda {
namespace {

template <typename Codes, typename Packed>  // uint8_t, const where it is read
struct PackPointers {
  Codes* codes;  // [rows, cols]
  Packed* packed;
  int64_t cols;
  int64_t row_bytes;
  int64_t row_blocks;
  int64_t blocks;  // of all rows
  FastDivide by_row_blocks;
  int qmin;
  bool wide;  // all blocks are full and aligned
};

// The place of a thread's block: `count` codes and their `bytes`.
struct BlockPlace {
  int64_t code;
  int64_t byte;
  int count;
  int bytes;
};

template <int kBits, typename Pointers>
__device__ __forceinline__ BlockPlace block_place(const Pointers& s, int64_t block) {
  const int64_t row = s.by_row_blocks(block);
  const int64_t in_row = block - row * s.row_blocks;
  const int64_t left = s.cols - in_row * kBlock;
  const int count = left < kBlock ? static_cast<int>(left) : kBlock;
  return {
      row * s.cols + in_row * kBlock, row * s.row_bytes + in_row * kBits, count,
      (count * kBits + 7) / 8};
}

// The first `count` of at most kBytes bytes, the others 0; in one access where `wide` allows it.
template <int kBytes>
__device__ __forceinline__ uint64_t load_word(const uint8_t* from, int count, bool wide) {
  if constexpr (kWholeLane<kBytes>) {
    if (wide) {
      return *reinterpret_cast<const Lane<kBytes>*>(from);
    }
  }
  uint64_t word = 0;
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    word |= i < count ? static_cast<uint64_t>(from[i]) << (8 * i) : 0;
  }
  return word;
}

template <int kBytes>
__device__ __forceinline__ void store_word(uint8_t* to, uint64_t word, int count, bool wide) {
  if constexpr (kWholeLane<kBytes>) {
    if (wide) {
      *reinterpret_cast<Lane<kBytes>*>(to) = static_cast<Lane<kBytes>>(word);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kBytes; ++i) {
    if (i < count) {
      to[i] = static_cast<uint8_t>(word >> (8 * i));
    }
  }
}

using PackFrom = PackPointers<const uint8_t, uint8_t>;
using UnpackFrom = PackPointers<uint8_t, const uint8_t>;

template <int kBits>
__global__ void __launch_bounds__(kThreads) pack_bits_kernel(const __grid_constant__ PackFrom s) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block >= s.blocks) {
    return;
  }
  const BlockPlace place = block_place<kBits>(s, block);
  const uint64_t present = ~uint64_t{0} >> (8 * (kBlock - place.count));
  const uint64_t codes = load_word<kBlock>(s.codes + place.code, place.count, s.wide);
  const uint64_t numbers = numbers_of_codes(codes, s.qmin) & present;
  store_word<kBits>(s.packed + place.byte, join_bits<kBits>(numbers), place.bytes, s.wide);
}

template <int kBits>
__global__ void __launch_bounds__(kThreads)
    unpack_bits_kernel(const __grid_constant__ UnpackFrom s) {
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (block >= s.blocks) {
    return;
  }
  const BlockPlace place = block_place<kBits>(s, block);
  const uint64_t packed = load_word<kBits>(s.packed + place.byte, place.bytes, s.wide);
  const uint64_t codes = codes_of_numbers(split_bits<kBits>(packed), s.qmin);
  store_word<kBlock>(s.codes + place.code, codes, place.count, s.wide);
}

// Whether all blocks of both matrices are full, and aligned to words.
bool whole_and_aligned(const void* codes, const void* packed, int64_t cols) {
  const auto address = reinterpret_cast<uintptr_t>(codes) | reinterpret_cast<uintptr_t>(packed);
  return address % kBlock == 0 && cols % kBlock == 0;
}

// The pointers and sizes of matrices that are not empty.
template <typename Codes, typename Packed>
PackPointers<Codes, Packed> pack_pointers(
    Codes* codes, Packed* packed, int64_t rows, int64_t cols, int64_t bits, int64_t qmin) {
  const int64_t row_blocks = (cols + kBlock - 1) / kBlock;
  return {
      codes,
      packed,
      cols,
      packed_bytes(cols, bits),
      row_blocks,
      rows * row_blocks,
      FastDivide(row_blocks),
      static_cast<int>(qmin),
      whole_and_aligned(codes, packed, cols)};
}

unsigned grid_size(int64_t blocks) {
  return static_cast<unsigned>((blocks + kThreads - 1) / kThreads);
}

Tensor pack_bits_cuda(const Tensor& codes_in, int64_t bits, int64_t qmin) {
  const PackArguments args(codes_in, bits, qmin);
  const DeviceGuard guard(args.codes.get_device_index());
  const int64_t rows = args.codes.size(0);
  const int64_t cols = args.codes.size(1);
  const Tensor packed = allocate(args.codes, {rows, packed_bytes(cols, bits)}, ScalarType::Byte);
  if (packed.numel() == 0) {
    return packed;
  }
  const PackFrom s = pack_pointers(
      input_pointer<uint8_t>(args.codes), output_pointer<uint8_t>(packed), rows, cols, bits, qmin);
  with_bits(static_cast<int>(bits), [&](auto constant) {
    pack_bits_kernel<decltype(constant)::value>
        <<<grid_size(s.blocks), kThreads, 0, current_stream(packed)>>>(s);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return packed;
}

Tensor unpack_bits_cuda(const Tensor& packed_in, int64_t bits, int64_t cols, int64_t qmin) {
  const UnpackArguments args(packed_in, bits, cols, qmin);
  const DeviceGuard guard(args.packed.get_device_index());
  const int64_t rows = args.packed.size(0);
  const Tensor codes = allocate(args.packed, {rows, cols}, code_dtype(qmin));
  if (codes.numel() == 0) {
    return codes;
  }
  const UnpackFrom s = pack_pointers(
      output_pointer<uint8_t>(codes), input_pointer<uint8_t>(args.packed), rows, cols, bits, qmin);
  with_bits(static_cast<int>(bits), [&](auto constant) {
    unpack_bits_kernel<decltype(constant)::value>
        <<<grid_size(s.blocks), kThreads, 0, current_stream(codes)>>>(s);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return codes;
}

}  // namespace
}  // namespace adaround_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CUDA, m) {
  m.impl("pack_bits", TORCH_BOX(&adaround_ext::cuda::pack_bits_cuda));
  m.impl("unpack_bits", TORCH_BOX(&adaround_ext::cuda::unpack_bits_cuda));
}
