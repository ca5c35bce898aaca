// Codes as a dense stream of bits, once for C++ and CUDA; reference.pack_bits is the same in
// Python: code j of a row is the number code - qmin in bits j b to j b + b - 1, bit i being bit i %
// 8 of byte i / 8. W is uint64_t or a vector of them (cpu/isa/vec.h); a word holds the codes of a
// block, the first at its low end, as little-endian memory has them.
#pragma once

#include <type_traits>

#include "math/elementary.h"

namespace adaround_ext {

constexpr int kBlock = 8;  // codes a block, which are whole bytes at any width: one a bit
constexpr int kMaxBits = 8;

ADAROUND_INLINE uint64_t add_bytes(uint64_t x, uint64_t y) {
  const uint64_t high = 0x8080808080808080u;
  return ((x & ~high) + (y & ~high)) ^ ((x ^ y) & high);
}

// `bits` ones at the foot of every lane of 8, 16, 32 or 64 bits.
constexpr uint64_t low_bits(int bits, int lane) {
  uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) {
    mask |= i % lane < bits ? uint64_t{1} << i : 0;
  }
  return mask;
}
template <int kBits, int kLane>
constexpr uint64_t kLowBits = low_bits(kBits, kLane);

// The integer that kBytes bytes are, where there is one; else the one they fit into.
template <int kBytes>
using Lane = std::conditional_t<
    kBytes == 1, uint8_t,
    std::conditional_t<kBytes == 2, uint16_t, std::conditional_t<kBytes == 4, uint32_t, uint64_t>>>;
template <int kBytes>
constexpr bool kWholeLane = sizeof(Lane<kBytes>) == kBytes;

// The numbers code - qmin of a block, a byte each, from codes that are bytes of either sign.
template <typename W>
ADAROUND_INLINE W numbers_of_codes(W codes, int qmin) {
  return add_bytes(codes, W(static_cast<uint8_t>(-qmin) * kLowBits<1, 8>));
}

template <typename W>
ADAROUND_INLINE W codes_of_numbers(W numbers, int qmin) {
  return add_bytes(numbers, W(static_cast<uint8_t>(qmin) * kLowBits<1, 8>));
}

// What of the numbers does not fit into kBits.
template <int kBits, typename W>
ADAROUND_INLINE W excess(W numbers) {
  return numbers & W(~kLowBits<kBits, 8>);
}

// From eight bytes of kBits each to kBits bytes: lanes join in pairs, three times.
template <int kBits, typename W>
ADAROUND_INLINE W join_bits(W x) {
  x = x & W(kLowBits<kBits, 8>);
  x = (x & W(kLowBits<8, 16>)) | ((x & W(~kLowBits<8, 16>)) >> (8 - kBits));
  x = (x & W(kLowBits<16, 32>)) | ((x & W(~kLowBits<16, 32>)) >> (16 - 2 * kBits));
  return (x & W(kLowBits<32, 64>)) | ((x & W(~kLowBits<32, 64>)) >> (32 - 4 * kBits));
}

// Two lanes of 32 bits with four codes each; bits beyond the first 8 kBits are ignored.
template <int kBits, typename W>
ADAROUND_INLINE W split_quads(W x) {
  const W quad(kLowBits<4 * kBits, 64>);
  return (x & quad) | (((x >> (4 * kBits)) & quad) << 32);
}

// The inverse of join_bits.
template <int kBits, typename W>
ADAROUND_INLINE W split_bits(W x) {
  const W pair(kLowBits<2 * kBits, 32>), one(kLowBits<kBits, 16>);
  x = split_quads<kBits>(x);
  x = (x & pair) | (((x >> (2 * kBits)) & pair) << 16);
  return (x & one) | (((x >> kBits) & one) << 8);
}

// The bytes of a row of `cols` codes. Cannot overflow: for kMaxBits it is cols.
ADAROUND_INLINE int64_t packed_bytes(int64_t cols, int64_t bits) {
  return cols / kBlock * bits + (cols % kBlock * bits + 7) / 8;
}

// Calls f with the number of bits as a constant.
template <typename F>
ADAROUND_INLINE auto with_bits(int bits, const F& f) {
  switch (bits) {
    case 1:
      return f(std::integral_constant<int, 1>());
    case 2:
      return f(std::integral_constant<int, 2>());
    case 3:
      return f(std::integral_constant<int, 3>());
    case 4:
      return f(std::integral_constant<int, 4>());
    case 5:
      return f(std::integral_constant<int, 5>());
    case 6:
      return f(std::integral_constant<int, 6>());
    case 7:
      return f(std::integral_constant<int, 7>());
    default:
      return f(std::integral_constant<int, 8>());
  }
}

}  // namespace adaround_ext
