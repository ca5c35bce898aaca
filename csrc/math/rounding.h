// The formulas of AdaRound (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training
// Quantization", ICML 2020), once for C++ and CUDA;
// adaround_ext/reference/rounding.py is the same in Python. T is float, double or a vector of
// floats (cpu/isa/vec.h). The discrete solvers' are in search.h.
//
// Conventions at the kinks, the same as the derivatives of torch.clamp:
//   h is differentiable at both ends of its clip, and constant beyond;
//   the grid's clamp passes the gradient where qmin <= code <= qmax, ends included;
//   the regularizer has gradient 0 at h = 1/2.
#pragma once

#include "math/elementary.h"

namespace adaround_ext {

constexpr double kZeta = 1.1;  // stretch of the rectified sigmoid, eq. (23)
constexpr double kGamma = -0.1;
constexpr double kAdamBeta1 = 0.9;  // Adam's defaults, which the paper uses
constexpr double kAdamBeta2 = 0.999;
constexpr double kAdamEps = 1e-8;
constexpr double kLog2E = 1.4426950408889634;

// The grid of a run of weights: w_q = scale (clamp(code, qmin, qmax) - zero_point), eq. (22).
template <typename T>
struct Grid {
  T scale;
  T zero_point;
  T qmin;
  T qmax;
};

// What one row of the schedule says about a step.
template <typename T>
struct StepParams {
  T beta;
  T reg_weight;
  T step_size;      // learning rate / bias_correction1
  T inv_bias_sqrt;  // 1 / sqrt(bias_correction2)
};

// A row of the schedule: beta, reg_weight, learning rate, bias_correction1 and
// sqrt(bias_correction2).
constexpr int64_t kScheduleColumns = 5;

template <typename T>
ADAROUND_INLINE StepParams<T> step_params(const float* row) {
  return {
      static_cast<T>(row[0]), static_cast<T>(row[1]),
      static_cast<T>(row[2]) / static_cast<T>(row[3]), T(1) / static_cast<T>(row[4])};
}

template <typename T>
struct Rectified {
  T h;     // h(V)
  T grad;  // h'(V)
};

// h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), eq. (23), and its derivative.
template <typename T>
ADAROUND_INLINE Rectified<T> rectified_sigmoid(T v) {
  const T sigmoid = divide_(T(1.0), T(1.0) + exp2_(v * T(-kLog2E)));
  const T wide = sigmoid * T(kZeta - kGamma);
  const T stretched = wide + T(kGamma);
  const T slope = wide - wide * sigmoid;
  const T h = max_(T(0.0), min_(T(1.0), stretched));
  return {h, select_(h == stretched, slope, T(0.0))};
}

// |u|^(beta - 2) for u = 2h - 1, beta >= 1. The floor keeps the logarithm finite at u = 0.
template <typename T>
ADAROUND_INLINE T reg_power(T u, T beta) {
  return exp2_((beta - T(2.0)) * log2_(max_(T(1e-30), abs_(u))));
}

// One weight's term of f_reg(V) = sum 1 - |2h(V) - 1|^beta, eq. (24), and d f_reg / d h.
template <typename T>
struct Regularizer {
  T value;
  T grad;
};

template <typename T>
ADAROUND_INLINE Regularizer<T> round_reg(T h, T beta) {
  const T u = T(2.0) * h - T(1.0);
  const T signed_power = u * reg_power(u, beta);  // sign(u) |u|^(beta - 1)
  return {T(1.0) - u * signed_power, T(-2.0) * beta * signed_power};
}

// The code below the weight. The division is exact, so that host, device and reference agree.
template <typename T>
ADAROUND_INLINE T floor_code(T weight, const Grid<T>& grid) {
  return floor_(weight / grid.scale) + grid.zero_point;
}

template <typename T>
ADAROUND_INLINE T clamp_code(T code, const Grid<T>& grid) {
  return max_(grid.qmin, min_(grid.qmax, code));
}

// A code that is stored: NaN, which is no integer, becomes qmin on every device.
template <typename T>
ADAROUND_INLINE T stored_code(T code, const Grid<T>& grid) {
  const T inside = clamp_code(code, grid);
  return select_(inside == inside, inside, grid.qmin);
}

template <typename T>
ADAROUND_INLINE T dequantize(T code, const Grid<T>& grid) {
  return product_(grid.scale, code - grid.zero_point);
}

// Rounding to nearest: ties to even before the zero point is added, as in grid.py.
template <typename T>
ADAROUND_INLINE T nearest_code(T weight, const Grid<T>& grid) {
  return stored_code(round_(weight / grid.scale) + grid.zero_point, grid);
}

// A gradient with respect to the clamped code, taken through the clamp.
template <typename T>
ADAROUND_INLINE T through_clamp(T grad, T code, const Grid<T>& grid) {
  return select_(clamp_code(code, grid) == code, grad, T(0.0));
}

// The hard decision: up where h(V) >= 1/2, that is V >= 0.
template <typename T>
ADAROUND_INLINE T hard_code(T weight, T v, const Grid<T>& grid) {
  const T up = select_(v >= T(0.0), T(1.0), T(0.0));
  return stored_code(floor_code(weight, grid) + up, grid);
}

// d loss / d V of one weight: the chain rule through the clamp and h, and the regularizer.
//   (through_clamp(grad grad_factor) + reg_weight d f_reg / d h) h'(V)
// below is floor_code, grad d reconstruction loss / d w_q. grad_factor is scale for the loss as the
// paper has it, eq. (25), and 1 / scale for that gradient divided by scale^2, which makes
// reg_weight independent of the scale.
template <bool kWithReg, typename T>
ADAROUND_INLINE T rounding_grad(
    T v, T grad, T below, const Grid<T>& grid, T grad_factor, const StepParams<T>& params) {
  const Rectified<T> r = rectified_sigmoid(v);
  T grad_h = through_clamp(grad * grad_factor, below + r.h, grid);
  if (kWithReg) {
    grad_h = grad_h + params.reg_weight * round_reg(r.h, params.beta).grad;
  }
  return grad_h * r.grad;
}

// Adam (Kingma & Ba 2015, algorithm 1) for one variable; returns its new value.
template <typename T>
ADAROUND_INLINE T adam_step(T v, T& exp_avg, T& exp_avg_sq, T grad_v, const StepParams<T>& params) {
  exp_avg = exp_avg + T(1.0 - kAdamBeta1) * (grad_v - exp_avg);
  exp_avg_sq = exp_avg_sq + T(1.0 - kAdamBeta2) * (grad_v * grad_v - exp_avg_sq);
  const T denominator = sqrt_(exp_avg_sq) * params.inv_bias_sqrt + T(kAdamEps);
  return v - divide_(params.step_size * exp_avg, denominator);
}

// The soft quantized weight, eq. (22), from the code below the weight.
template <typename T>
ADAROUND_INLINE T soft_weight(T v, T below, const Grid<T>& grid) {
  return dequantize(clamp_code(below + rectified_sigmoid(v).h, grid), grid);
}

}  // namespace adaround_ext
