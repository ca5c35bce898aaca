// The arguments of the ops on packed codes, checked and made contiguous, as in arguments.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "checks.h"
#include "packing.h"

namespace adaround_ext {

inline ScalarType code_dtype(int64_t qmin) {
  return qmin < 0 ? ScalarType::Char : ScalarType::Byte;
}

inline void check_bits(int64_t bits, int64_t qmin) {
  ADAROUND_CHECK(bits >= 1 && bits <= kMaxBits, "bits must be from 1 to 8, got ", bits);
  const int64_t highest = (int64_t{1} << bits) - 1;
  ADAROUND_CHECK(
      qmin >= -128 && qmin <= (qmin < 0 ? 127 : 255) - highest, "qmin must leave ", bits,
      " bits within [-128, 127] or [0, 255], got ", qmin);
}

// pack_bits: codes [rows, cols], int8 where qmin < 0, else uint8.
struct PackArguments {
  Tensor codes;

  PackArguments(const Tensor& codes_in, int64_t bits, int64_t qmin) {
    check_bits(bits, qmin);
    check_dtype({"codes", &codes_in}, {code_dtype(qmin)});
    ADAROUND_CHECK(
        codes_in.dim() == 2, "codes must be a matrix [rows, cols], got shape ",
        shape_text(codes_in));
    codes = torch::stable::contiguous(codes_in);
  }
};

inline void check_packed(const Tensor& packed, int64_t bits, int64_t cols, int64_t qmin) {
  check_bits(bits, qmin);
  ADAROUND_CHECK(cols >= 0, "cols must not be negative, got ", cols);
  check_dtype({"packed", &packed}, {ScalarType::Byte});
  ADAROUND_CHECK(
      packed.dim() == 2 && packed.size(1) == packed_bytes(cols, bits),
      "packed must have shape [rows, ", packed_bytes(cols, bits), "] for ", cols, " columns of ",
      bits, " bits, got ", shape_text(packed));
}

// unpack_bits: packed uint8 [rows, ceil(cols bits / 8)].
struct UnpackArguments {
  Tensor packed;

  UnpackArguments(const Tensor& packed_in, int64_t bits, int64_t cols, int64_t qmin) {
    check_packed(packed_in, bits, cols, qmin);
    packed = torch::stable::contiguous(packed_in);
  }
};

}  // namespace adaround_ext
