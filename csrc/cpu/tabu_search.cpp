// tabu_search_ on the CPU: rows in parallel.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "arguments/search.h"
#include "cpu/storage.h"

namespace adaround_ext::cpu {
namespace {

template <typename T, typename code_t>
void run_tabu_search(
    const SearchArguments& args, const Tensor& codes, const Tensor& residual, int64_t qmin,
    int64_t qmax, int64_t steps, int64_t seed) {
  const RowLayout layout(codes, args.gram, args.scale);
  const int64_t cols = layout.cols;
  code_t* codes_ptr = static_cast<code_t*>(codes.mutable_data_ptr());
  T* residual_ptr = residual.mutable_data_ptr<T>();
  const T* gram_ptr = args.gram.const_data_ptr<T>();
  const T* scale_ptr = args.scale.const_data_ptr<T>();
  const auto kernel = kernels<T>().tabu_row;
  torch::stable::parallel_for(0, layout.rows, 1, [&](int64_t first, int64_t last) {
    const auto size = static_cast<size_t>(cols);
    std::vector<T> row_codes(size), best_codes(size), best_residual(size), free_from(size);
    std::vector<T> scale(size), curvature(size);
    for (int64_t row = first; row < last; ++row) {
      code_t* row_ptr = codes_ptr + row * cols;
      T* residual_row = residual_ptr + row * cols;
      const T* gram = gram_ptr + layout.gram_of(row);
      const T* scales = scale_ptr + layout.scale_of(row);
      for (int64_t j = 0; j < cols; ++j) {
        scale[j] = scales[j / layout.group_size];
        curvature[j] = gram[j * cols + j] * scale[j];
      }
      std::copy(row_ptr, row_ptr + cols, row_codes.begin());
      std::fill(free_from.begin(), free_from.end(), T(0));
      kernel(
          {row_codes.data(), residual_row, best_codes.data(), best_residual.data(),
           free_from.data(), scale.data(), curvature.data(), gram, cols, static_cast<T>(qmin),
           static_cast<T>(qmax), steps, static_cast<uint64_t>(seed)});
      std::copy(best_residual.begin(), best_residual.end(), residual_row);
      std::transform(best_codes.begin(), best_codes.end(), row_ptr, [](T code) {
        return static_cast<code_t>(code);
      });
    }
  });
}

void tabu_search_cpu(
    const Tensor& codes, const Tensor& residual, const Tensor& gram, const Tensor& scale,
    int64_t qmin, int64_t qmax, int64_t steps, int64_t seed) {
  const SearchArguments args(codes, residual, gram, scale, qmin, qmax);
  check_tabu_steps(steps, seed);
  if (codes.numel() == 0) {
    return;
  }
  dispatch_arithmetic(residual.scalar_type(), [&](auto number) {
    dispatch_codes(codes.scalar_type(), [&](auto code) {
      run_tabu_search<decltype(number), decltype(code)>(
          args, codes, residual, qmin, qmax, steps, seed);
    });
  });
}

}  // namespace
}  // namespace adaround_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CPU, m) {
  m.impl("tabu_search_", TORCH_BOX(&adaround_ext::cpu::tabu_search_cpu));
}
