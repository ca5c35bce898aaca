// The arguments of the ops on soft and hard rounding, checked and made contiguous, for the CPU and
// the CUDA entry alike.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>

#include "arguments/checks.h"
#include "math/rounding.h"

namespace adaround_ext {

inline void check_weight_dtype(const NamedTensor& arg) {
  if (arg.tensor->is_cuda()) {
    check_dtype(arg, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  } else {
    check_dtype(
        arg, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half, ScalarType::Double});
  }
}

// weight [rows, cols], v [rows, cols], scale and zero_point [rows or 1, n_groups].
struct QuantizeArguments {
  Tensor weight;
  Tensor v;
  Tensor scale;
  Tensor zero_point;

  QuantizeArguments(
      const Tensor& weight_in, const Tensor& v_in, const Tensor& scale_in,
      const Tensor& zero_point_in, int64_t qmin, int64_t qmax) {
    check_same_device(
        {{"weight", &weight_in},
         {"v", &v_in},
         {"scale", &scale_in},
         {"zero_point", &zero_point_in}});
    check_weight_dtype({"weight", &weight_in});
    const ScalarType dtype = arithmetic_dtype(weight_in);
    check_grid({"weight", &weight_in}, scale_in, zero_point_in, dtype);
    check_range(qmin, qmax);
    check_dtype({"v", &v_in}, {dtype});
    check_same_shape({"v", &v_in}, {"weight", &weight_in});
    weight = contiguous({"weight", &weight_in});
    v = contiguous({"v", &v_in});
    scale = contiguous({"scale", &scale_in});
    zero_point = contiguous({"zero_point", &zero_point_in});
  }
};

inline void check_beta(double beta) {
  ADAROUND_CHECK(
      beta >= 1.0 && beta <= std::numeric_limits<float>::max(),
      "beta must be at least 1 and finite in float32, got ", beta);
}

// The gradients that come into the backward of soft_quantize.
struct BackwardArguments {
  Tensor grad_weight_q;
  Tensor grad_reg;

  BackwardArguments(
      const Tensor& grad_weight_q_in, const Tensor& grad_reg_in, const QuantizeArguments& args) {
    check_same_device(
        {{"weight", &args.weight},
         {"grad_weight_q", &grad_weight_q_in},
         {"grad_reg", &grad_reg_in}});
    check_dtype({"grad_weight_q", &grad_weight_q_in}, {args.weight.scalar_type()});
    check_same_shape({"grad_weight_q", &grad_weight_q_in}, {"weight", &args.weight});
    check_dtype({"grad_reg", &grad_reg_in}, {args.v.scalar_type()});
    ADAROUND_CHECK(
        grad_reg_in.numel() == 1, "grad_reg must hold one number, got shape ",
        shape_text(grad_reg_in));
    grad_weight_q = contiguous({"grad_weight_q", &grad_weight_q_in});
    grad_reg = contiguous({"grad_reg", &grad_reg_in});
  }
};

// rounding_step_: everything of QuantizeArguments (v is written in place, so it is not copied), the
// moments, the weight_q or error to write, its gradient, the schedule and the step counter.
struct StepArguments {
  Tensor grad;
  Tensor weight;
  Tensor scale;
  Tensor zero_point;
  Tensor schedule;

  StepArguments(
      const Tensor& v, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& weight_q,
      const Tensor& grad_in, const Tensor& weight_in, const Tensor& scale_in,
      const Tensor& zero_point_in, int64_t qmin, int64_t qmax, const Tensor& schedule_in,
      const Tensor& step) {
    const QuantizeArguments args(weight_in, v, scale_in, zero_point_in, qmin, qmax);
    weight = args.weight;
    scale = args.scale;
    zero_point = args.zero_point;
    check_same_device(
        {{"weight", &weight},
         {"exp_avg", &exp_avg},
         {"exp_avg_sq", &exp_avg_sq},
         {"weight_q", &weight_q},
         {"grad", &grad_in},
         {"schedule", &schedule_in},
         {"step", &step}});
    for (const NamedTensor& moment :
         {NamedTensor{"exp_avg", &exp_avg}, NamedTensor{"exp_avg_sq", &exp_avg_sq}}) {
      check_dtype(moment, {v.scalar_type()});
      check_same_shape(moment, {"weight", &weight});
    }
    if (v.scalar_type() == ScalarType::Double) {
      check_dtype({"grad", &grad_in}, {ScalarType::Double});
    } else {
      check_dtype({"grad", &grad_in}, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
    }
    check_dtype({"weight_q", &weight_q}, {grad_in.scalar_type()});
    check_same_shape({"grad", &grad_in}, {"weight", &weight});
    check_same_shape({"weight_q", &weight_q}, {"weight", &weight});
    check_dtype({"schedule", &schedule_in}, {ScalarType::Float});
    ADAROUND_CHECK(
        schedule_in.dim() == 2 && schedule_in.size(0) >= 1 &&
            schedule_in.size(1) == kScheduleColumns,
        "schedule must have shape [steps >= 1, ", kScheduleColumns, "], got ",
        shape_text(schedule_in));
    check_dtype({"step", &step}, {ScalarType::Long});
    ADAROUND_CHECK(step.numel() == 1, "step must hold one number, got shape ", shape_text(step));
    grad = contiguous({"grad", &grad_in});
    schedule = contiguous({"schedule", &schedule_in});
    check_mutable(
        {{"v", &v},
         {"exp_avg", &exp_avg},
         {"exp_avg_sq", &exp_avg_sq},
         {"weight_q", &weight_q},
         {"step", &step}},
        {{"grad", &grad_in},
         {"weight", &weight_in},
         {"scale", &scale_in},
         {"zero_point", &zero_point_in},
         {"schedule", &schedule_in}});
  }
};

// codes [rows, cols] int8 or uint8, scale and zero_point [rows or 1, n_groups].
struct DequantizeArguments {
  Tensor codes;
  Tensor scale;
  Tensor zero_point;

  DequantizeArguments(
      const Tensor& codes_in, const Tensor& scale_in, const Tensor& zero_point_in,
      ScalarType dtype) {
    check_same_device({{"codes", &codes_in}, {"scale", &scale_in}, {"zero_point", &zero_point_in}});
    check_dtype({"codes", &codes_in}, {ScalarType::Char, ScalarType::Byte});
    check_grid(
        {"codes", &codes_in}, scale_in, zero_point_in,
        dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float);
    codes = contiguous({"codes", &codes_in});
    scale = contiguous({"scale", &scale_in});
    zero_point = contiguous({"zero_point", &zero_point_in});
    const bool cuda = codes.is_cuda();
    ADAROUND_CHECK(
        dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half ||
            (dtype == ScalarType::Double && !cuda),
        "dtype must be Float, BFloat16, Half", cuda ? "" : " or Double", ", got ",
        torch::headeronly::toString(dtype));
  }
};

}  // namespace adaround_ext
