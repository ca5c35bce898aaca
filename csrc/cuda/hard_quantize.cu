// hard_quantize and dequantize on CUDA.
#include <torch/csrc/stable/library.h>

#include "arguments/rounding.h"
#include "cuda/cuda_utils.cuh"

namespace adaround_ext::cuda {
namespace {

template <typename weight_t, typename code_t>
struct HardPointers {
  const weight_t* weight;
  const float* v;
  code_t* codes;
  int64_t numel;
  GridView grids;
  bool wide;
};

template <typename weight_t, typename code_t>
__global__ void __launch_bounds__(kThreads)
    hard_quantize_kernel(const __grid_constant__ HardPointers<weight_t, code_t> s) {
  with_span(s.wide, blockIdx.x, s.numel, [&](auto span) {
    weight_t weight[kWidth];
    float v[kWidth];
    Grid<float> grid[kWidth];
    load(weight, s.weight, span);
    load(v, s.v, span);
    load(grid, s.grids, span);
    float codes[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      codes[e] = hard_code(static_cast<float>(weight[e]), v[e], grid[e]);
    }
    store(s.codes, codes, span);
  });
}

template <typename weight_t, typename code_t>
void launch_hard_quantize(HardPointers<weight_t, code_t> s, cudaStream_t stream) {
  s.wide = s.grids.wide && aligned(s.weight, s.v, s.codes);
  const auto blocks = static_cast<unsigned>(chunk_count(s.numel));
  hard_quantize_kernel<<<blocks, kThreads, 0, stream>>>(s);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor hard_quantize_cuda(
    const Tensor& weight, const Tensor& v, const Tensor& scale, const Tensor& zero_point,
    int64_t qmin, int64_t qmax) {
  const QuantizeArguments args(weight, v, scale, zero_point, qmin, qmax);
  const DeviceGuard guard(args.weight.get_device_index());
  const Tensor codes = allocate(args.weight, args.weight.sizes(), code_dtype(qmin));
  if (codes.numel() == 0) {
    return codes;
  }
  const GridView grids(args.weight, args.scale, args.zero_point, qmin, qmax);
  dispatch_storage(args.weight.scalar_type(), [&](auto weight_value) {
    dispatch_codes(codes.scalar_type(), [&](auto code_value) {
      using weight_t = decltype(weight_value);
      using code_t = decltype(code_value);
      launch_hard_quantize<weight_t, code_t>(
          {input_pointer<weight_t>(args.weight), input_pointer<float>(args.v),
           output_pointer<code_t>(codes), codes.numel(), grids, false},
          current_stream(codes));
    });
  });
  return codes;
}

template <typename weight_t, typename code_t>
struct DequantizePointers {
  const code_t* codes;
  weight_t* weight_q;
  int64_t numel;
  GridView grids;
  bool wide;
};

template <typename weight_t, typename code_t>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const __grid_constant__ DequantizePointers<weight_t, code_t> s) {
  with_span(s.wide, blockIdx.x, s.numel, [&](auto span) {
    code_t codes[kWidth];
    Grid<float> grid[kWidth];
    load(codes, s.codes, span);
    load(grid, s.grids, span);
    float weight_q[kWidth];
#pragma unroll
    for (int e = 0; e < kWidth; ++e) {
      weight_q[e] = dequantize(static_cast<float>(codes[e]), grid[e]);
    }
    store(s.weight_q, weight_q, span);
  });
}

template <typename weight_t, typename code_t>
void launch_dequantize(DequantizePointers<weight_t, code_t> s, cudaStream_t stream) {
  s.wide = s.grids.wide && aligned(s.codes, s.weight_q);
  const auto blocks = static_cast<unsigned>(chunk_count(s.numel));
  dequantize_kernel<<<blocks, kThreads, 0, stream>>>(s);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor dequantize_cuda(
    const Tensor& codes, const Tensor& scale, const Tensor& zero_point, ScalarType dtype) {
  const DequantizeArguments args(codes, scale, zero_point, dtype);
  const DeviceGuard guard(args.codes.get_device_index());
  const Tensor weight_q = allocate(args.codes, args.codes.sizes(), dtype);
  if (weight_q.numel() == 0) {
    return weight_q;
  }
  const GridView grids(args.codes, args.scale, args.zero_point, 0, 0);
  dispatch_storage(dtype, [&](auto weight_value) {
    dispatch_codes(args.codes.scalar_type(), [&](auto code_value) {
      using weight_t = decltype(weight_value);
      using code_t = decltype(code_value);
      launch_dequantize<weight_t, code_t>(
          {input_pointer<code_t>(args.codes), output_pointer<weight_t>(weight_q), weight_q.numel(),
           grids, false},
          current_stream(weight_q));
    });
  });
  return weight_q;
}

}  // namespace
}  // namespace adaround_ext::cuda

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CUDA, m) {
  m.impl("hard_quantize", TORCH_BOX(&adaround_ext::cuda::hard_quantize_cuda));
  m.impl("dequantize", TORCH_BOX(&adaround_ext::cuda::dequantize_cuda));
}
