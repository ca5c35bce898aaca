// Table of contents: the schema of every op. Kernels register themselves in cpu/ and cuda/; fake
// kernels and autograd formulas are in adaround_ext/ops, where every op is documented.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(adaround_ext, m) {
  m.def(
      "soft_quantize(Tensor weight, Tensor v, Tensor scale, Tensor zero_point, int qmin, int qmax, "
      "float beta) -> (Tensor, Tensor)");
  m.def(
      "_soft_quantize_backward(Tensor grad_weight_q, Tensor grad_reg, Tensor weight, Tensor v, "
      "Tensor scale, Tensor zero_point, int qmin, int qmax, float beta) -> Tensor");
  m.def(
      "soft_quantize_with_grad(Tensor weight, Tensor v, Tensor scale, Tensor zero_point, int qmin, "
      "int qmax, float beta) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rounding_step_(Tensor(a!) v, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!) weight_q, "
      "Tensor grad, Tensor weight, Tensor scale, Tensor zero_point, int qmin, int qmax, "
      "Tensor schedule, Tensor(e!) step, bool as_error, bool normalize) -> ()");
  m.def(
      "hard_quantize(Tensor weight, Tensor v, Tensor scale, Tensor zero_point, int qmin, int qmax) "
      "-> Tensor");
  m.def("dequantize(Tensor codes, Tensor scale, Tensor zero_point, ScalarType dtype) -> Tensor");
  m.def(
      "refine_(Tensor(a!) codes, Tensor(b!) residual, Tensor gram, Tensor scale, int qmin, int qmax, "
      "int max_sweeps) -> ()");
  m.def(
      "tabu_search_(Tensor(a!) codes, Tensor(b!) residual, Tensor gram, Tensor scale, int qmin, "
      "int qmax, int steps, int seed) -> ()");
  m.def(
      "gptq(Tensor weight, Tensor feedback, Tensor order, Tensor scale, Tensor zero_point, int qmin, "
      "int qmax) -> Tensor");
  m.def("pack_bits(Tensor codes, int bits, int qmin) -> Tensor");
  m.def("unpack_bits(Tensor packed, int bits, int cols, int qmin) -> Tensor");
  m.def(
      "packed_linear(Tensor x, Tensor packed, Tensor scale, Tensor zero_point, Tensor? bias, "
      "int bits, int qmin) -> Tensor");
  m.def("_use_instruction_set(str name) -> str");
}
