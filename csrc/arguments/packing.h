// The arguments of the ops on packed codes, checked and made contiguous, as in rounding.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "arguments/checks.h"
#include "math/packing.h"

namespace adaround_ext {

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
    check_same_device({{"codes", &codes_in}});
    check_bits(bits, qmin);
    check_dtype({"codes", &codes_in}, {code_dtype(qmin)});
    ADAROUND_CHECK(
        codes_in.dim() == 2, "codes must be a matrix [rows, cols], got shape ",
        shape_text(codes_in));
    codes = contiguous({"codes", &codes_in});
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
    check_same_device({{"packed", &packed_in}});
    check_packed(packed_in, bits, cols, qmin);
    packed = contiguous({"packed", &packed_in});
  }
};

inline Tensor contiguous_float(const NamedTensor& arg) {
  const Tensor t = contiguous(arg);
  return t.scalar_type() == ScalarType::Float ? t : torch::stable::to(t, ScalarType::Float);
}

// packed_linear: x [..., cols], packed for the codes of a weight [rows, cols], scale and zero_point
// [rows or 1, n_groups], bias [rows] or none.
struct LinearArguments {
  int64_t positions = 1;  // rows of x
  int64_t cols;
  int64_t rows;
  std::vector<int64_t> y_shape;
  Tensor x;  // float32 [positions, cols]
  Tensor packed;
  Tensor scale;
  Tensor zero_point;
  std::optional<Tensor> bias;  // float32

  LinearArguments(
      const Tensor& x_in, const Tensor& packed_in, const Tensor& scale_in,
      const Tensor& zero_point_in, const std::optional<Tensor>& bias_in, int64_t bits,
      int64_t qmin) {
    check_same_device(
        {{"x", &x_in},
         {"packed", &packed_in},
         {"scale", &scale_in},
         {"zero_point", &zero_point_in}});
    check_dtype({"x", &x_in}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    ADAROUND_CHECK(x_in.dim() >= 1, "x must have shape [..., cols], got []");
    cols = x_in.size(-1);
    check_packed(packed_in, bits, cols, qmin);
    rows = packed_in.size(0);
    check_grid("packed", rows, cols, scale_in, zero_point_in, ScalarType::Float);
    for (int64_t i = 0; i < x_in.dim() - 1; ++i) {
      y_shape.push_back(x_in.size(i));
      positions *= x_in.size(i);
    }
    y_shape.push_back(rows);
    if (bias_in.has_value()) {
      const NamedTensor named{"bias", &*bias_in};
      check_same_device({{"x", &x_in}, named});
      check_dtype(named, {x_in.scalar_type()});
      ADAROUND_CHECK(
          bias_in->dim() == 1 && bias_in->size(0) == rows, "bias must have shape [", rows,
          "], got ", shape_text(*bias_in));
      bias = contiguous_float(named);
    }
    x = contiguous_float({"x", &x_in});
    packed = contiguous({"packed", &packed_in});
    scale = contiguous({"scale", &scale_in});
    zero_point = contiguous({"zero_point", &zero_point_in});
  }
};

}  // namespace adaround_ext
