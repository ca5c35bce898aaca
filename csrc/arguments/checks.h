// Argument checks of the ops: each names the argument, the rule and what came.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "arguments/dtypes.h"

namespace adaround_ext {

// Not STD_TORCH_CHECK: that one puts the builder's source path in front of the message.
#define ADAROUND_CHECK(cond, ...)                                       \
  do {                                                                  \
    if (!(cond)) {                                                      \
      throw std::invalid_argument(::adaround_ext::concat(__VA_ARGS__)); \
    }                                                                   \
  } while (0)

template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream out;
  ((out << args), ...);
  return out.str();
}

struct NamedTensor {
  const char* name;
  const Tensor* tensor;
};

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); ++i) {
    text += (i ? ", " : "") + std::to_string(t.size(i));
  }
  return text + "]";
}

inline void check_dtype(const NamedTensor& arg, std::initializer_list<ScalarType> allowed) {
  const ScalarType dtype = arg.tensor->scalar_type();
  std::string names;
  for (const ScalarType type : allowed) {
    if (dtype == type) {
      return;
    }
    names += (names.empty() ? "" : " or ") + std::string(torch::headeronly::toString(type));
  }
  ADAROUND_CHECK(
      false, arg.name, " must have dtype ", names, ", got ", torch::headeronly::toString(dtype));
}

inline void check_same_shape(const NamedTensor& arg, const NamedTensor& model) {
  bool same = arg.tensor->dim() == model.tensor->dim();
  for (int64_t i = 0; same && i < model.tensor->dim(); ++i) {
    same = arg.tensor->size(i) == model.tensor->size(i);
  }
  ADAROUND_CHECK(
      same, arg.name, " must have the shape of ", model.name, ", ", shape_text(*model.tensor),
      ", got ", shape_text(*arg.tensor));
}

inline std::string device_text(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : "cpu";
}

// Before anything else is asked of the tensors: one that is not there can answer nothing.
inline void check_same_device(std::initializer_list<NamedTensor> args) {
  const NamedTensor& first = *args.begin();
  for (const NamedTensor& arg : args) {
    ADAROUND_CHECK(arg.tensor->defined(), arg.name, " must be a tensor, got None");
  }
  for (const NamedTensor& arg : args) {
    ADAROUND_CHECK(
        arg.tensor->is_cuda() == first.tensor->is_cuda() &&
            arg.tensor->get_device_index() == first.tensor->get_device_index(),
        arg.name, " must be on the device of ", first.name, ", got ", device_text(*arg.tensor),
        " and ", device_text(*first.tensor));
  }
}

// scale and zero_point [rows or 1, n_groups] of a matrix [rows, cols].
inline void check_grid(
    const char* matrix, int64_t rows, int64_t cols, const Tensor& scale, const Tensor& zero_point,
    ScalarType scale_dtype) {
  check_dtype({"scale", &scale}, {scale_dtype});
  check_dtype({"zero_point", &zero_point}, {ScalarType::Int});
  ADAROUND_CHECK(
      scale.dim() == 2 && (scale.size(0) == rows || scale.size(0) == 1) && scale.size(1) >= 1,
      "scale must have shape [", rows, " or 1, n_groups], got ", shape_text(scale));
  ADAROUND_CHECK(
      cols % scale.size(1) == 0, "scale must have a number of groups that divides the ", cols,
      " columns of ", matrix, ", got ", scale.size(1));
  check_same_shape({"zero_point", &zero_point}, {"scale", &scale});
}

inline void check_grid(
    const NamedTensor& matrix, const Tensor& scale, const Tensor& zero_point,
    ScalarType scale_dtype) {
  const Tensor& t = *matrix.tensor;
  ADAROUND_CHECK(
      t.dim() == 2, matrix.name, " must be a matrix [rows, cols], got shape ", shape_text(t));
  check_grid(matrix.name, t.size(0), t.size(1), scale, zero_point, scale_dtype);
}

// A matrix over columns for every rows / groups consecutive rows of a matrix [rows, cols].
inline void check_gram(const NamedTensor& gram, const Tensor& matrix) {
  const int64_t rows = matrix.size(0);
  const int64_t cols = matrix.size(1);
  const Tensor& t = *gram.tensor;
  ADAROUND_CHECK(
      t.dim() == 3 && t.size(0) >= 1 && rows % t.size(0) == 0 && t.size(1) == cols &&
          t.size(2) == cols,
      gram.name, " must have shape [groups, ", cols, ", ", cols, "] with groups dividing ", rows,
      " rows, got ", shape_text(t));
}

inline void check_range(int64_t qmin, int64_t qmax) {
  ADAROUND_CHECK(
      qmin < qmax && qmin >= -128 && qmax <= (qmin < 0 ? 127 : 255),
      "qmin and qmax must be a range within [-128, 127] or [0, 255], got [", qmin, ", ", qmax, "]");
}

// Where the last element of a tensor ends.
inline const char* end_pointer(const Tensor& t) {
  int64_t elements = 1;
  for (int64_t i = 0; i < t.dim(); ++i) {
    elements += (t.size(i) - 1) * t.stride(i);
  }
  return static_cast<const char*>(t.data_ptr()) + elements * static_cast<int64_t>(t.element_size());
}

// A call of PyTorch that fails loses its text on the way here; mostly memory is what it lacked.
inline Tensor contiguous(const NamedTensor& arg) {
  try {
    return torch::stable::contiguous(*arg.tensor);
  } catch (const std::exception&) {
    throw std::runtime_error(concat(
        arg.name, " could not be made contiguous (is there memory for it?), shape ",
        shape_text(*arg.tensor)));
  }
}

// Memory for a result or to work in, on the device of `like` and, unless one is given, its dtype.
inline Tensor allocate(
    const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef shape,
    std::optional<ScalarType> dtype = std::nullopt) {
  try {
    return torch::stable::new_empty(like, shape, dtype);
  } catch (const std::exception&) {
    std::string text;
    for (const int64_t size : shape) {
      text += (text.empty() ? "" : ", ") + std::to_string(size);
    }
    throw std::runtime_error(concat("memory of shape [", text, "] could not be allocated"));
  }
}

// A tensor written in place must be contiguous and share no memory with any other argument as the
// caller gave it: a copy of that one would be safe, and yet the caller's would change. What lies
// between the elements of a strided tensor counts as its own.
inline void check_mutable(
    std::initializer_list<NamedTensor> mutated, std::initializer_list<NamedTensor> read) {
  const auto check_apart = [](const NamedTensor& a, const NamedTensor& b) {
    if (a.tensor->numel() == 0 || b.tensor->numel() == 0) {
      return;
    }
    const char* a_begin = static_cast<const char*>(a.tensor->data_ptr());
    const char* b_begin = static_cast<const char*>(b.tensor->data_ptr());
    ADAROUND_CHECK(
        end_pointer(*a.tensor) <= b_begin || end_pointer(*b.tensor) <= a_begin, a.name,
        " is written in place and must not share memory with ", b.name);
  };
  for (const NamedTensor* a = mutated.begin(); a != mutated.end(); ++a) {
    ADAROUND_CHECK(
        a->tensor->is_contiguous(), a->name, " is written in place and must be contiguous");
    for (const NamedTensor* b = a + 1; b != mutated.end(); ++b) {
      check_apart(*a, *b);
    }
    for (const NamedTensor& b : read) {
      check_apart(*a, b);
    }
  }
}

}  // namespace adaround_ext
