// gptq on the CPU: rows are independent and go in tiles, which share the reading of the factor.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "arguments/search.h"
#include "cpu/storage.h"

namespace adaround_ext::cpu {
namespace {

template <typename T, typename code_t>
void run_gptq(const GptqArguments& args, int64_t qmin, int64_t qmax, const Tensor& codes) {
  const RowLayout layout(args.weight, args.feedback, args.scale);
  const int64_t cols = layout.cols;
  const int64_t rows_per_gram = layout.rows_per_gram;
  const int64_t tiles_per_gram = (rows_per_gram + kGptqRows - 1) / kGptqRows;
  const T* weight = args.weight.const_data_ptr<T>();
  const T* feedback = args.feedback.const_data_ptr<T>();
  const int64_t* orders = args.order.const_data_ptr<int64_t>();
  const T* scale = args.scale.const_data_ptr<T>();
  const int32_t* zero_point = args.zero_point.const_data_ptr<int32_t>();
  code_t* codes_ptr = static_cast<code_t*>(codes.mutable_data_ptr());
  const int64_t tiles = args.feedback.size(0) * tiles_per_gram;
  const auto kernel = kernels<T>().gptq_tile;
  torch::stable::parallel_for(0, tiles, 1, [&](int64_t first, int64_t last) {
    const auto size = static_cast<size_t>(kGptqRows * cols);
    std::vector<T> tile(size), shift(size), tile_codes(size);
    std::vector<Grid<T>> grid(
        size, Grid<T>{T(1), T(0), static_cast<T>(qmin), static_cast<T>(qmax)});
    for (int64_t index = first; index < last; ++index) {
      const int64_t group = index / tiles_per_gram;
      const int64_t begin = index % tiles_per_gram * kGptqRows;
      const int64_t count = std::min(kGptqRows, rows_per_gram - begin);
      const int64_t* order = orders + group * cols;
      std::fill(tile.begin(), tile.end(), T(0));  // rows that the last tile lacks
      std::fill(shift.begin(), shift.end(), T(0));
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = group * rows_per_gram + begin + i;
        for (int64_t k = 0; k < cols; ++k) {
          const int64_t run = layout.scale_of(row) + order[k] / layout.group_size;
          tile[i * cols + k] = weight[row * cols + order[k]];
          grid[i * cols + k].scale = scale[run];
          grid[i * cols + k].zero_point = static_cast<T>(zero_point[run]);
        }
      }
      kernel(
          {tile.data(), shift.data(), tile_codes.data(), grid.data(),
           feedback + group * cols * cols, cols});
      for (int64_t i = 0; i < count; ++i) {
        code_t* row = codes_ptr + (group * rows_per_gram + begin + i) * cols;
        for (int64_t k = 0; k < cols; ++k) {
          row[order[k]] = static_cast<code_t>(tile_codes[i * cols + k]);
        }
      }
    }
  });
}

// The order comes from outside: an index beyond the columns would write beyond the codes.
void check_order(const Tensor& order) {
  const int64_t cols = order.size(1);
  if (cols == 0) {
    return;  // however many groups of nothing there are
  }
  const int64_t* values = order.const_data_ptr<int64_t>();
  std::vector<bool> seen(static_cast<size_t>(cols));
  for (int64_t group = 0; group < order.size(0); ++group) {
    std::fill(seen.begin(), seen.end(), false);
    for (int64_t k = 0; k < cols; ++k) {
      const int64_t column = values[group * cols + k];
      ADAROUND_CHECK(
          column >= 0 && column < cols && !seen[static_cast<size_t>(column)],
          "order must hold every column from 0 to ", cols - 1, " once a group, got ", column);
      seen[static_cast<size_t>(column)] = true;
    }
  }
}

Tensor gptq_cpu(
    const Tensor& weight, const Tensor& feedback, const Tensor& order, const Tensor& scale,
    const Tensor& zero_point, int64_t qmin, int64_t qmax) {
  const GptqArguments args(weight, feedback, order, scale, zero_point, qmin, qmax);
  check_order(args.order);
  const Tensor codes = allocate(args.weight, args.weight.sizes(), code_dtype(qmin));
  if (args.weight.numel() == 0) {
    return codes;
  }
  dispatch_arithmetic(args.weight.scalar_type(), [&](auto number) {
    dispatch_codes(codes.scalar_type(), [&](auto code) {
      run_gptq<decltype(number), decltype(code)>(args, qmin, qmax, codes);
    });
  });
  return codes;
}

}  // namespace
}  // namespace adaround_ext::cpu

STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CPU, m) {
  m.impl("gptq", TORCH_BOX(&adaround_ext::cpu::gptq_cpu));
}
