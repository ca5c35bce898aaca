// rounding_step_ on the CPU: one optimisation step in one pass over memory.
#include <torch/csrc/stable/library.h>

#include <cmath>

#include "arguments/rounding.h"
#include "cpu/storage.h"

namespace adaround_ext::cpu {
namespace {

template <typename T>
void run_rounding_step(
    const StepArguments& args, const Tensor& v, const Tensor& exp_avg, const Tensor& exp_avg_sq,
    const Tensor& weight_q, int64_t qmin, int64_t qmax, const StepParams<T>& params, bool as_error,
    bool normalize) {
  const GridView<T> grids(args.weight, args.scale, args.zero_point, qmin, qmax);
  const Input<T> grad(args.grad);
  const Input<T> weight(args.weight);
  const Output<T> out(weight_q);
  T* v_ptr = v.mutable_data_ptr<T>();
  T* exp_avg_ptr = exp_avg.mutable_data_ptr<T>();
  T* exp_avg_sq_ptr = exp_avg_sq.mutable_data_ptr<T>();
  const bool with_reg = params.reg_weight != T(0);
  const auto kernel = kernels<T>().rounding_step;
  parallel_chunks(args.weight.numel(), [&](int64_t, int64_t begin, int64_t size) {
    alignas(64) T grad_buffer[kChunk];
    alignas(64) T weight_buffer[kChunk];
    alignas(64) T out_buffer[kChunk];
    const T* grad_ptr = grad.load(begin, size, grad_buffer);
    const T* weight_ptr = weight.load(begin, size, weight_buffer);
    T* out_ptr = out.target(begin, out_buffer);
    grids.for_each_run(begin, size, [&](int64_t offset, int64_t count, const Grid<T>& grid) {
      const int64_t at = begin + offset;
      kernel(
          {v_ptr + at, exp_avg_ptr + at, exp_avg_sq_ptr + at, out_ptr + offset, grad_ptr + offset,
           weight_ptr + offset, count, grid, params, with_reg, as_error, normalize});
    });
    out.flush(begin, size, out_ptr);
  });
}

void rounding_step_cpu(
    const Tensor& v, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& weight_q,
    const Tensor& grad, const Tensor& weight, const Tensor& scale, const Tensor& zero_point,
    int64_t qmin, int64_t qmax, const Tensor& schedule, const Tensor& step, bool as_error,
    bool normalize) {
  const StepArguments args(
      v, exp_avg, exp_avg_sq, weight_q, grad, weight, scale, zero_point, qmin, qmax, schedule,
      step);
  int64_t* counter = step.mutable_data_ptr<int64_t>();
  const int64_t last = args.schedule.size(0) - 1;
  const int64_t row = std::min(std::max<int64_t>(*counter, 0), last);
  const float* values = args.schedule.const_data_ptr<float>() + row * kScheduleColumns;
  dispatch_arithmetic(v.scalar_type(), [&](auto number) {
    using T = decltype(number);
    run_rounding_step<T>(
        args, v, exp_avg, exp_avg_sq, weight_q, qmin, qmax, step_params<T>(values), as_error,
        normalize);
  });
  if (*counter < INT64_MAX) {
    *counter += 1;
  }
}

}  // namespace
}  // namespace adaround_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CPU, m) {
  m.impl("rounding_step_", TORCH_BOX(&adaround_ext::cpu::rounding_step_cpu));
}
