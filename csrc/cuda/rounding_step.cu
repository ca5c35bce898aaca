// rounding_step_ on CUDA: one optimisation step in one pass over memory. 36 bytes a weight in
// float32; memory is the limit, so what matters is that five loads a thread are in flight at once.
// No streaming hints: the state of a layer of a million weights stays in the second-level cache.
#include <torch/csrc/stable/library.h>

#include "arguments/rounding.h"
#include "cuda/cuda_utils.cuh"

namespace adaround_ext::cuda {
namespace {

template <typename weight_t, typename grad_t>
struct StepPointers {
  float* v;
  float* exp_avg;
  float* exp_avg_sq;
  grad_t* weight_q;
  const grad_t* grad;
  const weight_t* weight;
  int64_t numel;
  GridView grids;
  const float* schedule;  // [steps, kScheduleColumns]
  int64_t steps;
  const int64_t* step;
  bool as_error;
  bool normalize;
  bool wide;
};

__device__ __forceinline__ StepParams<float> read_schedule(
    const float* schedule, int64_t steps, int64_t step) {
  const int64_t row = min(max(step, int64_t{0}), steps - 1);
  return step_params<float>(schedule + row * kScheduleColumns);
}

template <typename weight_t, typename grad_t>
__global__ void __launch_bounds__(kThreads)
    rounding_step_kernel(const __grid_constant__ StepPointers<weight_t, grad_t> s) {
  __shared__ StepParams<float> params;
  with_span(s.wide, blockIdx.x, s.numel, [&](auto span) {
    float v[kWidth], exp_avg[kWidth], exp_avg_sq[kWidth];
    grad_t grad[kWidth];
    weight_t weight[kWidth];
    Grid<float> grid[kWidth];
    load(v, s.v, span);
    load(grad, s.grad, span);
    load(weight, s.weight, span);
    load(exp_avg, s.exp_avg, span);
    load(exp_avg_sq, s.exp_avg_sq, span);
    load(grid, s.grids, span);
    // One thread reads, after the loads above are on their way.
    if (threadIdx.x == 0) {
      params = read_schedule(s.schedule, s.steps, *s.step);
    }
    __syncthreads();

    float below[kWidth], grad_factor[kWidth], grad_v[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      below[e] = floor_code(static_cast<float>(weight[e]), grid[e]);
      if (!span.kWide || e == 0) {
        grad_factor[e] = s.normalize ? 1.0f / grid[e].scale : grid[e].scale;
      } else {
        grad_factor[e] = grad_factor[0];
      }
    }
    if (params.reg_weight != 0.0f) {  // the same for every thread
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        grad_v[e] = rounding_grad<true>(
            v[e], static_cast<float>(grad[e]), below[e], grid[e], grad_factor[e], params);
      }
    } else {
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        grad_v[e] = rounding_grad<false>(
            v[e], static_cast<float>(grad[e]), below[e], grid[e], grad_factor[e], params);
      }
    }
    const float weight_factor = s.as_error ? 1.0f : 0.0f;
    float weight_q[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      v[e] = adam_step(v[e], exp_avg[e], exp_avg_sq[e], grad_v[e], params);
      weight_q[e] =
          soft_weight(v[e], below[e], grid[e]) - weight_factor * static_cast<float>(weight[e]);
    }
    store(s.v, v, span);
    store(s.exp_avg, exp_avg, span);
    store(s.exp_avg_sq, exp_avg_sq, span);
    store(s.weight_q, weight_q, span);
  });
}

// A kernel of its own, after the step's: every block of that one reads the counter.
__global__ void advance_kernel(int64_t* step) {
  if (*step < INT64_MAX) {
    *step += 1;
  }
}

template <typename weight_t, typename grad_t>
void launch_rounding_step(StepPointers<weight_t, grad_t> s, cudaStream_t stream) {
  s.wide = s.grids.wide && aligned(s.v, s.exp_avg, s.exp_avg_sq, s.weight_q, s.grad, s.weight);
  const auto blocks = static_cast<unsigned>(chunk_count(s.numel));
  rounding_step_kernel<<<blocks, kThreads, 0, stream>>>(s);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_advance(int64_t* step, cudaStream_t stream) {
  advance_kernel<<<1, 1, 0, stream>>>(step);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void rounding_step_cuda(
    const Tensor& v, const Tensor& exp_avg, const Tensor& exp_avg_sq, const Tensor& weight_q,
    const Tensor& grad, const Tensor& weight, const Tensor& scale, const Tensor& zero_point,
    int64_t qmin, int64_t qmax, const Tensor& schedule, const Tensor& step, bool as_error,
    bool normalize) {
  const StepArguments args(
      v, exp_avg, exp_avg_sq, weight_q, grad, weight, scale, zero_point, qmin, qmax, schedule,
      step);
  const DeviceGuard guard(v.get_device_index());
  const cudaStream_t stream = current_stream(v);
  int64_t* counter = output_pointer<int64_t>(step);
  if (v.numel() > 0) {
    const GridView grids(args.weight, args.scale, args.zero_point, qmin, qmax);
    dispatch_storage(args.weight.scalar_type(), [&](auto weight_value) {
      dispatch_storage(args.grad.scalar_type(), [&](auto grad_value) {
        using weight_t = decltype(weight_value);
        using grad_t = decltype(grad_value);
        launch_rounding_step<weight_t, grad_t>(
            {output_pointer<float>(v), output_pointer<float>(exp_avg),
             output_pointer<float>(exp_avg_sq), output_pointer<grad_t>(weight_q),
             input_pointer<grad_t>(args.grad), input_pointer<weight_t>(args.weight), v.numel(),
             grids, input_pointer<float>(args.schedule), args.schedule.size(0), counter, as_error,
             normalize, false},
            stream);
      });
    });
  }
  launch_advance(counter, stream);
}

}  // namespace
}  // namespace adaround_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CUDA, m) {
  m.impl("rounding_step_", TORCH_BOX(&adaround_ext::cuda::rounding_step_cuda));
}
