// From storage types (float, bfloat16, float16) to the arithmetic type and back, and the walk over
// a matrix in chunks, whose bounds depend on the sizes alone: results do not depend on threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "arguments/checks.h"
#include "cpu/isa/table.h"

namespace adaround_ext::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

constexpr int64_t kChunk = 1024;       // weights a chunk: its buffers stay in the first-level cache
constexpr int64_t kChunksPerTask = 8;  // fewer are not worth waking a thread

// Calls f with a value of the type that the arithmetic on a dtype runs in.
template <typename F>
void dispatch_arithmetic(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Double) {
    f(double());
  } else {
    f(float());
  }
}

// An argument that is read: its own memory where the storage is T, else a converted chunk.
template <typename T>
class Input {
 public:
  explicit Input(const Tensor& t) : data_(t.const_data_ptr()), dtype_(t.scalar_type()) {}

  const T* load(int64_t begin, int64_t size, T* buffer) const {
    if constexpr (std::is_same_v<T, float>) {
      if (dtype_ == ScalarType::BFloat16) {
        return convert(static_cast<const BFloat16*>(data_) + begin, size, buffer);
      }
      if (dtype_ == ScalarType::Half) {
        return convert(static_cast<const Half*>(data_) + begin, size, buffer);
      }
    }
    return static_cast<const T*>(data_) + begin;
  }

 private:
  template <typename S>
  static const T* convert(const S* from, int64_t size, T* buffer) {
    for (int64_t i = 0; i < size; ++i) {
      buffer[i] = static_cast<T>(from[i]);
    }
    return buffer;
  }

  const void* data_;
  ScalarType dtype_;
};

// An argument that is written: a loop writes at target(), then flush() converts if it must.
template <typename T>
class Output {
 public:
  explicit Output(const Tensor& t) : data_(t.mutable_data_ptr()), dtype_(t.scalar_type()) {}

  T* target(int64_t begin, T* buffer) const {
    return direct() ? static_cast<T*>(data_) + begin : buffer;
  }

  void flush(int64_t begin, int64_t size, const T* buffer) const {
    if (direct()) {
      return;
    }
    if (dtype_ == ScalarType::BFloat16) {
      convert(buffer, size, static_cast<BFloat16*>(data_) + begin);
    } else if (dtype_ == ScalarType::Half) {
      convert(buffer, size, static_cast<Half*>(data_) + begin);
    } else if (dtype_ == ScalarType::Char) {
      convert(buffer, size, static_cast<int8_t*>(data_) + begin);
    } else {
      convert(buffer, size, static_cast<uint8_t*>(data_) + begin);
    }
  }

 private:
  bool direct() const {
    return dtype_ == (std::is_same_v<T, double> ? ScalarType::Double : ScalarType::Float);
  }

  template <typename S>
  static void convert(const T* from, int64_t size, S* to) {
    for (int64_t i = 0; i < size; ++i) {
      to[i] = static_cast<S>(from[i]);
    }
  }

  void* data_;
  ScalarType dtype_;
};

// The grid of a matrix [rows, cols] with scale and zero_point [rows or 1, n_groups].
template <typename T>
class GridView {
 public:
  GridView(
      const Tensor& matrix, const Tensor& scale, const Tensor& zero_point, int64_t qmin,
      int64_t qmax)
      : cols_(matrix.size(1)),
        group_size_(cols_ / scale.size(1)),
        n_groups_(scale.size(1)),
        shared_(scale.size(0) == 1),
        scale_(scale.const_data_ptr<T>()),
        zero_point_(zero_point.const_data_ptr<int32_t>()),
        qmin_(static_cast<T>(qmin)),
        qmax_(static_cast<T>(qmax)) {}

  // Calls f(offset, size, grid) for every run of one scale within [begin, begin + size).
  template <typename F>
  void for_each_run(int64_t begin, int64_t size, const F& f) const {
    const int64_t end = begin + size;
    for (int64_t i = begin; i < end;) {
      const int64_t row = i / cols_;
      const int64_t col = i % cols_;
      const int64_t group = col / group_size_;
      const int64_t stop = std::min(end, i + (group + 1) * group_size_ - col);
      const int64_t index = (shared_ ? 0 : row) * n_groups_ + group;
      f(i - begin, stop - i,
        Grid<T>{scale_[index], static_cast<T>(zero_point_[index]), qmin_, qmax_});
      i = stop;
    }
  }

 private:
  int64_t cols_;
  int64_t group_size_;
  int64_t n_groups_;
  bool shared_;
  const T* scale_;
  const int32_t* zero_point_;
  T qmin_;
  T qmax_;
};

// Calls f(chunk, begin, size) for every chunk of `numel` weights, on the threads of torch's pool.
template <typename F>
void parallel_chunks(int64_t numel, const F& f) {
  const int64_t chunks = (numel + kChunk - 1) / kChunk;
  torch::stable::parallel_for(0, chunks, kChunksPerTask, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t begin = chunk * kChunk;
      f(chunk, begin, std::min(kChunk, numel - begin));
    }
  });
}

}  // namespace adaround_ext::cpu
