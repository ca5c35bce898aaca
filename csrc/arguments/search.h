// The arguments of the ops that search for codes, refine_, tabu_search_ and gptq, checked and made
// contiguous, as in rounding.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "arguments/checks.h"

namespace adaround_ext {

// How the rows of a matrix [rows, cols] find their scales [rows or 1, n_groups] and their matrix
// over columns [groups, cols, cols]: rows / groups consecutive rows share one.
struct RowLayout {
  int64_t rows;
  int64_t cols;
  int64_t group_size;    // columns that share a scale
  int64_t scale_stride;  // n_groups, or 0 where all rows share the scale
  int64_t rows_per_gram;

  // Of arguments that are checked; the matrix has elements.
  RowLayout(const Tensor& matrix, const Tensor& gram, const Tensor& scale)
      : rows(matrix.size(0)),
        cols(matrix.size(1)),
        group_size(cols / scale.size(1)),
        scale_stride(scale.size(0) == 1 ? 0 : scale.size(1)),
        rows_per_gram(rows / gram.size(0)) {}

  // Where the row's scales begin, and its matrix.
  int64_t scale_of(int64_t row) const { return row * scale_stride; }
  int64_t gram_of(int64_t row) const { return row / rows_per_gram * cols * cols; }
};

// refine_ and tabu_search_: codes and residual [rows, cols] are written; gram [groups, cols, cols],
// scale [rows or 1, n_groups]; rows / groups consecutive rows share a Gram matrix.
struct SearchArguments {
  Tensor gram;
  Tensor scale;

  SearchArguments(
      const Tensor& codes, const Tensor& residual, const Tensor& gram_in, const Tensor& scale_in,
      int64_t qmin, int64_t qmax) {
    check_same_device(
        {{"codes", &codes}, {"residual", &residual}, {"gram", &gram_in}, {"scale", &scale_in}});
    ADAROUND_CHECK(
        codes.dim() == 2, "codes must be a matrix [rows, cols], got shape ", shape_text(codes));
    check_range(qmin, qmax);
    check_dtype({"codes", &codes}, {code_dtype(qmin)});
    if (codes.is_cuda()) {
      check_dtype({"residual", &residual}, {ScalarType::Float});
    } else {
      check_dtype({"residual", &residual}, {ScalarType::Float, ScalarType::Double});
    }
    check_same_shape({"residual", &residual}, {"codes", &codes});
    check_dtype({"gram", &gram_in}, {residual.scalar_type()});
    check_gram({"gram", &gram_in}, codes);
    check_dtype({"scale", &scale_in}, {residual.scalar_type()});
    const int64_t rows = codes.size(0);
    const int64_t cols = codes.size(1);
    ADAROUND_CHECK(
        scale_in.dim() == 2 && (scale_in.size(0) == rows || scale_in.size(0) == 1) &&
            scale_in.size(1) >= 1 && cols % scale_in.size(1) == 0,
        "scale must have shape [", rows, " or 1, n_groups] with n_groups dividing ", cols,
        " columns, got ", shape_text(scale_in));
    gram = contiguous({"gram", &gram_in});
    scale = contiguous({"scale", &scale_in});
    check_mutable(
        {{"codes", &codes}, {"residual", &residual}}, {{"gram", &gram_in}, {"scale", &scale_in}});
  }
};

// Steps of the tabu search are counted in float32 on the CPU and in 24 bits of a word on CUDA;
// sweeps of refine_ need an end where the Gram matrix is not symmetric and codes go round for ever.
constexpr int64_t kMaxSteps = int64_t{1} << 23;

inline void check_max_sweeps(int64_t max_sweeps) {
  ADAROUND_CHECK(
      max_sweeps >= 0 && max_sweeps <= kMaxSteps, "max_sweeps must be from 0 to ", kMaxSteps,
      ", got ", max_sweeps);
}

inline void check_tabu_steps(int64_t steps, int64_t seed) {
  ADAROUND_CHECK(
      steps >= 0 && steps <= kMaxSteps, "steps must be from 0 to ", kMaxSteps, ", got ", steps);
  ADAROUND_CHECK(seed >= 0, "seed must not be negative, got ", seed);
}

// gptq: weight [rows, cols], feedback [groups, cols, cols], order [groups, cols].
struct GptqArguments {
  Tensor weight;
  Tensor feedback;
  Tensor order;
  Tensor scale;
  Tensor zero_point;

  GptqArguments(
      const Tensor& weight_in, const Tensor& feedback_in, const Tensor& order_in,
      const Tensor& scale_in, const Tensor& zero_point_in, int64_t qmin, int64_t qmax) {
    check_same_device(
        {{"weight", &weight_in},
         {"feedback", &feedback_in},
         {"order", &order_in},
         {"scale", &scale_in},
         {"zero_point", &zero_point_in}});
    if (weight_in.is_cuda()) {
      check_dtype({"weight", &weight_in}, {ScalarType::Float});
    } else {
      check_dtype({"weight", &weight_in}, {ScalarType::Float, ScalarType::Double});
    }
    check_grid({"weight", &weight_in}, scale_in, zero_point_in, weight_in.scalar_type());
    check_range(qmin, qmax);
    check_dtype({"feedback", &feedback_in}, {weight_in.scalar_type()});
    check_gram({"feedback", &feedback_in}, weight_in);
    check_dtype({"order", &order_in}, {ScalarType::Long});
    ADAROUND_CHECK(
        order_in.dim() == 2 && order_in.size(0) == feedback_in.size(0) &&
            order_in.size(1) == weight_in.size(1),
        "order must have shape [", feedback_in.size(0), ", ", weight_in.size(1), "], got ",
        shape_text(order_in));
    weight = contiguous({"weight", &weight_in});
    feedback = contiguous({"feedback", &feedback_in});
    order = contiguous({"order", &order_in});
    scale = contiguous({"scale", &scale_in});
    zero_point = contiguous({"zero_point", &zero_point_in});
  }
};

}  // namespace adaround_ext
