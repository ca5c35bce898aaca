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
  const RowLayout layout(codes, args.gram, args.scale);
  const int64_t cols = layout.cols;
  code_t* codes_ptr = static_cast<code_t*>(codes.mutable_data_ptr());
  T* residual_ptr = residual.mutable_data_ptr<T>();
  const T* gram = args.gram.const_data_ptr<T>();
  const T* scale = args.scale.const_data_ptr<T>();
  const auto kernel = kernels<T>().refine_row;
  torch::stable::parallel_for(0, layout.rows, 1, [&](int64_t first, int64_t last) {
    std::vector<T> row_codes(static_cast<size_t>(cols));
    for (int64_t row = first; row < last; ++row) {
      code_t* row_ptr = codes_ptr + row * cols;
      std::copy(row_ptr, row_ptr + cols, row_codes.begin());
      kernel(
          {row_codes.data(), residual_ptr + row * cols, gram + layout.gram_of(row),
           scale + layout.scale_of(row), cols, layout.group_size, static_cast<T>(qmin),
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
  dispatch_arithmetic(residual.scalar_type(), [&](auto number) {
    dispatch_codes(codes.scalar_type(), [&](auto code) {
      run_refine<decltype(number), decltype(code)>(args, codes, residual, qmin, qmax, max_sweeps);
    });
  });
}

}  // namespace
}  // namespace adaround_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CPU, m) {
  m.impl("refine_", TORCH_BOX(&adaround_ext::cpu::refine_cpu));
}
