// Dtypes: of codes, and of the arithmetic.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>

namespace adaround_ext {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What the arithmetic runs in: double for float64 weights (CPU only), else float.
inline ScalarType arithmetic_dtype(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline ScalarType code_dtype(int64_t qmin) {
  return qmin < 0 ? ScalarType::Char : ScalarType::Byte;
}

// Calls f with a value of the type that codes are stored in.
template <typename F>
void dispatch_codes(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Char) {
    f(int8_t());
  } else {
    f(uint8_t());
  }
}

}  // namespace adaround_ext
