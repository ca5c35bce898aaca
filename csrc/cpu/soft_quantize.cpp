// soft_quantize, _soft_quantize_backward and soft_quantize_with_grad on the CPU.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "arguments/rounding.h"
#include "cpu/storage.h"

namespace adaround_ext::cpu {
namespace {

struct SoftOutputs {
  Tensor weight_q;
  Tensor dweight_q_dv;
  Tensor reg;
  Tensor dreg_dv;
};

template <typename T>
void run_soft_quantize(
    const QuantizeArguments& args, int64_t qmin, int64_t qmax, double beta, const SoftOutputs& out,
    bool with_grad) {
  const GridView<T> grids(args.weight, args.scale, args.zero_point, qmin, qmax);
  const Input<T> weight(args.weight);
  const T* v = args.v.const_data_ptr<T>();
  const Output<T> weight_q(out.weight_q);
  const int64_t numel = args.weight.numel();
  // A partial sum a chunk, added up in order: the same bits whatever the number of threads.
  std::vector<double> partial(static_cast<size_t>((numel + kChunk - 1) / kChunk));
  T* dweight_q_dv = with_grad ? out.dweight_q_dv.mutable_data_ptr<T>() : nullptr;
  T* dreg_dv = with_grad ? out.dreg_dv.mutable_data_ptr<T>() : nullptr;
  const auto kernel = with_grad ? kernels<T>().soft_quantize_with_grad : kernels<T>().soft_quantize;
  parallel_chunks(numel, [&](int64_t chunk, int64_t begin, int64_t size) {
    alignas(64) T weight_buffer[kChunk];
    alignas(64) T out_buffer[kChunk];
    const T* weight_ptr = weight.load(begin, size, weight_buffer);
    T* out_ptr = weight_q.target(begin, out_buffer);
    grids.for_each_run(begin, size, [&](int64_t offset, int64_t count, const Grid<T>& grid) {
      partial[static_cast<size_t>(chunk)] += kernel(
          {weight_ptr + offset, v + begin + offset, out_ptr + offset,
           with_grad ? dweight_q_dv + begin + offset : nullptr,
           with_grad ? dreg_dv + begin + offset : nullptr, count, grid, static_cast<T>(beta)});
    });
    weight_q.flush(begin, size, out_ptr);
  });
  double sum = 0.0;
  for (const double part : partial) {
    sum += part;
  }
  *out.reg.mutable_data_ptr<T>() = static_cast<T>(sum);
}

SoftOutputs soft_quantize_any(
    const Tensor& weight, const Tensor& v, const Tensor& scale, const Tensor& zero_point,
    int64_t qmin, int64_t qmax, double beta, bool with_grad) {
  const QuantizeArguments args(weight, v, scale, zero_point, qmin, qmax);
  check_beta(beta);
  SoftOutputs out{
      allocate(args.weight, args.weight.sizes()),
      with_grad ? allocate(args.v, args.v.sizes()) : Tensor(), allocate(args.v, {}),
      with_grad ? allocate(args.v, args.v.sizes()) : Tensor()};
  dispatch_arithmetic(args.weight.scalar_type(), [&](auto number) {
    run_soft_quantize<decltype(number)>(args, qmin, qmax, beta, out, with_grad);
  });
  return out;
}

std::tuple<Tensor, Tensor> soft_quantize_cpu(
    const Tensor& weight, const Tensor& v, const Tensor& scale, const Tensor& zero_point,
    int64_t qmin, int64_t qmax, double beta) {
  const SoftOutputs out = soft_quantize_any(weight, v, scale, zero_point, qmin, qmax, beta, false);
  return {out.weight_q, out.reg};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> soft_quantize_with_grad_cpu(
    const Tensor& weight, const Tensor& v, const Tensor& scale, const Tensor& zero_point,
    int64_t qmin, int64_t qmax, double beta) {
  const SoftOutputs out = soft_quantize_any(weight, v, scale, zero_point, qmin, qmax, beta, true);
  return {out.weight_q, out.dweight_q_dv, out.reg, out.dreg_dv};
}

template <typename T>
void run_backward(
    const BackwardArguments& grads, const QuantizeArguments& args, int64_t qmin, int64_t qmax,
    double beta, const Tensor& grad_v) {
  const GridView<T> grids(args.weight, args.scale, args.zero_point, qmin, qmax);
  const Input<T> grad_weight_q(grads.grad_weight_q);
  const Input<T> weight(args.weight);
  const T* v = args.v.const_data_ptr<T>();
  const T grad_reg = *grads.grad_reg.const_data_ptr<T>();
  T* out = grad_v.mutable_data_ptr<T>();
  const auto kernel = kernels<T>().soft_quantize_backward;
  parallel_chunks(args.weight.numel(), [&](int64_t, int64_t begin, int64_t size) {
    alignas(64) T weight_buffer[kChunk];
    alignas(64) T grad_buffer[kChunk];
    const T* weight_ptr = weight.load(begin, size, weight_buffer);
    const T* grad_ptr = grad_weight_q.load(begin, size, grad_buffer);
    grids.for_each_run(begin, size, [&](int64_t offset, int64_t count, const Grid<T>& grid) {
      kernel(
          {grad_ptr + offset, grad_reg, weight_ptr + offset, v + begin + offset,
           out + begin + offset, count, grid, static_cast<T>(beta)});
    });
  });
}

Tensor soft_quantize_backward_cpu(
    const Tensor& grad_weight_q, const Tensor& grad_reg, const Tensor& weight, const Tensor& v,
    const Tensor& scale, const Tensor& zero_point, int64_t qmin, int64_t qmax, double beta) {
  const QuantizeArguments args(weight, v, scale, zero_point, qmin, qmax);
  const BackwardArguments grads(grad_weight_q, grad_reg, args);
  check_beta(beta);
  const Tensor grad_v = allocate(args.v, args.v.sizes());
  dispatch_arithmetic(args.weight.scalar_type(), [&](auto number) {
    run_backward<decltype(number)>(grads, args, qmin, qmax, beta, grad_v);
  });
  return grad_v;
}

}  // namespace
}  // namespace adaround_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CPU, m) {
  m.impl("soft_quantize", TORCH_BOX(&adaround_ext::cpu::soft_quantize_cpu));
  m.impl("soft_quantize_with_grad", TORCH_BOX(&adaround_ext::cpu::soft_quantize_with_grad_cpu));
  m.impl("_soft_quantize_backward", TORCH_BOX(&adaround_ext::cpu::soft_quantize_backward_cpu));
}
