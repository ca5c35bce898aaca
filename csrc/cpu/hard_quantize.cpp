// hard_quantize and dequantize on the CPU.
#include <torch/csrc/stable/library.h>

#include "arguments/rounding.h"
#include "cpu/storage.h"

namespace adaround_ext::cpu {
namespace {

template <typename T>
void run_hard_quantize(
    const QuantizeArguments& args, int64_t qmin, int64_t qmax, const Tensor& codes) {
  const GridView<T> grids(args.weight, args.scale, args.zero_point, qmin, qmax);
  const Input<T> weight(args.weight);
  const Output<T> out(codes);
  const T* v = args.v.const_data_ptr<T>();
  const auto kernel = kernels<T>().hard_quantize;
  parallel_chunks(args.weight.numel(), [&](int64_t, int64_t begin, int64_t size) {
    alignas(64) T weight_buffer[kChunk];
    alignas(64) T code_buffer[kChunk];
    const T* weight_ptr = weight.load(begin, size, weight_buffer);
    grids.for_each_run(begin, size, [&](int64_t offset, int64_t count, const Grid<T>& grid) {
      kernel({weight_ptr + offset, v + begin + offset, code_buffer + offset, count, grid});
    });
    out.flush(begin, size, code_buffer);
  });
}

Tensor hard_quantize_cpu(
    const Tensor& weight, const Tensor& v, const Tensor& scale, const Tensor& zero_point,
    int64_t qmin, int64_t qmax) {
  const QuantizeArguments args(weight, v, scale, zero_point, qmin, qmax);
  const Tensor codes = allocate(args.weight, args.weight.sizes(), code_dtype(qmin));
  dispatch_arithmetic(args.weight.scalar_type(), [&](auto number) {
    run_hard_quantize<decltype(number)>(args, qmin, qmax, codes);
  });
  return codes;
}

template <typename T, typename code_t>
void run_dequantize(const DequantizeArguments& args, const Tensor& weight_q) {
  const GridView<T> grids(args.codes, args.scale, args.zero_point, 0, 0);
  const code_t* codes = static_cast<const code_t*>(args.codes.const_data_ptr());
  const Output<T> out(weight_q);
  parallel_chunks(args.codes.numel(), [&](int64_t, int64_t begin, int64_t size) {
    alignas(64) T buffer[kChunk];
    T* out_ptr = out.target(begin, buffer);
    grids.for_each_run(begin, size, [&](int64_t offset, int64_t count, const Grid<T>& grid) {
      for (int64_t i = offset; i < offset + count; ++i) {
        out_ptr[i] = dequantize(static_cast<T>(codes[begin + i]), grid);
      }
    });
    out.flush(begin, size, out_ptr);
  });
}

Tensor dequantize_cpu(
    const Tensor& codes, const Tensor& scale, const Tensor& zero_point, ScalarType dtype) {
  const DequantizeArguments args(codes, scale, zero_point, dtype);
  const Tensor weight_q = allocate(args.codes, args.codes.sizes(), dtype);
  dispatch_arithmetic(dtype, [&](auto number) {
    dispatch_codes(args.codes.scalar_type(), [&](auto code) {
      run_dequantize<decltype(number), decltype(code)>(args, weight_q);
    });
  });
  return weight_q;
}

}  // namespace
}  // namespace adaround_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CPU, m) {
  m.impl("hard_quantize", TORCH_BOX(&adaround_ext::cpu::hard_quantize_cpu));
  m.impl("dequantize", TORCH_BOX(&adaround_ext::cpu::dequantize_cpu));
}
