// soft_quantize, _soft_quantize_backward and soft_quantize_with_grad on CUDA.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "arguments/rounding.h"
#include "cuda/cuda_utils.cuh"

namespace adaround_ext::cuda {
namespace {

// A partial sum of the regularizer a block; a block takes every kMaxBlocks-th chunk. The number
// depends on the sizes alone, so the bits do not depend on the device.
constexpr int64_t kMaxBlocks = 16384;
constexpr int kSumThreads = 1024;

template <typename weight_t>
struct SoftPointers {
  const weight_t* weight;
  const float* v;
  weight_t* weight_q;
  float* dweight_q_dv;  // with the gradients only, as is dreg_dv
  float* dreg_dv;
  double* partial;  // [blocks]
  int64_t numel;
  int64_t blocks;
  GridView grids;
  float beta;
  bool wide;
};

template <bool kWithGrad, typename weight_t>
__global__ void __launch_bounds__(kThreads)
    soft_quantize_kernel(const __grid_constant__ SoftPointers<weight_t> s) {
  double sum = 0.0;
  for (int64_t chunk = blockIdx.x; chunk * kChunk < s.numel; chunk += gridDim.x) {
    with_span(s.wide, chunk, s.numel, [&](auto span) {
      weight_t weight[kWidth];
      float v[kWidth];
      Grid<float> grid[kWidth];
      load(weight, s.weight, span);
      load(v, s.v, span);
      load(grid, s.grids, span);
      float weight_q[kWidth], dweight_q_dv[kWidth], dreg_dv[kWidth];
      float chunk_sum = 0.0f;
#pragma unroll
      for (int e = 0; e < kWidth; ++e) {
        const Rectified<float> r = rectified_sigmoid(v[e]);
        const float code = floor_code(static_cast<float>(weight[e]), grid[e]) + r.h;
        weight_q[e] = dequantize(clamp_code(code, grid[e]), grid[e]);
        const Regularizer<float> reg = round_reg(r.h, s.beta);
        if (kWithGrad) {
          dweight_q_dv[e] = through_clamp(grid[e].scale * r.grad, code, grid[e]);
          dreg_dv[e] = reg.grad * r.grad;
        }
        chunk_sum += span.holds(e) ? reg.value : 0.0f;
      }
      store(s.weight_q, weight_q, span);
      if (kWithGrad) {
        store(s.dweight_q_dv, dweight_q_dv, span);
        store(s.dreg_dv, dreg_dv, span);
      }
      sum += chunk_sum;
    });
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) {
    s.partial[blockIdx.x] = sum;
  }
}

// One block adds the partial sums up in a fixed order.
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const double* partial, int64_t blocks, float* reg) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t block = threadIdx.x; block < blocks; block += kSumThreads) {
    sum += partial[block];
  }
  sum = block_sum<kSumThreads>(sum);
  if (threadIdx.x == 0) {
    *reg = static_cast<float>(sum);
  }
}

template <bool kWithGrad, typename weight_t>
void launch_soft_quantize(SoftPointers<weight_t> s, cudaStream_t stream) {
  s.wide = s.grids.wide && aligned(s.weight, s.v, s.weight_q, s.dweight_q_dv, s.dreg_dv);
  soft_quantize_kernel<kWithGrad><<<static_cast<unsigned>(s.blocks), kThreads, 0, stream>>>(s);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void launch_sum(const double* partial, int64_t blocks, float* reg, cudaStream_t stream) {
  sum_kernel<<<1, kSumThreads, 0, stream>>>(partial, blocks, reg);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

struct SoftOutputs {
  Tensor weight_q;
  Tensor dweight_q_dv;
  Tensor reg;
  Tensor dreg_dv;
};

template <bool kWithGrad>
SoftOutputs soft_quantize_any(
    const Tensor& weight, const Tensor& v, const Tensor& scale, const Tensor& zero_point,
    int64_t qmin, int64_t qmax, double beta) {
  const QuantizeArguments args(weight, v, scale, zero_point, qmin, qmax);
  check_beta(beta);
  const DeviceGuard guard(args.weight.get_device_index());
  const cudaStream_t stream = current_stream(args.weight);
  SoftOutputs out{
      allocate(args.weight, args.weight.sizes()), Tensor(), allocate(args.v, {}), Tensor()};
  if (kWithGrad) {
    out.dweight_q_dv = allocate(args.v, args.v.sizes());
    out.dreg_dv = allocate(args.v, args.v.sizes());
  }
  const int64_t numel = args.weight.numel();
  const int64_t blocks = std::min(chunk_count(numel), kMaxBlocks);
  const Tensor partial = allocate(args.v, {blocks}, ScalarType::Double);
  if (numel > 0) {
    const GridView grids(args.weight, args.scale, args.zero_point, qmin, qmax);
    dispatch_storage(args.weight.scalar_type(), [&](auto value) {
      using weight_t = decltype(value);
      launch_soft_quantize<kWithGrad, weight_t>(
          {input_pointer<weight_t>(args.weight), input_pointer<float>(args.v),
           output_pointer<weight_t>(out.weight_q),
           kWithGrad ? output_pointer<float>(out.dweight_q_dv) : nullptr,
           kWithGrad ? output_pointer<float>(out.dreg_dv) : nullptr,
           output_pointer<double>(partial), numel, blocks, grids, static_cast<float>(beta), false},
          stream);
    });
  }
  launch_sum(input_pointer<double>(partial), blocks, output_pointer<float>(out.reg), stream);
  return out;
}

std::tuple<Tensor, Tensor> soft_quantize_cuda(
    const Tensor& weight, const Tensor& v, const Tensor& scale, const Tensor& zero_point,
    int64_t qmin, int64_t qmax, double beta) {
  const SoftOutputs out = soft_quantize_any<false>(weight, v, scale, zero_point, qmin, qmax, beta);
  return {out.weight_q, out.reg};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_quantize_with_grad_cuda(
    const Tensor& weight, const Tensor& v, const Tensor& scale, const Tensor& zero_point,
    int64_t qmin, int64_t qmax, double beta) {
  const SoftOutputs out = soft_quantize_any<true>(weight, v, scale, zero_point, qmin, qmax, beta);
  return {out.weight_q, out.dweight_q_dv, out.reg, out.dreg_dv};
}

template <typename weight_t>
struct BackwardPointers {
  const weight_t* grad_weight_q;
  const float* grad_reg;
  const weight_t* weight;
  const float* v;
  float* grad_v;
  int64_t numel;
  GridView grids;
  float beta;
  bool wide;
};

template <typename weight_t>
__global__ void __launch_bounds__(kThreads)
    soft_quantize_backward_kernel(const __grid_constant__ BackwardPointers<weight_t> s) {
  with_span(s.wide, blockIdx.x, s.numel, [&](auto span) {
    weight_t grad[kWidth], weight[kWidth];
    float v[kWidth];
    Grid<float> grid[kWidth];
    load(grad, s.grad_weight_q, span);
    load(weight, s.weight, span);
    load(v, s.v, span);
    load(grid, s.grids, span);
    const StepParams<float> params{s.beta, *s.grad_reg, 0.0f, 0.0f};  // the gradient alone, no step
    float grad_v[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      const float below = floor_code(static_cast<float>(weight[e]), grid[e]);
      grad_v[e] = rounding_grad<true>(
          v[e], static_cast<float>(grad[e]), below, grid[e], grid[e].scale, params);
    }
    store(s.grad_v, grad_v, span);
  });
}

template <typename weight_t>
void launch_soft_quantize_backward(BackwardPointers<weight_t> s, cudaStream_t stream) {
  s.wide = s.grids.wide && aligned(s.grad_weight_q, s.weight, s.v, s.grad_v);
  const auto blocks = static_cast<unsigned>(chunk_count(s.numel));
  soft_quantize_backward_kernel<<<blocks, kThreads, 0, stream>>>(s);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor soft_quantize_backward_cuda(
    const Tensor& grad_weight_q, const Tensor& grad_reg, const Tensor& weight, const Tensor& v,
    const Tensor& scale, const Tensor& zero_point, int64_t qmin, int64_t qmax, double beta) {
  const QuantizeArguments args(weight, v, scale, zero_point, qmin, qmax);
  const BackwardArguments grads(grad_weight_q, grad_reg, args);
  check_beta(beta);
  const DeviceGuard guard(args.weight.get_device_index());
  const Tensor grad_v = allocate(args.v, args.v.sizes());
  if (grad_v.numel() == 0) {
    return grad_v;
  }
  const GridView grids(args.weight, args.scale, args.zero_point, qmin, qmax);
  dispatch_storage(args.weight.scalar_type(), [&](auto value) {
    using weight_t = decltype(value);
    launch_soft_quantize_backward<weight_t>(
        {input_pointer<weight_t>(grads.grad_weight_q), input_pointer<float>(grads.grad_reg),
         input_pointer<weight_t>(args.weight), input_pointer<float>(args.v),
         output_pointer<float>(grad_v), grad_v.numel(), grids, static_cast<float>(beta), false},
        current_stream(grad_v));
  });
  return grad_v;
}

}  // namespace
}  // namespace adaround_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CUDA, m) {
  m.impl("soft_quantize", TORCH_BOX(&adaround_ext::cuda::soft_quantize_cuda));
  m.impl("soft_quantize_with_grad", TORCH_BOX(&adaround_ext::cuda::soft_quantize_with_grad_cuda));
  m.impl("_soft_quantize_backward", TORCH_BOX(&adaround_ext::cuda::soft_quantize_backward_cuda));
}
