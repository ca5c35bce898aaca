// refine_ on the CPU: coordinate descent over the whole grid, rows in parallel.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "arguments/search.h"
#include "cpu/storage.h"

namespace adaround_ext::cpu {
namespace {

template <typename T, typename code_t>
void run_refine(
    const SearchArguments& args, const Tensor& codes, const Tensor& residual, int64_t qmin,
    int64_t qmax, int64_t max_sweeps) {
  const int64_t rows = codes.size(0);
  const int64_t cols = codes.size(1);
  const int64_t n_groups = args.scale.size(1);
  const bool shared_scale = args.scale.size(0) == 1;
  const int64_t rows_per_gram = rows / args.gram.size(0);
  code_t* codes_ptr = static_cast<code_t*>(codes.mutable_data_ptr());
  T* residual_ptr = residual.mutable_data_ptr<T>();
  const T* gram = args.gram.const_data_ptr<T>();
  const T* scale = args.scale.const_data_ptr<T>();
  const auto kernel = kernels<T>().refine_row;
  torch::stable::parallel_for(0, rows, 1, [&](int64_t first, int64_t last) {
    std::vector<T> row_codes(static_cast<size_t>(cols));
    for (int64_t row = first; row < last; ++row) {
      code_t* row_ptr = codes_ptr + row * cols;
      std::copy(row_ptr, row_ptr + cols, row_codes.begin());
      kernel(
          {row_codes.data(), residual_ptr + row * cols, gram + row / rows_per_gram * cols * cols,
           scale + (shared_scale ? 0 : row * n_groups), cols, cols / n_groups, static_cast<T>(qmin),
           static_cast<T>(qmax), max_sweeps});
      std::transform(row_codes.begin(), row_codes.end(), row_ptr, [](T code) {
        return static_cast<code_t>(code);
      });
    }
  });
}

void refine_cpu(
    const Tensor& codes, const Tensor& residual, const Tensor& gram, const Tensor& scale,
    int64_t qmin, int64_t qmax, int64_t max_sweeps) {
  const SearchArguments args(codes, residual, gram, scale, qmin, qmax);
  check_max_sweeps(max_sweeps);
  if (codes.numel() == 0) {
    return;
  }
  const bool is_signed = codes.scalar_type() == ScalarType::Char;
  if (residual.scalar_type() == ScalarType::Double) {
    (is_signed ? run_refine<double, int8_t> : run_refine<double, uint8_t>)(args, codes, residual,
                                                                           qmin, qmax, max_sweeps);
  } else {
    (is_signed ? run_refine<float, int8_t> : run_refine<float, uint8_t>)(args, codes, residual,
                                                                         qmin, qmax, max_sweeps);
  }
}

}  // namespace
}  // namespace adaround_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CPU, m) {
  m.impl("refine_", TORCH_BOX(&adaround_ext::cpu::refine_cpu));
}
